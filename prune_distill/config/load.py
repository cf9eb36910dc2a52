"""The only way to get a config: composed by Hydra, or read back from a run's `resolved.yaml`, typed and checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from prune_distill.atomic_files import write_text
from prune_distill.config.typed import UNRESOLVED, Reader, plain
from prune_distill.config.validate import missing_files, validate
from prune_distill.config.values import named_models
from prune_distill.credentials import redact
from prune_distill.errors import ConfigError, Fault
from prune_distill.model.hf_shape import read_family, read_shape
from prune_distill.schema import RunConfig
from prune_distill.schema.fields import AUTO
from prune_distill.schema.run import AUTOMATIC

Choose = Callable[[RunConfig, Collection[str]], RunConfig]


def compose(
    overrides: Sequence[str],
    check_files: bool = False,
    config_dir: str | os.PathLike[str] | None = None,
    choose: Choose | None = None,
    require_site: bool = True,
) -> RunConfig:
    """The config of a run from `key=value` overrides, as on the command line.

    Args:
        overrides: Hydra overrides: groups (`experiment=demo`) and values (`distill.lr=1e-4`).
        check_files: also require that the user's local files and folders exist.
        config_dir: a folder with more files of the config groups.
        choose: sets the keys that are `auto` in a config that is otherwise correct; None: `auto` is a fault.
        require_site: report missing values that differ from site to site, which a plan does not need.

    Raises:
        ConfigError: all faults found: unknown keys, wrong types, missing values, contradictions.
    """
    # Workers read resolved.yaml and have no need of Hydra.
    from prune_distill.config.composition import compose_tree, require_model

    require_model(overrides, config_dir)
    faults: list[Fault] = []
    return _typed(
        _resolve(compose_tree(overrides, config_dir), faults),
        faults,
        check_files,
        choose=choose,
        require_site=require_site,
    )


def show(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None = None) -> str:
    """A config that has faults as YAML: what is set, the schema's defaults, and `???` where a value is missing.

    Raises:
        ConfigError: nothing can be composed from these overrides.
    """
    from prune_distill.config.composition import compose_tree  # stages read resolved.yaml and need no Hydra

    tree = _resolve(compose_tree(overrides, config_dir), [])
    return redact(str(yaml.safe_dump(_shown(tree, plain(RunConfig())), sort_keys=False)))


def _shown(value: Any, default: Any) -> Any:
    if value is UNRESOLVED:
        return MISSING
    if isinstance(value, dict):
        known = default if isinstance(default, dict) else {}
        names = [*known, *(name for name in value if name not in known)]
        return {name: _shown(value[name], known.get(name)) if name in value else known[name] for name in names}
    return [_shown(item, None) for item in value] if isinstance(value, list) else value


def load_resolved(path: str | os.PathLike[str]) -> RunConfig:
    """The config of a run from its `resolved.yaml`.

    Raises:
        ConfigError: the file does not exist or is not readable, or its content is wrong.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(Path(path)))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: does not exist; launch.run writes it into the run's folder") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not readable ({' '.join(str(error).split())}); start launch.run again") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: contains {type(tree).__name__}, not keys and values; start launch.run again")
    # It was checked when it was composed. The report is made of older ones too.
    return _typed(tree, [], refuse_credentials=False)


def save_resolved(cfg: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write a config so that `load_resolved` reads the same one back; readers see the old file or the new."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, to_yaml(cfg))


def to_yaml(cfg: RunConfig) -> str:
    """A config as YAML, enums by name."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(cfg)))


def _resolve(node: Any, faults: list[Fault], prefix: str = "") -> Any:
    """A composed tree as plain values, with its interpolations resolved."""
    if isinstance(node, ListConfig):
        return [_item(node, index, faults, f"{prefix}[{index}]") for index in range(len(node))]
    if isinstance(node, DictConfig):
        dot = f"{prefix}." if prefix else ""
        return {str(key): _item(node, key, faults, f"{dot}{key!s}") for key in node}
    return node


def _item(node: Any, key: Any, faults: list[Fault], dotted: str) -> Any:
    if OmegaConf.is_missing(node, key):
        return "???"
    try:
        return _resolve(node[key], faults, dotted)
    except InterpolationToMissingValueError:
        # The missing value is a fault of its own.
        return UNRESOLVED
    except OmegaConfBaseException as error:
        message = f"{dotted}: not resolvable ({str(error).splitlines()[0]}); set {dotted} to a plain value"
        faults.append(Fault("value.interpolation", (dotted,), message))
        return UNRESOLVED


def _typed(
    tree: Any,
    faults: list[Fault],
    check_files: bool = False,
    refuse_credentials: bool = True,
    choose: Choose | None = None,
    require_site: bool = True,
) -> RunConfig:
    """The config that a plain tree describes; `faults` were found before."""
    faults = faults + [fault for group, model in _model_trees(tree) for fault in _fill_in_family(model, group)]
    automatic = remove_automatic(tree) if choose is not None else []
    reader = Reader(RunConfig, refuse_credentials, require_site)
    cfg = reader.group(RunConfig, tree)
    faults += reader.faults
    unreadable = set(reader.unreadable)
    for group, model in named_models(cfg).items():
        if not any(key == group or key.startswith(f"{group}.") for key in unreadable):
            model.shape, shape_faults = read_shape(model, group)
            faults += _config_json_faults(shape_faults, group)
        if model.shape is None and model.hf_path is not None:
            unreadable.add(f"{group}.shape")
    # Rules of what is still to be chosen are skipped.
    faults += validate(cfg, {*unreadable, *automatic})
    if automatic and choose is not None and not faults:
        cfg = choose(cfg, automatic)
        cfg.automatic = automatic
        faults += validate(cfg)
    if check_files:
        # Faults of config.json were found when the shape was read.
        known = {fault.message for fault in faults}
        faults += [fault for fault in missing_files(cfg, unreadable) if fault.message not in known]
    if faults:
        raise ConfigError(faults)
    return cfg


def remove_automatic(tree: Any) -> list[str]:
    """Remove the keys that are `auto` from a plain tree, so that they have their defaults, and list them."""
    found = []
    for key in AUTOMATIC:
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if isinstance(node, dict) and node.get(name) == AUTO:
            del node[name]
            found.append(key)
    return found


def _config_json_faults(messages: list[str], group: str) -> list[Fault]:
    return [Fault(f"{group}.config_json", (f"{group}.hf_path",), message) for message in messages]


def _model_trees(tree: Any) -> Iterator[tuple[str, Any]]:
    """The groups of a plain tree that may name a model, by key."""
    yield from ((group, tree.get(group)) for group in ("model", "teacher"))
    data = tree.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    for name, source in sources.items() if isinstance(sources, dict) else ():
        if isinstance(source, dict):
            yield f"data.sources.{name}.teacher", source.get("teacher")


def _fill_in_family(model: Any, group: str) -> list[Fault]:
    """Set a family that is missing to what the model's `config.json` says; the faults where it cannot be read."""
    if not isinstance(model, dict) or model.get("family", MISSING) not in (MISSING, None):
        return []
    if not isinstance(model.get("hf_path"), str):
        return []
    # A missing path is a fault of its own.
    missing = model["hf_path"] == MISSING
    family, faults = (None, []) if missing else read_family(model["hf_path"], model.get("revision"), group)
    model["family"] = UNRESOLVED if family is None else family
    return _config_json_faults(faults, group)
