"""A stage's folder: where it is, what it was made from, and whether it is whole. No torch, no NeMo.

The folder's name ends in a hash of everything that decides its content: the stage's config, its inputs' identities
(the tokenizer is one of them) and the library versions. `manifest.json` is written last, atomically; a folder
without it is resumed or redone, never read. How the work is placed and watched is no part of the hash.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from prune_distill.atomic_files import write_text
from prune_distill.config.data_files import document_files, drop_duplicates, files_below, find_existing, is_on_hub
from prune_distill.config.values import get_value
from prune_distill.errors import ConfigError
from prune_distill.model.hf_shape import may_be_hub_id
from prune_distill.pipeline import input_digests
from prune_distill.pipeline.names import LOCK, MANIFEST, METRICS, OUTPUTS, STATE
from prune_distill.pipeline.outputs import Entries, crc32_of, digests, outputs_of, parse_record, total_bytes
from prune_distill.pipeline.stages import STAGES, Output, Source, Stage
from prune_distill.schema import RunConfig

# What readers of a manifest rely on.
_MANIFEST_TYPES: dict[str, Any] = {
    **dict.fromkeys(("inputs", "versions", "metrics", "outputs"), dict),
    **dict.fromkeys(("started", "ended", "seconds"), (int, float)),
}
# What a result may depend on; torch's build suffix (+cpu, +cu13) is placement and cut off.
LIBRARIES = ("torch", "nemo_toolkit", "megatron-core", "nvidia-modelopt", "transformers", "tokenizers")


@dataclass(frozen=True)
class Located:
    """One stage of a run: its config, the folder it writes, and where its inputs are.

    Attributes:
        inputs: path by input name; a Hub id stays as it is, a glob gives a tuple of files.
        input_hashes: identity by input name.
    """

    stage: Stage
    cfg: RunConfig
    folder: Path
    config_hash: str
    inputs: dict[str, Any]
    input_hashes: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether the folder holds this stage's whole result, within the limits that the config sets for it."""
        manifest = read_manifest(self.folder, self.config_hash)
        return manifest is not None and all(
            manifest.get("metrics", {}).get(metric, 0) <= get_value(self.cfg, key)
            for key, metric in self.stage.limits.items()
        )

    def settings(self) -> dict[str, Any]:
        """Values by key that change what the stage writes without being part of its identity."""
        shown = {key: identity_view(get_value(self.cfg, key)) for key in self.stage.shows}
        return {**shown, **dict(_recorded(self.stage.sections, self.cfg))}

    def without_effect(self) -> list[str]:
        """What a complete stage was made with and the config now says otherwise: `key=value (it has VALUE)`."""
        manifest = read_manifest(self.folder, self.config_hash) or {}
        before, now = manifest.get("settings", {}), self.settings()
        return [
            f"{key}={_word(now[key])} (it has {_word(value)})"
            for key, value in before.items()
            if key in now and now[key] != value
        ]


def locate(cfg: RunConfig, stages: Sequence[Stage] = STAGES) -> dict[str, Located]:
    """Where every stage of a run is, in the order in which they run.

    Args:
        cfg: the run.
        stages: the table, of which the run takes those that `cfg` wants.

    Raises:
        ConfigError: files of the user's that are missing or cannot be read, all of them in one message.
    """
    located: dict[str, Located] = {}
    faults: dict[str, str] = {}
    run_dir = Path(cfg.run_dir)
    input_digests.recall(run_dir)
    for stage in [stage for stage in stages if stage.wanted(cfg)]:
        stage_cfg = stage.configure(cfg)
        inputs: dict[str, Any] = {}
        hashes: dict[str, str] = {}
        for name, source in stage.inputs(stage_cfg).items():
            try:
                inputs[name], hashes[name] = _resolve(source, located)
            except (FileNotFoundError, ConfigError) as error:
                for fault in map(str, error.faults) if isinstance(error, ConfigError) else [str(error)]:
                    # Once, though several stages may read it.
                    faults.setdefault(fault, f"stage {stage.name}, input {name}: {fault}")
        config_hash = _hash(
            {
                "stage": stage.name.split(".")[0],
                "config": {
                    key: identity_view(get_value(stage_cfg, key))
                    for key in (*stage.sections, *stage.more_sections(stage_cfg), "seed")
                },
                "inputs": hashes,
                "versions": libraries(stage_cfg, stage.libraries(stage_cfg)),
            }
        )
        folder = run_dir / (stage.folder or f"{stage.name}-{config_hash[:8]}")
        located[stage.name] = Located(stage, stage_cfg, folder, config_hash, inputs, hashes)
    remember_inputs(run_dir)
    if faults:
        raise ConfigError(list(faults.values()))
    return located


def _resolve(source: Source, located: dict[str, Located]) -> tuple[Any, str]:
    """The path and the identity of an input."""
    if isinstance(source, Output):
        made = located[source.stage]
        return made.folder / source.path, f"{made.config_hash}/{source.path}"
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


def remember_inputs(run_dir: Path) -> None:
    """Keeps the digests of the user's files in a run's folder, so that its stages need not read them again."""
    content = input_digests.to_remember(run_dir)
    if content is not None and run_dir.is_dir():
        with suppress(OSError):
            write_json(run_dir / input_digests.REMEMBERED, content)


def identity_view(value: Any) -> Any:
    """A config value as plain data, without the fields outside the identity (see `prune_distill.schema`)."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: identity_view(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if _identifies(field, value)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: identity_view(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity_view(item) for item in value]
    return value


def _identifies(field: dataclasses.Field[Any], owner: Any) -> bool:
    """Whether a field is part of the identity: always, never, or as the object that holds it says."""
    rule = field.metadata.get("identity", True)
    return bool(rule(owner) if callable(rule) else rule)


def _recorded(keys: Iterable[str], cfg: RunConfig) -> Iterator[tuple[str, Any]]:
    """The fields that `prune_distill.schema.recorded` marks under some sections, by dotted key."""
    for key in keys:
        section = get_value(cfg, key)
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            if field.metadata.get("recorded"):
                yield f"{key}.{field.name}", identity_view(getattr(section, field.name))
            elif _identifies(field, section):
                yield from _recorded([f"{key}.{field.name}"], cfg)


def libraries(cfg: RunConfig, more: Sequence[str] = ()) -> dict[str, str]:
    """What a stage's results depend on besides config and inputs: the installed libraries, or the container's image.

    The machine that submits jobs cannot see into the image, and has to find the same folders as they do.

    Args:
        more: libraries that decide this stage's result, besides those of all stages.
    """
    image = cfg.cluster.slurm and cfg.cluster.slurm.container_image
    return {"container_image": image} if image else {**library_versions(), **_versions(more)}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide all results, `absent` where one is not installed."""
    return _versions(LIBRARIES)


def _versions(names: Sequence[str]) -> dict[str, str]:
    return {name: (installed_version(name) or "absent").split("+")[0] for name in names}


@cache
def installed_version(name: str) -> str | None:
    """The version of an installed distribution, None where there is none. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_manifest(folder: Path, config_hash: str | None = None) -> dict[str, Any] | None:
    """The manifest of a complete stage folder, or None: absent, unreadable, or (if asked) of another identity."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("status") != "complete":
        return None
    if config_hash not in (None, manifest.get("config_hash")):
        return None
    # What others read of it without a further look.
    if not all(isinstance(manifest[key], kind) for key, kind in _MANIFEST_TYPES.items() if key in manifest):
        return None
    return manifest


def with_crc32(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object as it will be read from a file, with a key `crc32` that vouches for all others."""
    # JSON has no tuples, and text for keys.
    plain: dict[str, Any] = json.loads(json.dumps(_finite(content)))
    return {**plain, "crc32": _content_crc32(plain)}


def is_as_written(content: dict[str, Any]) -> bool:
    """Whether a JSON object that was read has what `with_crc32` vouched for."""
    return content.get("crc32") == _content_crc32(content)


def _content_crc32(content: dict[str, Any]) -> str:
    vouched_for = {key: value for key, value in content.items() if key != "crc32"}
    return crc32_of(json.dumps(vouched_for, sort_keys=True).encode())


def write_manifest(
    located: Located,
    started: float,
    ended: float,
    metrics: dict[str, Any],
    peak_memory: dict[str, int | None] | None = None,
) -> None:
    """Declares a stage's folder complete, with a record of its files in `outputs.json`.

    Times are seconds since the epoch; `seconds` is the last process's share.
    """
    run_dir = located.folder.parent
    # Other processes of an array may still add to the metrics of work that they share.
    names = outputs_of(located.folder, () if located.stage.trains else (METRICS,))
    manifest = {
        "stage": located.stage.name,
        "status": "complete",
        "config_hash": located.config_hash,
        "inputs": {
            name: {"path": _relative(path, run_dir), "hash": located.input_hashes[name]}
            for name, path in located.inputs.items()
        },
        "versions": {**library_versions(), **_versions(located.stage.libraries(located.cfg))},
        "settings": located.settings(),
        "git_commit": git_commit(),
        "started": started,
        "ended": ended,
        "seconds": round(ended - started, 3),
        "peak_memory": peak_memory,
        "metrics": metrics,
    }
    _declare(located.folder, manifest, digests(located.folder, names))


def record_again(folder: Path, names: Sequence[str]) -> None:
    """Records some files of a complete folder as they are now; where nothing is recorded, nothing is done.

    For what is rewritten on purpose after its stage. Other files keep what was recorded of them.
    """
    manifest = read_manifest(folder)
    record = folder / OUTPUTS
    entries = parse_record(record.read_bytes()) if record.is_file() else None
    if manifest is not None and entries is not None and is_as_written(manifest):
        _declare(folder, manifest, {**entries, **digests(folder, names)})


def _declare(folder: Path, manifest: dict[str, Any], entries: Entries) -> None:
    """Writes the record of a folder's files, then the manifest, whose CRC-32s vouch for both."""
    write_json(folder / OUTPUTS, dict(sorted(entries.items())))
    outputs = {"files": len(entries), "bytes": total_bytes(entries), "crc32": crc32_of((folder / OUTPUTS).read_bytes())}
    write_json(folder / MANIFEST, with_crc32({**manifest, "outputs": outputs}))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a stage's state file; empty where it has none."""
    try:
        state: Any = json.loads((folder / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return state if isinstance(state, dict) and type(state.get("step", 0)) is int else {}


def in_use(run_dir: Path) -> bool:
    """Whether a launcher, or a stage that it left, holds a run folder."""
    try:
        with (run_dir / LOCK).open() as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that a reader sees the old content or the new, never a part.

    Numbers that are not finite are written as null: JSON has none, and not every reader takes Python's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where it was changed; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _relative(path: Any, run_dir: Path) -> Any:
    if isinstance(path, tuple):
        return [_relative(part, run_dir) for part in path]
    return os.path.relpath(path, run_dir) if isinstance(path, Path) else path


def _word(value: Any) -> str:
    """A value as a command line takes it."""
    return json.dumps(value).replace(" ", "").replace('"', "")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def remove_folder(path: Path) -> None:
    """Removes a folder, or a file in its place, renamed to `.removed.NAME` first, so that a kill halfway leaves nothing
    that looks whole.

    Errors while removing are ignored: a process that outlives its killed rank may still be writing there.
    """
    removed = path.with_name(f".removed.{path.name.lstrip('.')}")
    shutil.rmtree(removed, ignore_errors=True)  # of an earlier attempt
    path.rename(removed)
    if removed.is_dir():
        shutil.rmtree(removed, ignore_errors=True)
    else:
        removed.unlink()
