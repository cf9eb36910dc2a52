"""Hydra's part: overrides and config groups into one untyped tree."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from prune_distill.config.typed import did_you_mean
from prune_distill.config.wording import override, quote_for_hydra, resolve_change
from prune_distill.errors import ConfigError, Fault
from prune_distill.schema import Gpu
from prune_distill.schema.fields import AUTO
from prune_distill.schema.run import AUTOMATIC

CONFIG_DIR = Path(__file__).resolve().parents[2] / "conf"


def compose_tree(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None = None) -> DictConfig:
    """Compose overrides and config groups into a tree; its interpolations are not resolved yet.

    Args:
        overrides: Hydra overrides.
        config_dir: a folder with more files of the config groups, such as `cluster/my_site.yaml`.

    Raises:
        ConfigError: overrides that cannot be read, choices that do not exist, and a folder that cannot be used.
    """
    parsed = parse_overrides(overrides, config_dir)
    _check_choices(parsed, config_groups(config_dir))
    lines = [item.input_line or "" for item in parsed]
    if config_dir is not None:
        lines.append(f"hydra.searchpath=[{quote_for_hydra(f'file://{Path(config_dir).absolute()}', quote=True)}]")
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
            return compose("config", overrides=lines)
    # Hydra raises ValueError too (hydra/_internal/defaults_list.py:95).
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def config_groups(config_dir: str | os.PathLike[str] | None = None) -> dict[str, list[str]]:
    """The choices of every config group by the group's name, with those that `config_dir` adds.

    Raises:
        ConfigError: `config_dir` is not a folder, or contains a file that Hydra would not read because of its name.
    """
    choices = _choices(CONFIG_DIR)
    if config_dir is None:
        return choices
    folder = Path(config_dir)
    if not folder.is_dir():
        raise ConfigError(f"--config-dir={folder}: not a folder; name a DIR with files such as DIR/cluster/*.yaml")
    more = {name: files for name, files in _choices(folder).items() if name in choices}
    # Hydra looks in its own folder first, and in this one only for what is not there.
    taken = [f"{folder}/{name}/{file}.yaml" for name, files in more.items() for file in files if file in choices[name]]
    if taken:
        raise ConfigError([f"{file}: has the name of one of the project's own files; rename it" for file in taken])
    return {name: sorted({*files, *more.get(name, [])}) for name, files in choices.items()}


def _choices(folder: Path) -> dict[str, list[str]]:
    groups = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    choices = {group.name: sorted(file.stem for file in group.glob("*.yaml")) for group in groups}
    return {name: files for name, files in choices.items() if files}


def parse_overrides(
    overrides: Sequence[str], config_dir: str | os.PathLike[str] | None = None, sweeps: bool = False
) -> list[Override]:
    """Overrides in Hydra's terms. Plain `key=value` reaches the schema's check even where no file has the key.

    Raises:
        ConfigError: those that Hydra cannot read, and, unless `sweeps`, those that name several values.
    """
    faults: list[Fault] = []
    parsed: list[Override] = []
    parser = OverridesParser.create()
    groups = config_groups(config_dir)
    for line in overrides:
        try:
            found = parser.parse_override(line)
            lines = _expand(found, config_dir) or [_normalize(line, found, _is_group(found.key_or_group, groups))]
            parsed += map(parser.parse_override, lines)
        except ConfigError as error:
            faults += error.faults
            continue
        except HydraException as error:
            faults.append(_unreadable(line, " ".join(str(error).split())))
            continue
        if found.is_sweep_override() and not sweeps:
            key, _, value = line.partition("=")
            fix = f"set {override(key, value)} for one text, {key}=[{value}] for a list, or add --multirun to run each"
            faults.append(Fault("override.sweep", (key,), f"{line}: several values; {fix}"))
    if faults:
        raise ConfigError(faults)
    return parsed


def _is_group(key: str, groups: Collection[str]) -> bool:
    """Whether a key names a group of files, such as `cluster` or `cluster/gpu`."""
    return key in groups or "/" in key


def _expand(override: Override, config_dir: str | os.PathLike[str] | None) -> list[str]:
    """The overrides that a short form stands for: a GPU, or `auto` for all sizes of a layout; none of any other."""
    key, value = override.key_or_group, override.value() if not override.is_sweep_override() else None
    if key == "cluster.gpu" and value is not None:
        # Nothing is left of the GPU that the cluster states.
        figures = gpu_figures(value, config_dir) if isinstance(value, str) else value
        if not isinstance(figures, dict):
            names = f"one of {', '.join(_gpu_files(config_dir))}"
            message = f"cluster.gpu={value}: not a GPU; set cluster.gpu to {names}, or state its figures one by one"
            raise ConfigError([Fault("cluster.gpu", ("cluster.gpu",), message)])
        figures = dict.fromkeys(field.name for field in dataclasses.fields(Gpu)) | figures
        pairs = (f"{name}:{quote_for_hydra(figure, quote=True)}" for name, figure in figures.items())
        return [f"++cluster.gpu={{{','.join(pairs)}}}"]
    if value == AUTO and key.endswith(".parallel"):
        return [f"++{item}={AUTO}" for item in AUTOMATIC if item.startswith(f"{key}.")]
    return []


def gpu_figures(name: str, config_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The figures of a GPU by its name in `conf/cluster/gpu`, or in that folder of `config_dir`.

    Raises:
        ConfigError: no file has the name.
    """
    files = _gpu_files(config_dir)
    if name not in files:
        close = did_you_mean(name, list(files))
        known = f"choose from {', '.join(files)}, or state another's figures, as in conf/cluster/gpu/h100_sxm.yaml"
        message = f"cluster.gpu={name}: not a known GPU{close}; {known}"
        raise ConfigError([Fault("cluster.gpu", ("cluster.gpu",), message)])
    figures: dict[str, Any] = yaml.safe_load(files[name].read_text())
    return figures


def _gpu_files(config_dir: str | os.PathLike[str] | None) -> dict[str, Path]:
    folders = [Path(folder) / "cluster" / "gpu" for folder in (CONFIG_DIR, config_dir) if folder is not None]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def _unreadable(line: str, reason: str) -> Fault:
    """The fault of an override that Hydra cannot parse."""
    key, equals, value = line.partition("=")
    if not equals:
        fix = "write it as KEY=VALUE"
    elif (result := resolve_change(value)) is not None:
        fix = f"set {key} to {result}"
    elif value.startswith(("[", "{")):
        fix = f"put double quotes around each text in it, and single quotes around all: '{key}=[\"TEXT\"]'"
    else:
        fix = f"set {override(key, value)}"
    return Fault("override.syntax", (key,), f"{line}: not in the form KEY=VALUE ({reason}); {fix}")


def _normalize(line: str, parsed: Override, is_group: bool) -> str:
    """`+experiment=demo` means `experiment=demo`; `a.b=c` means `++a.b=c`: the schema decides what is known."""
    if parsed.type is OverrideType.ADD and is_group:
        return line.lstrip("+")
    if parsed.type is OverrideType.CHANGE and not is_group and not parsed.key_or_group.startswith("hydra"):
        return f"++{line}"
    return line


def _check_choices(overrides: list[Override], groups: dict[str, list[str]]) -> None:
    chosen = {parsed.key_or_group: parsed.value() for parsed in overrides if parsed.key_or_group in groups}
    faults = [
        Fault(
            "group.choice",
            (group,),
            f"{group}={choice}: does not exist{did_you_mean(str(choice), groups[group])}; "
            f"choose from {', '.join(groups[group])}",
        )
        for group, choice in chosen.items()
        if isinstance(choice, (str, int)) and str(choice) not in groups[group]
    ]
    if faults:
        raise ConfigError(faults)


def require_model(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None = None) -> None:
    """Check that overrides choose an experiment or a model, without which most keys would be reported as missing.

    Raises:
        ConfigError: they choose neither.
    """
    groups = config_groups(config_dir)
    chosen = {parsed.key_or_group for parsed in parse_overrides(overrides, config_dir)}
    if not chosen & {"experiment", "model"}:
        message = (
            f"experiment: not chosen; add experiment=NAME, one of {', '.join(groups['experiment'])} (own: for a model "
            f"of your own), or build a run from model=NAME: {', '.join(groups['model'])}"
        )
        raise ConfigError([Fault("run.experiment", ("experiment", "model"), message)])


def sweep(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None = None) -> list[list[str]]:
    """The overrides of every job of a sweep: `a=1,2 b=3` gives two. Hydra's choice, range and glob sweeps.

    Raises:
        ConfigError: overrides that cannot be read, or a sweep of another kind.
    """
    try:
        (jobs,) = BasicSweeper.split_arguments(parse_overrides(overrides, config_dir, sweeps=True), max_batch_size=None)
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return jobs
