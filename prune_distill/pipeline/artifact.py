"""The folder of a stage: its location, its inputs, and whether it is complete. No torch, no NeMo.

The folder's name ends in a hash of everything that determines its content (see `prune_distill.pipeline.identity`).
`manifest.json` is written last, atomically. A folder without it is incomplete: it is resumed, never read.
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
from prune_distill.errors import ConfigError, InputError
from prune_distill.pipeline import input_digests
from prune_distill.pipeline.identity import (
    find_external,
    git_commit,
    hash_stage,
    hashed_values,
    installed_libraries,
    recorded_values,
)
from prune_distill.pipeline.names import LOCK, MANIFEST, METRICS, OUTPUTS, RESOLVED, STATE
from prune_distill.pipeline.outputs import Entries, compute_crc32, digests, list_outputs, parse_record, total_bytes
from prune_distill.pipeline.stage import External, Source, Stage
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig

# Types that readers of a manifest rely on.
_MANIFEST_TYPES: dict[str, Any] = {
    **dict.fromkeys(("inputs", "versions", "metrics", "outputs"), dict),
    **dict.fromkeys(("started", "ended", "seconds"), (int, float)),
}


@dataclass(frozen=True)
class Located:
    """One stage of a run: its config, its output folder, and its inputs.

    Attributes:
        inputs: path by input name; a Hub id is unchanged, and a glob becomes a tuple of files.
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
        """Whether the folder contains the complete result, within the limits of the config."""
        manifest = read_manifest(self.folder, self.config_hash)
        return manifest is not None and all(
            manifest.get("metrics", {}).get(metric, 0) <= get_value(self.cfg, key)
            for key, metric in self.stage.limits.items()
        )

    def settings(self) -> dict[str, Any]:
        """Values by key that affect the output without being part of the identity."""
        shown = {key: hashed_values(get_value(self.cfg, key)) for key in self.stage.shows}
        return {**shown, **dict(recorded_values(self.stage.sections, self.cfg))}

    def ignored_changes(self) -> list[str]:
        """Settings that have changed since the stage was completed, as `key=value (it has VALUE)`."""
        manifest = read_manifest(self.folder, self.config_hash) or {}
        before, now = manifest.get("settings", {}), self.settings()
        return [
            f"{key}={_word(now[key])} (it has {_word(value)})"
            for key, value in before.items()
            if key in now and now[key] != value
        ]


def locate(cfg: RunConfig, stages: Sequence[Stage] = STAGES) -> dict[str, Located]:
    """Locate every stage of a run, in order.

    Args:
        cfg: the run.
        stages: the stage table, from which the stages that `cfg` needs are selected.

    Raises:
        ConfigError: files of the user are missing or cannot be read; lists all of them.
    """
    located: dict[str, Located] = {}
    faults: dict[str, str] = {}
    run_dir = Path(cfg.run_dir)
    input_digests.load_cache(run_dir)
    for stage in [stage for stage in stages if stage.wanted(cfg)]:
        stage_cfg = stage.configure(cfg)
        inputs: dict[str, Any] = {}
        hashes: dict[str, str] = {}
        for name, source in stage.inputs(stage_cfg).items():
            try:
                inputs[name], hashes[name] = _find(source, located)
            except (FileNotFoundError, ConfigError) as error:
                for fault in map(str, error.faults) if isinstance(error, ConfigError) else [str(error)]:
                    # Report a file once, although several stages may read it.
                    faults.setdefault(fault, f"stage {stage.name}, input {name}: {fault}")
        config_hash = hash_stage(stage, stage_cfg, hashes)
        folder = run_dir / (stage.folder or f"{stage.name}-{config_hash[:8]}")
        located[stage.name] = Located(stage, stage_cfg, folder, config_hash, inputs, hashes)
    remember_inputs(run_dir)
    if faults:
        raise ConfigError(list(faults.values()))
    return located


def _find(source: Source, located: dict[str, Located]) -> tuple[Any, str]:
    """Return the path and the identity of an input."""
    if isinstance(source, External):
        return find_external(source)
    made = located[source.stage]
    return made.folder / source.path, f"{made.config_hash}/{source.path}"


def remember_inputs(run_dir: Path) -> None:
    """Save the digests of the user's files in a run's folder, so that its stages do not read them again."""
    content = input_digests.build_cache(run_dir)
    if content is not None and run_dir.is_dir():
        with suppress(OSError):
            write_json(run_dir / input_digests.CACHE, content)


def read_manifest(folder: Path, config_hash: str | None = None) -> dict[str, Any] | None:
    """Read the manifest of a complete stage folder; None if it is missing, unreadable, or has another `config_hash`."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("status") != "complete":
        return None
    if config_hash not in (None, manifest.get("config_hash")):
        return None
    # Readers rely on these types without further checks.
    if not all(isinstance(manifest[key], kind) for key, kind in _MANIFEST_TYPES.items() if key in manifest):
        return None
    return manifest


def add_crc32(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object as it is read from a file, with a checksum of all other keys in `crc32`."""
    # JSON has no tuples, and keys are strings.
    plain: dict[str, Any] = json.loads(json.dumps(_finite(content)))
    return {**plain, "crc32": _content_crc32(plain)}


def is_intact(content: dict[str, Any]) -> bool:
    """Return whether a JSON object matches the checksum of `add_crc32`."""
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
    """Declare a stage's folder complete, with a record of its files in `outputs.json`.

    Times are seconds since the epoch; `seconds` is the duration of the last process.
    """
    run_dir = located.folder.parent
    # Other processes of an array may still append to the metrics of shared work.
    names = list_outputs(located.folder, () if located.stage.trains else (METRICS,))
    manifest = {
        "stage": located.stage.name,
        "status": "complete",
        "config_hash": located.config_hash,
        "inputs": {
            name: {"path": _relative(path, run_dir), "hash": located.input_hashes[name]}
            for name, path in located.inputs.items()
        },
        "versions": installed_libraries(located.cfg, located.stage.libraries(located.cfg)),
        "settings": located.settings(),
        "git_commit": git_commit(),
        "started": started,
        "ended": ended,
        "seconds": round(ended - started, 3),
        "peak_memory": peak_memory,
        "metrics": metrics,
    }
    _declare(located.folder, manifest, digests(located.folder, names))


def update_record(folder: Path, names: Sequence[str]) -> None:
    """Update the record of some files in a complete folder, if it has a record.

    For files that are rewritten on purpose after their stage. The entries of other files do not change.
    """
    manifest = read_manifest(folder)
    record = folder / OUTPUTS
    entries = parse_record(record.read_bytes()) if record.is_file() else None
    if manifest is not None and entries is not None and is_intact(manifest):
        _declare(folder, manifest, {**entries, **digests(folder, names)})


def _declare(folder: Path, manifest: dict[str, Any], entries: Entries) -> None:
    """Write the record of a folder's files, then the manifest, which contains the CRC-32s of both."""
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
    """Read a stage's state file; empty if there is none."""
    try:
        state: Any = json.loads((folder / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return state if isinstance(state, dict) and type(state.get("step", 0)) is int else {}


def find_runs(folder: Path) -> list[Path]:
    """Find the run in a folder, or the runs of a sweep.

    Raises:
        InputError: there is none.
    """
    if (folder / RESOLVED).exists():
        return [folder]
    sweep = sorted(path.parent for path in folder.glob(f"*/{RESOLVED}"))
    if not sweep:
        problem = f"contains no {RESOLVED}" if folder.exists() else "does not exist"
        raise InputError(
            f"RUN_DIR={folder}: {problem}; give the folder of a run, or of a sweep (run_dir of launch.run)"
        )
    return sweep


def in_use(folder: Path) -> bool:
    """Return whether the lock of a folder is held: of a run by its launcher, or of a stage by its process."""
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically.

    Non-finite numbers are written as null, because JSON does not have them and not every reader accepts Python's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _relative(path: Any, run_dir: Path) -> Any:
    if isinstance(path, tuple):
        return [_relative(part, run_dir) for part in path]
    return os.path.relpath(path, run_dir) if isinstance(path, Path) else path


def _word(value: Any) -> str:
    """Format a value for the command line."""
    return json.dumps(value).replace(" ", "").replace('"', "")


def remove_folder(path: Path) -> None:
    """Remove a folder, or a file in its place. It is first renamed to `.removed.NAME`, so that a killed process never
    leaves a folder that looks complete.

    Errors are ignored: a process that outlives its killed rank may still write to the folder.
    """
    removed = path.with_name(f".removed.{path.name.lstrip('.')}")
    shutil.rmtree(removed, ignore_errors=True)  # of an earlier attempt
    path.rename(removed)
    if removed.is_dir():
        shutil.rmtree(removed, ignore_errors=True)
    else:
        removed.unlink()
