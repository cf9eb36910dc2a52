"""Values in words, and what faults offer instead of a value."""

from __future__ import annotations

import re
import shlex
from typing import Any

from prune_distill.schema import Shape

# What neither bash nor Hydra's grammar treats specially, inside a word.
_PLAIN_WORD = re.compile(r"[\w./@:+%-]+")
_PLAIN_OVERRIDE = re.compile(r"[\w./@:+%=,\[\]-]+")


def too_long(key: str, value: int, shape: Shape) -> str:
    most = shape.max_position_embeddings
    return f"{key}={value} is longer than the model's max_position_embeddings {most}; set {key} to at most {most}"


def around(value: int, step: int) -> list[int]:
    """The multiples of `step` next to `value`."""
    below = value // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def divisors(value: int, near: int | None = None) -> list[int]:
    """The divisors of a number; with `near`, those up to twice as large."""
    return [number for number in range(1, min(value, 2 * near if near else value) + 1) if value % number == 0]


def any_of(values: list[int]) -> str:
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
    word = f"{key}={in_hydra(value)}"
    return word if _PLAIN_OVERRIDE.fullmatch(word) else shlex.quote(word)


def in_hydra(value: Any, quote: bool = False) -> str:
    """A value in Hydra's grammar, in which quotes and the backslashes before them are escaped; `quote`: always."""
    if isinstance(value, list):
        return f"[{','.join(map(in_hydra, value))}]"
    if not isinstance(value, str):
        return str(value)
    if not quote and _PLAIN_WORD.fullmatch(value):
        return value
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'"{escaped}"'


def result_of_change(text: str) -> str | None:
    """What a change such as `36->24` leads to, in words; None for any other text. A shell cuts `36->24` to `36-`."""
    change = re.fullmatch(r"\d+\s*(?:-|->|>|→)\s*(\d*)", text)
    if change is None:
        return None
    return change[1] or "the new value alone (a shell reads '>' as a redirection)"
