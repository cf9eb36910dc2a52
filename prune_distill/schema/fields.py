"""How fields are declared: their bounds, whether they are part of a stage's identity, and what a site has to set.

A bound is part of a field's type: `Annotated[int, Range(above=0)]`, or one of the names below such as `PositiveInt`.
`prune_distill.config.bounds` checks the bounds of all fields. The comment directly above a field is its description in
`python -m launch.run --help-config` and in `docs/configuration.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING


@dataclass(frozen=True)
class Range:
    """The numbers that a field accepts; None: no limit on that side.

    Attributes:
        above: the lower limit, itself excluded; `at_least`: included.
        below: the upper limit, itself excluded; `at_most`: included.
        problem: what is wrong with a value outside the range, where the limits do not say it.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    problem: str | None = None

    def accepts(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def describe(self) -> str:
        lower = "" if self.above is None else f"above {self.above}"
        lower = lower if self.at_least is None else f"{self.at_least} or more"
        upper = "" if self.below is None else f"below {self.below}"
        upper = upper if self.at_most is None else f"at most {self.at_most}"
        return " and ".join(filter(None, (lower, upper)))


@dataclass(frozen=True)
class NotBlank:
    """The bound of a text that must not be empty."""

    def accepts(self, value: str) -> bool:
        return bool(value.strip())

    def describe(self) -> str:
        return "not empty"


Bound = Range | NotBlank

PositiveInt = Annotated[int, Range(above=0)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
# A part of a whole: less than all of it, more than nothing of it, or neither all nor nothing.
ShareBelowOne = Annotated[float, Range(at_least=0, below=1)]
ShareAboveZero = Annotated[float, Range(above=0, at_most=1)]
ProperShare = Annotated[float, Range(above=0, below=1)]
Text = Annotated[str, NotBlank()]
# Optimizer steps, which are counted in 32 bits.
Steps = Annotated[PositiveInt, Range(at_most=2**31 - 1)]


def placement(default: Any) -> Any:
    """A field that does not change a stage's result, only where, how fast or how visibly it is computed."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": False})
    return field(default=default, metadata={"identity": False})


def recorded(default: Any) -> Any:
    """A field that changes what a stage writes, but not which stage it is, so that an unfinished stage continues with a
    new value. A complete stage keeps the value that it was made with: its manifest records it, and a launch with
    another one says that this has no effect."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": False, "recorded": True})
    return field(default=default, metadata={"identity": False, "recorded": True})


def matters(default: Any, where: Callable[[Any], bool]) -> Any:
    """A field that changes a stage's result only where `where` is true of the object that holds the field."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": where})
    return field(default=default, metadata={"identity": where})


def site_specific(wanted: str) -> Any:
    """A field without a default, as it differs from site to site; `wanted` says what to set it to."""
    return field(default=MISSING, metadata={"wanted": wanted})
