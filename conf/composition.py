"""Hydra's part: overrides and config groups into one untyped tree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf.errors import ConfigError
from conf.typed import did_you_mean

CONFIG_DIR = Path(__file__).resolve().parent


def compose_tree(overrides: Sequence[str]) -> DictConfig:
    """The composed tree, its interpolations not yet worked out.

    Raises:
        ConfigError: overrides that cannot be read, and choices that do not exist.
    """
    parsed = parse_overrides(overrides)
    _check_choices(parsed)
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            return compose("config", overrides=[override.input_line or "" for override in parsed])
    # Hydra raises ValueError too (hydra/_internal/defaults_list.py:95).
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def config_groups() -> dict[str, list[str]]:
    """The choices of every config group, by the group's name."""
    folders = sorted(entry for entry in CONFIG_DIR.iterdir() if entry.is_dir())
    choices = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return {name: files for name, files in choices.items() if files}


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides in Hydra's terms. Plain `key=value` reaches the schema's check even where no file has the key.

    Raises:
        ConfigError: those that Hydra cannot read.
    """
    faults: list[str] = []
    parsed: list[Override] = []
    parser = OverridesParser.create()
    groups = config_groups()
    for line in overrides:
        try:
            override = parser.parse_override(line)
            parsed.append(parser.parse_override(_normalise(line, override, override.key_or_group in groups)))
        except HydraException as error:
            faults.append(f"{line!r} cannot be read as KEY=VALUE ({' '.join(str(error).split())}); quote the value")
    if faults:
        raise ConfigError(faults)
    return parsed


def _normalise(line: str, override: Override, is_group: bool) -> str:
    """`+experiment=demo` means `experiment=demo`; `a.b=c` means `++a.b=c`: the schema decides what is known."""
    if override.type is OverrideType.ADD and is_group:
        return line.lstrip("+")
    if override.type is OverrideType.CHANGE and not is_group and not override.key_or_group.startswith("hydra"):
        return f"++{line}"
    return line


def _check_choices(overrides: list[Override]) -> None:
    groups = config_groups()
    chosen = {override.key_or_group: override.value() for override in overrides if override.key_or_group in groups}
    faults = [
        f"{group}={choice} does not exist{did_you_mean(str(choice), groups[group])}; "
        f"there are {', '.join(groups[group])}"
        for group, choice in chosen.items()
        if isinstance(choice, (str, int)) and str(choice) not in groups[group]
    ]
    if not faults and not chosen.keys() & {"experiment", "model"}:
        names = ", ".join(groups["experiment"])
        models = ", ".join(groups["model"])
        faults = [
            f"no experiment is chosen; add experiment=NAME, one of {names} (or build a run from model=NAME: {models})"
        ]
    if faults:
        raise ConfigError(faults)


def sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep: `a=1,2 b=3` gives two. Hydra's choice, range and glob sweeps.

    Raises:
        ConfigError: overrides that cannot be read, or a sweep of another kind.
    """
    try:
        (jobs,) = BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return jobs
