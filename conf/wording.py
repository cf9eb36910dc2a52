"""Words and numbers that faults offer instead of a value."""

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
