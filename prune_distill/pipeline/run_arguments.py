"""The arguments of a stage's `run(cfg, inputs, out)`: a view of the config, and a dataclass of paths. No torch.

A stage's folder is reused as long as its hash stays the same. A stage that read a key outside its hash would leave a
stale result there, so reading a key that its row of the stage table does not declare is an error, in every run.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from prune_distill.pipeline.stage import Stage
from prune_distill.schema import RunConfig
from prune_distill.schema.fields import Identity, identity_of

# A file or folder; a Hub id; or files, some of them perhaps on the Hub.
InputPath = Path | str | tuple[Path | str, ...]
# Metrics of a stage in its manifest: JSON values by name.
Metrics = dict[str, Any]
T = TypeVar("T")


class StageModule(Protocol):
    """A module in the stage table: `Inputs` is a frozen dataclass, `run` does the work and returns metrics."""

    Inputs: type[Any]

    def run(self, cfg: RunConfig, inputs: Any, out: Path) -> Metrics: ...


class UndeclaredKeyError(Exception):
    """A stage read a config key that its row of the stage table does not declare."""


class ConfigView:
    """A view of a config group that only gives access to declared keys and placement.

    A declared group is the real dataclass. Any other group is another view, whose properties and methods have the same
    restrictions. A group that may be null must be declared, because even whether it is null is information.
    """

    def __init__(self, group: Any, declared: frozenset[str], stage: str, prefix: str = "") -> None:
        self._group, self._declared, self._stage, self._prefix = group, declared, stage, prefix

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle access these before `__init__`
            raise AttributeError(name)
        field = type(self._group).__dataclass_fields__.get(name)
        if field is None:
            return getattr(type(self._group), name).__get__(self)
        key, value = f"{self._prefix}{name}", getattr(self._group, name)
        if key in self._declared or identity_of(field, self._group) is Identity.placement:
            return value
        if field.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(value):
            return ConfigView(value, self._declared, self._stage, f"{key}.")
        raise UndeclaredKeyError(
            f"stage {self._stage} reads {key}, which its row in prune_distill/pipeline/stages.py does not declare; add "
            "it to `sections` if it can affect the result, otherwise to `reads` with the reason why it cannot"
        )


def view_config(cfg: RunConfig, stage: Stage) -> RunConfig:
    """Return the part of a config that a stage may read; `cfg`: the config of the stage."""
    return cast(RunConfig, ConfigView(cfg, stage.declared_keys(cfg), stage.name))


def fill_inputs(cls: type[T], paths: Mapping[str, InputPath]) -> T:
    """Create an `Inputs` dataclass with the paths in the fields with the inputs' names.

    A field of type `dict` receives all inputs without a field, by name.

    Raises:
        TypeError: an input has no field, or a field has neither input nor default.
    """
    hints = typing.get_type_hints(cls)
    open_ended = [name for name, hint in hints.items() if typing.get_origin(hint) is dict]
    own = {name: path for name, path in paths.items() if name in hints and name not in open_ended}
    others = {name: path for name, path in paths.items() if name not in own}
    return cls(**own, **(dict.fromkeys(open_ended, others) if open_ended else others))
