"""How fields are declared: their bounds, whether they are part of a stage's identity, and what a site has to set.

A bound is part of a field's type: `Annotated[int, Range(above=0)]`, or one of the names below such as `PositiveInt`.
`prune_distill.config.bounds` checks the bounds of all fields. The comment directly above a field is its description in
`python -m launch.run --help-config` and in `docs/configuration.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field
from enum import Enum
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

# The value of a key that launch.run and launch.plan choose.
AUTO = "auto"
# The key of a marker in a field's metadata.
_IDENTITY = "identity"

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


class Identity(Enum):
    """What a field means for the hash of a stage that declares the field's group, and so for the stage's folder.

    The default is `hashed`.
    """

    # Decides the result.
    hashed = "hashed"
    # Cannot change a result: where, how fast or how visibly the work is done, or whether a stage refuses to do it.
    placement = "placement"
    # Changes what a stage writes, but not which stage it is, so that an unfinished stage continues with a new value. A
    # complete stage keeps the value that it was made with: its manifest records it, and a launch with another one says
    # that this has no effect.
    recorded = "recorded"
    # Decides the result of another stage, which declares the field by its own key. A stage that reads that result has
    # the other stage's hash in its own.
    hashed_elsewhere = "hashed_elsewhere"


@dataclass(frozen=True)
class HashedIf:
    """The marker of a field that is `hashed` if `condition` is true of the object that holds it, else `placement`."""

    condition: Callable[[Any], bool]


def identity_of(field: Field[Any], owner: Any) -> Identity:
    """What a field of the object `owner` means for a hash."""
    marker: Identity | HashedIf = field.metadata.get(_IDENTITY, Identity.hashed)
    if isinstance(marker, HashedIf):
        return Identity.hashed if marker.condition(owner) else Identity.placement
    return marker


def placement(default: Any) -> Any:
    """A field with a default, or a factory of defaults, that cannot change a result; see `Identity.placement`."""
    return _marked(default, Identity.placement)


def recorded(default: Any) -> Any:
    """A field that manifests record; see `Identity.recorded`."""
    return _marked(default, Identity.recorded)


def hashed_elsewhere(default: Any) -> Any:
    """A field that is in another stage's hash; see `Identity.hashed_elsewhere`."""
    return _marked(default, Identity.hashed_elsewhere)


def hashed_if(default: Any, condition: Callable[[Any], bool]) -> Any:
    """A field that changes a result only where `condition` is true of the object that holds the field."""
    return _marked(default, HashedIf(condition))


def _marked(default: Any, marker: Identity | HashedIf) -> Any:
    metadata = {_IDENTITY: marker}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def site_specific(wanted: str) -> Any:
    """A field without a default, as it differs from site to site; `wanted` says what to set it to."""
    return field(default=MISSING, metadata={"wanted": wanted})
