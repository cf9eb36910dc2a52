"""The hash that identifies a stage's result: of its config, its inputs and the libraries. No torch, no NeMo."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from prune_distill.config.data_files import document_files, drop_duplicates, files_below, find_existing, is_on_hub
from prune_distill.config.values import get_value
from prune_distill.model.hf_shape import may_be_hub_id
from prune_distill.pipeline import input_digests
from prune_distill.pipeline.stage import External, Stage
from prune_distill.schema import RunConfig
from prune_distill.schema.fields import Identity, identity_of

# What a result may depend on; torch's build suffix (+cpu, +cu13) is placement and cut off.
LIBRARIES = ("torch", "nemo_toolkit", "megatron-core", "nvidia-modelopt", "transformers", "tokenizers")


def hash_stage(stage: Stage, cfg: RunConfig, input_hashes: Mapping[str, str]) -> str:
    """The hash of a stage's result.

    Args:
        cfg: the config as the stage sees it.
        input_hashes: the identity of each input by name.
    """
    return _hash(
        {
            "stage": stage.name.split(".")[0],
            "config": {key: hashed_values(get_value(cfg, key)) for key in stage.hashed_keys(cfg)},
            "inputs": input_hashes,
            "versions": libraries(cfg, stage.libraries(cfg)),
        }
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def find_external(source: External) -> tuple[Any, str]:
    """The path and the identity of an input of the user's; see `Located.inputs`.

    Raises:
        ConfigError: a file that cannot be read.
        FileNotFoundError: there is nothing of that name.
    """
    found: list[str] = []
    for pattern in source.paths:
        matches = find_existing(pattern)
        if not matches and not is_on_hub(pattern) and not (source.hub and may_be_hub_id(pattern)):
            raise FileNotFoundError(f"{pattern!r} does not exist; set the path of what is to be read")
        found += matches or [pattern]
    if len(found) == 1 and not os.path.exists(found[0]):
        return found[0], _hash(["hub", found[0], source.revision])
    # What is named twice is read once.
    paths = drop_duplicates(found)
    local = iter(fingerprints([Path(path) for path in paths if not is_on_hub(path)], source.documents))
    identities = [_hash(["hub", path]) if is_on_hub(path) else next(local) for path in paths]
    if len(source.paths) == 1 and found == [os.path.expanduser(source.paths[0])]:
        return Path(found[0]), identities[0]
    return tuple(path if is_on_hub(path) else Path(path) for path in found), _hash(identities)


def fingerprints(paths: Sequence[Path], documents: bool = False) -> list[str]:
    """Identities of files and folders: the content of a file; the names and contents of a folder's files.

    Args:
        documents: whether of a folder only the files of documents count.

    Raises:
        ConfigError: a file that cannot be read.
        FileNotFoundError: there is nothing at a path.
    """
    groups = [_files_that_count(path, documents) for path in paths]
    known = iter(input_digests.digests([file for group in groups for file in group]))
    return [
        _hash([[str(file.relative_to(path)), next(known)] for file in group]) if path.is_dir() else next(known)
        for path, group in zip(paths, groups, strict=True)
    ]


def _files_that_count(path: Path, documents: bool) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    if not path.is_dir():
        return [path]
    return list(map(Path, document_files([str(path)]) if documents else files_below(str(path))))


def hashed_values(value: Any) -> Any:
    """The part of a config value that is in a hash, as plain data: all but fields with another `Identity`."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: hashed_values(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if identity_of(field, value) is Identity.hashed
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: hashed_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hashed_values(item) for item in value]
    return value


def recorded_values(keys: Iterable[str], cfg: RunConfig) -> Iterator[tuple[str, Any]]:
    """The values of the fields with `Identity.recorded` under some dotted keys, by dotted key."""
    for key in keys:
        section = get_value(cfg, key)
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            identity = identity_of(field, section)
            if identity is Identity.recorded:
                yield f"{key}.{field.name}", hashed_values(getattr(section, field.name))
            elif identity is Identity.hashed:
                yield from recorded_values([f"{key}.{field.name}"], cfg)


def libraries(cfg: RunConfig, more: Sequence[str] = ()) -> dict[str, str]:
    """What a stage's results depend on besides config and inputs: the installed libraries, or the container's image.

    The machine that submits jobs cannot see into the image, and has to find the same folders as they do.

    Args:
        more: libraries that decide this stage's result, besides those of all stages.
    """
    image = cfg.cluster.slurm and cfg.cluster.slurm.container_image
    return {"container_image": image} if image else {**library_versions(), **versions_of(more)}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide all results."""
    return versions_of(LIBRARIES)


def versions_of(names: Sequence[str]) -> dict[str, str]:
    """Versions of distributions without their build suffix, `absent` where one is not installed."""
    return {name: (installed_version(name) or "absent").split("+")[0] for name in names}


@cache
def installed_version(name: str) -> str | None:
    """The version of an installed distribution, None where there is none. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where it was changed; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
