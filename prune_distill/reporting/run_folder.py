"""What a run's folder holds, whatever state it is in: nothing here fails because something is missing or broken."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from prune_distill.config.load import load_resolved
from prune_distill.errors import ConfigError
from prune_distill.pipeline.artifact import Located, in_use, locate, read_state
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import JOBS, LAUNCHES, LOG, MANIFEST, METRICS, PLAN, REPORT, RESOLVED, SLURM
from prune_distill.pipeline.stage_log import Attempt, attempts, last_attempt, parse_object, read_reason
from prune_distill.pipeline.stages import STAGES
from prune_distill.reporting import Json
from prune_distill.reporting.words import finite
from prune_distill.schema import RunConfig

# Lines of a failed stage's log that are shown; its log has the rest.
LINES = 8
_STAGE_FOLDER = re.compile(r"([a-z_]+(?:\.[a-z_]+)?)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Manifest:
    """What the manifest of a complete stage says, as far as it can be read.

    Attributes:
        started, ended, seconds: of the stage's last process.
        inputs: the path of each input, relative to the run where it is inside.
        metrics: what the stage says of its result; empty where it says nothing.
        peak_memory: `gpu_bytes` and `host_bytes`.
    """

    started: float | None = None
    ended: float | None = None
    seconds: float | None = None
    git_commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
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
            inputs={name: path for name, path in paths.items() if isinstance(path, str)},
            metrics=_object(content.get("metrics")),
            peak_memory=_object(content.get("peak_memory")),
        )


def _object(value: Any) -> Json:
    """A value that should be a JSON object; empty where it is something else."""
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run.

    Attributes:
        state: complete, running, paused, failed, submitted (to Slurm, which is not asked here), or "to do".
        manifest: of a complete stage; empty otherwise.
        cause: why it failed, or stays paused.
        step: where it paused.
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
        """The content of a JSON file in the folder, None where there is none that can be read."""
        return read_json(self.folder / name)

    def lines(self) -> list[dict[str, float | None]]:
        """Its `metrics.jsonl`."""
        try:
            return read_metrics(self.folder / METRICS)
        except OSError:
            return []


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder has it.

    Attributes:
        cfg: its typed config, None where it cannot be read as one.
        tree: its config as plain data, as far as it is YAML; `text`: as it stands in the file.
        stages: by name, in the order in which they run; without the report.
        notes: what a reader should know of how this was read.
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
        """What `launch.plan` estimated when the run was launched; empty where it was not kept."""
        return _object(read_json(self.path / PLAN))

    @property
    def commands(self) -> list[str]:
        """The commands that launched the run, each once, in order."""
        try:
            lines = (self.path / LAUNCHES).read_text(errors="replace").splitlines()
        except OSError:
            return []
        commands = [(parse_object(line) or {}).get("command") for line in lines]
        return list(dict.fromkeys(str(command) for command in commands if command))

    def evaluations(self) -> list[StageFolder]:
        """The stages that evaluated models: the student's, and those of controls."""
        return [stage for name, stage in self.stages.items() if name.partition(".")[0] == "evaluate"]

    def metrics(self, stage: str) -> Json:
        found = self.stages.get(stage)
        return found.manifest.metrics if found is not None else {}

    def read(self, stage: str, name: str) -> Any:
        """The content of a JSON file of a stage's, None where there is none that can be read."""
        found = self.stages.get(stage)
        return found.read(name) if found is not None else None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError):
        return None


def find_runs(folder: Path) -> list[Path]:
    """The run of a folder, or those of a sweep.

    Raises:
        ConfigError: there is none.
    """
    if (folder / RESOLVED).exists():
        return [folder]
    sweep = sorted(path.parent for path in folder.glob(f"*/{RESOLVED}"))
    if not sweep:
        raise ConfigError(f"{folder} holds no {RESOLVED}; give the folder of a run, or of a sweep")
    return sweep


def read_run(path: Path) -> RunFolder:
    """The run of a folder, at any time."""
    text, tree = _config(path / RESOLVED)
    notes: list[str] = []
    cfg, located = None, {}
    try:
        cfg = load_resolved(path / RESOLVED)
        cfg.run_dir = str(path)
        located = locate(cfg)
    except ConfigError as error:
        notes.append(f"The run's config cannot be used here, so its stages are told by their folders' names: {error}")
    folders = {name: stage.folder for name, stage in located.items()}
    present = dict(_stage_folders(path))
    if present and not any(folder.exists() for name, folder in folders.items() if name != REPORT):
        if located:
            notes.append(
                "None of the stages carries the hash that its config, inputs and the libraries here would give it: the "
                "run was made by other versions. Its newest folders are shown."
            )
        folders = present
    folders.pop(REPORT, None)
    complete = {name: stage.complete for name, stage in located.items() if folders.get(name) == stage.folder}
    return RunFolder(path, cfg, tree, text, _stages(path, folders, complete), tuple(notes))


def stage_run_folder(cfg: RunConfig, inputs: Mapping[str, Path]) -> RunFolder:
    """The run that stage `report` belongs to: exactly the folders that it was given, which are complete."""
    path = Path(cfg.run_dir)
    text, tree = _config(path / RESOLVED)
    return RunFolder(path, cfg, tree, text, _stages(path, inputs, dict.fromkeys(inputs, True)))


def locate_report(cfg: RunConfig) -> Located | None:
    """Where the report of a run is, None where its stages cannot be told."""
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
    """The newest folder of each stage, by names alone, in the order of the stage table."""
    newest: dict[str, Path] = {}
    for folder in sorted(
        (entry for entry in path.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime
    ):
        named = _STAGE_FOLDER.fullmatch(folder.name)
        if named is not None:
            newest[named[1]] = folder
    order = [stage.name for stage in STAGES]
    for name in sorted(newest, key=lambda name: (order.index(name) if name in order else len(order), name)):
        yield name, newest[name]


def _stages(path: Path, folders: Mapping[str, Path], complete: Mapping[str, bool]) -> dict[str, StageFolder]:
    """
    Args:
        complete: whether a stage is, where its hash is known; otherwise its manifest is believed.
    """
    jobs = set(_object(read_json(path / SLURM / JOBS)))
    working = in_use(path)
    stages: dict[str, StageFolder] = {}
    for name, folder in folders.items():
        stages[name] = _stage(name, folder, complete.get(name), working, name in jobs)
        # A launcher works on the first stage that is not complete.
        working = working and stages[name].complete
    return stages


def _stage(name: str, folder: Path, complete: bool | None, working: bool, submitted: bool) -> StageFolder:
    log = folder / LOG
    starts = tuple(attempts(log))
    manifest = _object(read_json(folder / MANIFEST))
    if complete if complete is not None else manifest.get("status") == "complete":
        return StageFolder(name, folder, "complete", starts, Manifest.read(manifest))
    if working:
        return StageFolder(name, folder, "running", starts)
    paused = read_state(folder)
    fault, lines = _reason(log)
    if paused.get("state") == "paused":
        step = paused.get("step")
        return StageFolder(name, folder, "paused", starts, cause=fault, step=step if isinstance(step, int) else None)
    if fault is not None or (lines and not submitted):
        return StageFolder(name, folder, "failed", starts, cause=fault or "\n".join(lines[-LINES:]))
    return StageFolder(name, folder, "submitted" if submitted else "to do", starts)


def _reason(log: Path) -> tuple[str | None, list[str]]:
    """What a log says of the last attempt: a fault that the user can fix, or its last lines."""
    try:
        reason = read_reason(log, last_attempt(log))
    except OSError:
        return None, []
    return reason.fault, [*filter(None, [reason.death]), *reason.lines[-LINES:]]
