"""Read a run's folder in any state: missing or damaged files never raise errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from prune_distill.config.load import load_resolved
from prune_distill.errors import ConfigError
from prune_distill.pipeline.artifact import Located, in_use, locate, read_state
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import (
    JOBS,
    LAUNCHES,
    LOG,
    MANIFEST,
    METRICS,
    PLAN,
    REPORT,
    RESOLVED,
    SLURM,
    parse_stage_folder,
)
from prune_distill.pipeline.stage_log import Attempt, last_attempt, parse_object, read_attempts, read_reason
from prune_distill.pipeline.stages import STAGES
from prune_distill.reporting import Json
from prune_distill.reporting.words import finite
from prune_distill.schema import RunConfig

# Maximum number of log lines to show for a failed stage.
LINES = 8


@dataclass(frozen=True)
class Manifest:
    """The readable entries of a complete stage's manifest.

    Attributes:
        started, ended, seconds: times of the stage's last process.
        settings: values of settings that are not part of the stage's hash, by dotted key.
        inputs: the path of each input, relative to the run where it is inside.
        metrics: metrics that the stage returned; may be empty.
        peak_memory: `gpu_bytes` and `host_bytes`.
    """

    started: float | None = None
    ended: float | None = None
    seconds: float | None = None
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: Json = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    metrics: Json = field(default_factory=dict)
    peak_memory: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def read(cls, content: Json) -> Manifest:
        inputs, commit = _object(content.get("inputs")), content.get("git_commit")
        paths = {name: entry.get("path") for name, entry in inputs.items() if isinstance(entry, dict)}
        return cls(
            started=finite(content.get("started")),
            ended=finite(content.get("ended")),
            seconds=finite(content.get("seconds")),
            git_commit=commit if isinstance(commit, str) else None,
            versions={name: str(version) for name, version in _object(content.get("versions")).items()},
            settings=_object(content.get("settings")),
            inputs={name: path for name, path in paths.items() if isinstance(path, str)},
            metrics=_object(content.get("metrics")),
            peak_memory=_object(content.get("peak_memory")),
        )


def _object(value: Any) -> Json:
    """Return a value that should be a JSON object; empty if it is something else."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run.

    Attributes:
        state: complete, running, paused, interrupted, failed, submitted (to Slurm, which is not queried), or "to do".
        manifest: manifest of a complete stage; empty otherwise.
        cause: why it failed, or cannot resume.
        step: the step at which it paused.
    """

    name: str
    folder: Path
    state: str
    attempts: tuple[Attempt, ...] = ()
    manifest: Manifest = field(default_factory=Manifest)
    cause: str | None = None
    step: int | None = None

    @property
    def complete(self) -> bool:
        return self.state == "complete"

    def read(self, name: str) -> Any:
        """Read a JSON file in the folder; None if it is missing or unreadable."""
        return read_json(self.folder / name)

    def lines(self) -> list[dict[str, float | None]]:
        """Read the lines of `metrics.jsonl`."""
        try:
            return read_metrics(self.folder / METRICS)
        except OSError:
            return []


@dataclass(frozen=True)
class RunFolder:
    """A run, read from its folder.

    Attributes:
        cfg: its typed config; None if it is not valid here.
        tree: its config as plain data, if it is YAML; `text`: content of the file.
        stages: the stages by name, in order, without the report.
        notes: warnings for the reader of the report.
    """

    path: Path
    cfg: RunConfig | None
    tree: Json
    text: str
    stages: dict[str, StageFolder]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.tree.get("name") or self.path.name)

    @property
    def plan(self) -> Json:
        """The estimates of `launch.plan` at the launch; empty if there are none."""
        return _object(read_json(self.path / PLAN))

    @property
    def commands(self) -> list[str]:
        """The distinct commands that launched the run, in order."""
        try:
            lines = (self.path / LAUNCHES).read_text(errors="replace").splitlines()
        except OSError:
            return []
        commands = [(parse_object(line) or {}).get("command") for line in lines]
        return list(dict.fromkeys(str(command) for command in commands if command))

    def evaluations(self) -> list[StageFolder]:
        """The stages that evaluated models: those of the student, of its quantized formats and of the controls."""
        return [stage for name, stage in self.stages.items() if name.partition(".")[0] == "evaluate"]

    def metrics(self, stage: str) -> Json:
        found = self.stages.get(stage)
        return found.manifest.metrics if found is not None else {}

    def read(self, stage: str, name: str) -> Any:
        """Read a JSON file of a stage; None if it is missing or unreadable."""
        found = self.stages.get(stage)
        return found.read(name) if found is not None else None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return None


def read_run(path: Path) -> RunFolder:
    """Read the run in a folder, in any state."""
    text, tree = _config(path / RESOLVED)
    notes: list[str] = []
    cfg, located = None, {}
    try:
        cfg = load_resolved(path / RESOLVED)
        cfg.run_dir = str(path)
        located = locate(cfg)
    except ConfigError as error:
        notes.append(f"The run's config is not valid here, so its stages are found by their folders' names: {error}")
    folders = {name: stage.folder for name, stage in located.items()}
    present = dict(_stage_folders(path))
    if present and not any(folder.exists() for name, folder in folders.items() if name != REPORT):
        if located:
            notes.append(
                "None of the stages has the hash of its config, its inputs and the libraries on this machine: the "
                "run was made by other versions. Its newest folders are shown."
            )
        folders = present
    folders.pop(REPORT, None)
    complete = {name: stage.complete for name, stage in located.items() if folders.get(name) == stage.folder}
    return RunFolder(path, cfg, tree, text, _stages(path, folders, complete), tuple(notes))


def stage_run_folder(cfg: RunConfig, inputs: Mapping[str, Path]) -> RunFolder:
    """Read the run of stage `report`: exactly its input folders, which are complete."""
    path = Path(cfg.run_dir)
    text, tree = _config(path / RESOLVED)
    return RunFolder(path, cfg, tree, text, _stages(path, inputs, dict.fromkeys(inputs, True)))


def locate_report(cfg: RunConfig) -> Located | None:
    """Locate the report stage of a run; None if its stages are unknown."""
    try:
        return locate(cfg).get(REPORT)
    except ConfigError:
        return None


def _config(path: Path) -> tuple[str, Json]:
    try:
        text = path.read_text(errors="replace")
        tree = yaml.safe_load(text)
    except (OSError, yaml.YAMLError):
        return "", {}
    return text, _object(tree)


def _stage_folders(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the newest folder of each stage, by names alone, in the order of the stage table."""
    newest: dict[str, Path] = {}
    for folder in sorted(
        (entry for entry in path.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime
    ):
        name = parse_stage_folder(folder.name)
        if name is not None:
            newest[name] = folder
    order = [stage.name for stage in STAGES]
    for name in sorted(newest, key=lambda name: (order.index(name) if name in order else len(order), name)):
        yield name, newest[name]


def _stages(path: Path, folders: Mapping[str, Path], complete: Mapping[str, bool]) -> dict[str, StageFolder]:
    """Read the folders of stages.

    Args:
        complete: whether each stage with a known hash is complete; otherwise its manifest decides.
    """
    jobs = set(_object(read_json(path / SLURM / JOBS)))
    working = in_use(path)
    stages: dict[str, StageFolder] = {}
    for name, folder in folders.items():
        stages[name] = _stage(name, folder, complete.get(name), working, name in jobs)
        # A launcher runs the first incomplete stage.
        working = working and stages[name].complete
    return stages


def _stage(name: str, folder: Path, complete: bool | None, working: bool, submitted: bool) -> StageFolder:
    log = folder / LOG
    starts = tuple(read_attempts(log))
    manifest = _object(read_json(folder / MANIFEST))
    if complete if complete is not None else manifest.get("status") == "complete":
        return StageFolder(name, folder, "complete", starts, Manifest.read(manifest))
    if working:
        return StageFolder(name, folder, "running", starts)
    last = read_state(folder)
    fault, lines = _reason(log)
    if last.get("state") == "started":
        return StageFolder(name, folder, "interrupted", starts)
    if last.get("state") == "paused":
        step = last.get("step")
        return StageFolder(name, folder, "paused", starts, cause=fault, step=step if isinstance(step, int) else None)
    if fault is not None or (lines and not submitted):
        return StageFolder(name, folder, "failed", starts, cause=fault or "\n".join(lines[-LINES:]))
    return StageFolder(name, folder, "submitted" if submitted else "to do", starts)


def _reason(log: Path) -> tuple[str | None, list[str]]:
    """Read the last attempt from a log: a fault that the user can fix, or the last lines."""
    try:
        reason = read_reason(log, last_attempt(log))
    except OSError:
        return None, []
    return reason.fault, [*filter(None, [reason.death]), *reason.lines[-LINES:]]
