"""Values in words, and the values that messages offer instead."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from enum import Enum
from typing import Any

LONGEST_SETTING = 120
# What neither bash nor Hydra's grammar treats specially, inside a word.
_PLAIN_WORD = re.compile(r"[\w./@:+%-]+")
_PLAIN_OVERRIDE = re.compile(r"[\w./@:+%=,\[\]-]+")


def describe_setting(key: str, value: Any) -> str:
    """`KEY=VALUE` for the start of a message; the key alone where the value is a group or too long to show."""
    if _contains_groups(value):
        return key
    shown = quote_for_hydra(value)
    setting = f"{key}={shown if shown.isprintable() else repr(value)}"
    return setting if len(setting) <= LONGEST_SETTING else key


def _contains_groups(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_contains_groups, value))
    return dataclasses.is_dataclass(value) or (isinstance(value, dict) and bool(value))


def too_long(key: str, limit: int) -> str:
    return f"longer than the model's max_position_embeddings {limit}; set {key} to at most {limit}"


def around(value: int, step: int) -> list[int]:
    """The multiples of `step` next to `value`."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def divisors(value: int) -> list[int]:
    return [number for number in range(1, value + 1) if value % number == 0]


def any_of(values: Sequence[int | str]) -> str:
    return " or ".join(str(value) for value in values)


def ranges(numbers: list[int]) -> str:
    """`[1, 2, 3, 5]` as "1-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def override(key: str, value: Any) -> str:
    """`KEY=VALUE` for a text, number or list, quoted so that it survives both bash and Hydra."""
    word = f"{key}={quote_for_hydra(value)}"
    return word if _PLAIN_OVERRIDE.fullmatch(word) else shlex.quote(word)


def quote_for_hydra(value: Any, quote: bool = False) -> str:
    """A value in Hydra's grammar, in which quotes and the backslashes before them are escaped; `quote`: always."""
    if isinstance(value, list):
        return f"[{','.join(map(quote_for_hydra, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if not isinstance(value, str):
        return str(value)
    if not quote and _PLAIN_WORD.fullmatch(value):
        return value
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'"{escaped}"'


def resolve_change(text: str) -> str | None:
    """What a change such as `36->24` leads to, in words; None for any other text. A shell cuts `36->24` to `36-`."""
    change = re.fullmatch(r"\d+\s*(?:-|->|>|→)\s*(\d*)", text)
    if change is None:
        return None
    return change[1] or "the new value alone (a shell reads '>' as a redirection)"
