"""Walks the stage table: skips what is complete, resumes what is not, and stops at the first stage that fails."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch import local, records
from launch.planning.output import summarize
from launch.planning.plan import make_plan
from launch.progress import StatusLine, duration, summary, training_status
from launch.verification import check_sizes, refuse_damaged
from prune_distill.errors import ConfigError
from prune_distill.pipeline import lock
from prune_distill.pipeline.artifact import Located, locate, read_state
from prune_distill.pipeline.names import LOG, METRICS, RESOLVED, STATE, STOP
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stage_log import Reason, exit_words, read_reason
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig

SECONDS_BETWEEN_LOOKS = 0.2


@dataclass
class StageFailedError(Exception):
    """A stage ended without having completed its folder, or was paused.

    Attributes:
        message: for the person at the terminal: which stage, why, and where its log is.
        exit_code: 2 where the user can fix it, otherwise 1.
    """

    message: str
    exit_code: int = 1

    def __str__(self) -> str:
        return self.message


def run(
    cfg: RunConfig,
    until: str | None = None,
    stages: Sequence[Stage] = STAGES,
    beat: Callable[[str], None] = lambda stage: None,
    command: str = "",
) -> None:
    """Brings a run to its end, or to the end of stage `until`.

    Args:
        cfg: the run.
        until: its last stage; None: all of them.
        stages: the table.
        beat: called several times a second with the name of the stage that runs.
        command: what a person typed to launch it.

    Raises:
        ConfigError: a missing input, a stage that does not exist or cannot fit the GPU.
        InputError: a run folder in use, or a complete stage whose files are missing or differ.
        StageFailedError: a stage failed; what was complete stays.
    """
    progress = StatusLine(sys.stdout)
    run_dir = Path(cfg.run_dir)
    located = up_to(locate(cfg, stages), until)
    to_do = [stage.stage.name for stage in located if not stage.complete]
    refuse_damaged(located, run_dir)
    plan = make_plan(cfg)
    plan.refuse_impossible(to_do)
    with lock.held(run_dir) as lock_file:
        records.write_records(cfg, plan, command)
        for line in summarize(plan) if to_do else []:
            progress.event(line)
        progress.event(f"{cfg.name}: {len(located)} stages in {run_dir}")
        for number, stage in enumerate(located, 1):
            label = f"[{number}/{len(located)}] {stage.stage.name}"
            if stage.complete:
                progress.event(f"{label}: complete, skipped{ignored_changes(stage)}")
            else:
                _run_stage(stage, run_dir / RESOLVED, label, progress, lock_file, beat)
    progress.event(summary(located))


def ignored_changes(stage: Located) -> str:
    """What to add to the line of a complete stage: settings that differ from those that it was made with."""
    changed = stage.ignored_changes()
    return f"; no effect on it now: {', '.join(changed)}; to redo it, remove {stage.folder}" if changed else ""


def listing(cfg: RunConfig, until: str | None = None, stages: Sequence[Stage] = STAGES) -> str:
    """The stages of a run, their folders, and whether each is complete, damaged or to do."""
    located = up_to(locate(cfg, stages), until)
    width = max(len(stage.stage.name) for stage in located)
    return "\n".join(f"{stage.stage.name:<{width}}  {_standing(stage):<8}  {stage.folder}" for stage in located)


def _standing(stage: Located) -> str:
    if not stage.complete:
        return "to do"
    return "damaged" if check_sizes(stage) else "complete"


def commands(cfg: RunConfig, until: str | None = None, stages: Sequence[Stage] = STAGES) -> str:
    """What starts each stage that is not complete, for a shell."""
    resolved = Path(cfg.run_dir) / RESOLVED
    located = up_to(locate(cfg, stages), until)
    return "\n".join(shlex.join(local.command(stage, resolved)) for stage in located if not stage.complete)


def up_to(located: dict[str, Located], until: str | None) -> list[Located]:
    """The stages up to `until`, all of them without it. Raises: ConfigError, where the run has no such stage."""
    names = list(located)
    if until is not None and until not in names:
        raise ConfigError(f"--until {until}: this run has no such stage; it has {', '.join(names)}")
    last = len(names) if until is None else names.index(until) + 1
    return [located[name] for name in names[:last]]


def _run_stage(
    located: Located,
    resolved: Path,
    label: str,
    progress: StatusLine,
    lock_file: int,
    beat: Callable[[str], None],
) -> None:
    """One stage from start to manifest, its output appended to the log in its folder."""
    started = time.time()
    located.folder.mkdir(parents=True, exist_ok=True)
    for left_over in (STOP, STATE):
        (located.folder / left_over).unlink(missing_ok=True)
    log = located.folder / LOG
    progress.event(f"{label}: started, log in {log}")
    with log.open("ab") as file:
        begin = file.tell()
        words = shlex.join(local.command(located, resolved))
        file.write(f"--- {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z} {words}\n".encode())
        file.flush()
        process = local.start(located, resolved, file, keep_open=(lock_file,))
        try:
            while process.poll() is None:
                beat(located.stage.name)
                detail = training_status(located.folder / METRICS, started)
                progress.status(", ".join(filter(None, [f"{label}: {duration(time.time() - started)}", detail])))
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            local.stop(process)
    state = read_state(located.folder)
    if not located.complete and process.returncode == 0 and state.get("state") == "paused":
        raise StageFailedError(
            f"stage {located.stage.name} is paused at step {state['step']}; the same command goes on from there"
        )
    if not located.complete:
        raise _failure(located, process.returncode, read_reason(log, begin), log)
    progress.event(f"{label}: done in {duration(time.time() - started)}")


def _failure(located: Located, code: int, reason: Reason, log: Path) -> StageFailedError:
    ending = reason.death or exit_words(code)
    if code == 0:
        ending = f"exit code 0, but no manifest.json in {located.folder}, so its work is not whole"
    parts = [f"stage {located.stage.name} failed ({ending})"]
    if reason.fault is not None:
        parts += [reason.fault]
    elif reason.lines:
        parts += ["its last lines:", *(f"  {line}" for line in reason.lines)]
    parts += [f"log: {log}", "what is complete is kept: once fixed, the same command goes on from here"]
    return StageFailedError("\n".join(parts), 2 if reason.fault is not None else 1)
