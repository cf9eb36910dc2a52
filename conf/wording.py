"""Values in words, and what faults offer instead of a value."""

from __future__ import annotations

from conf.schema import Shape


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
