"""Amounts as users write them, in plain numbers."""

from __future__ import annotations

import re

# Two of the forms of sbatch's --time. Its bare numbers, minutes, are left out: YAML reads 4:00:00 as one.
_TIME_LIMIT = re.compile(r"(?:(\d+)-(?=\d\d:))?(\d+):([0-5]\d):([0-5]\d)")


def seconds_of_time_limit(text: str) -> int:
    """Seconds of a time limit, `H:MM:SS` or `D-HH:MM:SS`.

    Raises:
        ValueError: another form.
    """
    found = _TIME_LIMIT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time of the form H:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
