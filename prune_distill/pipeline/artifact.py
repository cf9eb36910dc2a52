"""A stage's folder: where it is, what it was made from, and whether it is complete. No torch, no NeMo.

The folder's name ends in a hash of everything that decides its content (see `prune_distill.pipeline.identity`).
`manifest.json` is written last, atomically; a folder without it is resumed or redone, never read.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_distill.atomic_files import write_text
from prune_distill.config.values import get_value
from prune_distill.errors import ConfigError
from prune_distill.pipeline import input_digests
from prune_distill.pipeline.identity import (
    find_external,
    git_commit,
    hash_stage,
    hashed_values,
    library_versions,
    recorded_values,
    versions_of,
)
from prune_distill.pipeline.names import LOCK, MANIFEST, METRICS, OUTPUTS, STATE
from prune_distill.pipeline.outputs import Entries, compute_crc32, digests, list_outputs, parse_record, total_bytes
from prune_distill.pipeline.stage import External, Source, Stage
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig

# What readers of a manifest rely on.
_MANIFEST_TYPES: dict[str, Any] = {
    **dict.fromkeys(("inputs", "versions", "metrics", "outputs"), dict),
    **dict.fromkeys(("started", "ended", "seconds"), (int, float)),
}


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
        shown = {key: hashed_values(get_value(self.cfg, key)) for key in self.stage.shows}
        return {**shown, **dict(recorded_values(self.stage.sections, self.cfg))}

    def ignored_changes(self) -> list[str]:
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
                inputs[name], hashes[name] = _find(source, located)
            except (FileNotFoundError, ConfigError) as error:
                for fault in map(str, error.faults) if isinstance(error, ConfigError) else [str(error)]:
                    # Once, though several stages may read it.
                    faults.setdefault(fault, f"stage {stage.name}, input {name}: {fault}")
        config_hash = hash_stage(stage, stage_cfg, hashes)
        folder = run_dir / (stage.folder or f"{stage.name}-{config_hash[:8]}")
        located[stage.name] = Located(stage, stage_cfg, folder, config_hash, inputs, hashes)
    remember_inputs(run_dir)
    if faults:
        raise ConfigError(list(faults.values()))
    return located


def _find(source: Source, located: dict[str, Located]) -> tuple[Any, str]:
    """The path and the identity of an input."""
    if isinstance(source, External):
        return find_external(source)
    made = located[source.stage]
    return made.folder / source.path, f"{made.config_hash}/{source.path}"


def remember_inputs(run_dir: Path) -> None:
    """Keeps the digests of the user's files in a run's folder, so that its stages need not read them again."""
    content = input_digests.to_remember(run_dir)
    if content is not None and run_dir.is_dir():
        with suppress(OSError):
            write_json(run_dir / input_digests.REMEMBERED, content)


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


def add_crc32(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object as it will be read from a file, with a key `crc32` that vouches for all others."""
    # JSON has no tuples, and text for keys.
    plain: dict[str, Any] = json.loads(json.dumps(_finite(content)))
    return {**plain, "crc32": _content_crc32(plain)}


def is_intact(content: dict[str, Any]) -> bool:
    """Whether a JSON object that was read has what `add_crc32` vouched for."""
    return content.get("crc32") == _content_crc32(content)


def _content_crc32(content: dict[str, Any]) -> str:
    vouched_for = {key: value for key, value in content.items() if key != "crc32"}
    return compute_crc32(json.dumps(vouched_for, sort_keys=True).encode())


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
    names = list_outputs(located.folder, () if located.stage.trains else (METRICS,))
    manifest = {
        "stage": located.stage.name,
        "status": "complete",
        "config_hash": located.config_hash,
        "inputs": {
            name: {"path": _relative(path, run_dir), "hash": located.input_hashes[name]}
            for name, path in located.inputs.items()
        },
        "versions": {**library_versions(), **versions_of(located.stage.libraries(located.cfg))},
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
    if manifest is not None and entries is not None and is_intact(manifest):
        _declare(folder, manifest, {**entries, **digests(folder, names)})


def _declare(folder: Path, manifest: dict[str, Any], entries: Entries) -> None:
    """Writes the record of a folder's files, then the manifest, whose CRC-32s vouch for both."""
    write_json(folder / OUTPUTS, dict(sorted(entries.items())))
    outputs = {
        "files": len(entries),
        "bytes": total_bytes(entries),
        "crc32": compute_crc32((folder / OUTPUTS).read_bytes()),
    }
    write_json(folder / MANIFEST, add_crc32({**manifest, "outputs": outputs}))


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


def _relative(path: Any, run_dir: Path) -> Any:
    if isinstance(path, tuple):
        return [_relative(part, run_dir) for part in path]
    return os.path.relpath(path, run_dir) if isinstance(path, Path) else path


def _word(value: Any) -> str:
    """A value as a command line takes it."""
    return json.dumps(value).replace(" ", "").replace('"', "")


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
