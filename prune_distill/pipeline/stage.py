"""A row of the stage table (`prune_distill.pipeline.stages`), and the sources of a stage's inputs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prune_distill.config.values import replace_values
from prune_distill.schema import RunConfig


@dataclass(frozen=True)
class Output:
    """`path` inside the folder of the complete stage `stage`; `files`: patterns of the files that are read."""

    stage: str
    path: str = "."
    files: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class External:
    """An input of the user: files or folders (globs allowed) or, if `hub`, a Hub id with its revision.

    Attributes:
        documents: whether only document files in folders are read.
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
        sections: dotted config keys, or properties of `RunConfig`, that affect the result, in addition to the inputs
            and `seed`.
        inputs: the stage's inputs by name, for a config.
        ranks: number of processes; above 1, torchrun starts them.
        wanted: whether a config needs the stage.
        settings: config values of a variant of the stage, by dotted key, for a config.
        folder: fixed name of the folder; None: `<name>-<hash8>`.
        trains: whether it trains, or takes similarly long, so that it can be asked to save and pause, and resumes
            from there.
        more_sections: additional `sections` that depend on the config.
        libraries: distributions whose versions affect the result, in addition to those of all stages.
        shows: dotted keys whose values appear in the output without affecting the result.
        limits: dotted keys whose values a metric of the complete stage must not exceed, and the name of that metric.
        reads: other dotted keys that the stage reads, with the reason why its result cannot become
            stale. Placement keys need no declaration.
        tasks: number of independent processes that may share its work (tasks of a Slurm job array).
        gate: whether all later stages wait for it although they do not read it: a check whose failure makes their
            work useless.
        needs_nemo: whether its module imports NeMo, Megatron-Core or ModelOpt. The runner then activates the backend
            before it imports the module.
        runner: module for `python -m`, which takes the stage's name.
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
        """Whether several independent processes may work in its folder at the same time."""
        return self.tasks is not _one

    def hashed_keys(self, cfg: RunConfig) -> tuple[str, ...]:
        """Return the dotted keys whose values are in its hash; `cfg`: the config of this stage."""
        return (*self.sections, *self.more_sections(cfg), "seed")

    def declared_keys(self, cfg: RunConfig) -> frozenset[str]:
        """Return the dotted keys that its `run` may read, besides placement; `cfg`: the config of this stage."""
        return frozenset({*self.hashed_keys(cfg), *self.shows, *self.limits, *self.reads})

    def configure(self, cfg: RunConfig) -> RunConfig:
        """Return the config of this stage: a copy with the variant's settings."""
        return replace_values(cfg, self.settings(cfg))
