"""Values with units that are written as text."""

from __future__ import annotations

import re

GIB = 1 << 30
_TIME_LIMIT = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours_of_day>\d{1,2})|(?P<hours>\d+)):(?P<minutes>\d{2}):(?P<seconds>\d{2})"
)


def parse_time_limit(text: str) -> int:
    """Parse a time limit in Slurm's format, `4:00:00` or `1-12:00:00` (days-hours:minutes:seconds), to seconds.

    Slurm's shorter formats are rejected: `4:00` means minutes and seconds, which is easily misread.

    Raises:
        ValueError: another format, zero, or parts that are too large.
    """
    found = _TIME_LIMIT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a time limit of the form H:MM:SS or D-HH:MM:SS")
    days, hours_of_day, hours, minutes, seconds = (int(found[name] or 0) for name in _TIME_LIMIT.groupindex)
    if hours_of_day > 23 or minutes > 59 or seconds > 59:
        raise ValueError(f"{text!r} has more than 23 hours after the days, or more than 59 minutes or seconds")
    total = ((days * 24 + hours_of_day + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"{text!r} is zero")
    return total
