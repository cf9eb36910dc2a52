"""A row of the stage table (`prune_distill.pipeline.stages`), and where a stage's inputs come from. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prune_distill.config.values import replace_values
from prune_distill.schema import RunConfig


@dataclass(frozen=True)
class Output:
    """`path` inside the folder of the completed stage `stage`; `files`: patterns of what is read of it."""

    stage: str
    path: str = "."
    files: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class External:
    """Something of the user's: files or folders (globs allowed), or, where `hub`, a Hub id with its revision.

    Attributes:
        documents: whether of a folder only the files of documents are read.
    """

    paths: tuple[str, ...]
    revision: str | None = None
    hub: bool = False
    documents: bool = False


Source = Output | External


def _one(_: RunConfig) -> int:
    return 1


def _always(_: RunConfig) -> bool:
    return True


def _no_settings(_: RunConfig) -> dict[str, Any]:
    return {}


def _none(_: RunConfig) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: the stage's name, unique in the table; a variant of a stage is named `<stage>.<variant>`.
        module: the module that holds its `run`.
        sections: dotted config keys that decide the result, besides the inputs and `seed`.
        inputs: the stage's inputs by name, for a config.
        ranks: how many processes it wants; above 1, torchrun starts them.
        wanted: whether a config asks for the stage at all.
        settings: config values that make a variant of the stage, by dotted key, for a config.
        folder: the folder's name where it is fixed; otherwise `<name>-<hash8>`.
        trains: whether it trains, or works for as long, so that it can be asked to save and pause, and goes on from
            there.
        more_sections: of `sections`, for a config that makes the stage heed them.
        libraries: distributions whose versions decide the result, besides those that decide all stages'.
        shows: dotted keys whose values appear in what the stage writes, without deciding it.
        limits: dotted keys whose values a metric of the complete stage may not exceed, and that metric's name.
        reads: dotted keys that the stage reads though they are in none of the above, with the reason why its result
            cannot be stale all the same. Keys that are placement need no declaration.
        tasks: how many processes may share its work, each started by itself (tasks of a Slurm job array).
        gate: whether all later stages wait for it, though they read nothing of it: a check whose failure makes their
            work useless.
        needs_nemo: whether its module imports NeMo, Megatron-Core or ModelOpt: the runner then activates the backend
            before it imports the module.
        runner: the module that `python -m` starts, with the stage's name.
    """

    name: str
    module: str
    sections: tuple[str, ...]
    inputs: Callable[[RunConfig], dict[str, Source]]
    ranks: Callable[[RunConfig], int] = _one
    wanted: Callable[[RunConfig], bool] = _always
    settings: Callable[[RunConfig], Mapping[str, Any]] = _no_settings
    folder: str | None = None
    trains: bool = False
    more_sections: Callable[[RunConfig], tuple[str, ...]] = _none
    libraries: Callable[[RunConfig], tuple[str, ...]] = _none
    shows: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    tasks: Callable[[RunConfig], int] = _one
    gate: bool = False
    needs_nemo: bool = False
    runner: str = "recipes"

    @property
    def shares_work(self) -> bool:
        """Whether several processes that are started by themselves may work in its folder at once."""
        return self.tasks is not _one

    def hashed_keys(self, cfg: RunConfig) -> tuple[str, ...]:
        """The dotted keys whose values are in its hash; `cfg` is the config as this stage sees it."""
        return (*self.sections, *self.more_sections(cfg), "seed")

    def declared_keys(self, cfg: RunConfig) -> frozenset[str]:
        """The dotted keys that its `run` may read, besides placement; `cfg` is the config as this stage sees it."""
        return frozenset({*self.hashed_keys(cfg), *self.shows, *self.limits, *self.reads})

    def configure(self, cfg: RunConfig) -> RunConfig:
        """The config as this stage sees it: a copy with the variant's settings."""
        return replace_values(cfg, self.settings(cfg))
