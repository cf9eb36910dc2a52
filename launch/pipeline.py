"""Run the stages of the table in order: skip complete stages, resume incomplete ones, and stop at the first failure."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch import local, records
from launch.planning.disk import free_bytes
from launch.planning.output import summarize
from launch.planning.plan import make_plan
from launch.progress import StatusLine, duration, summary, training_status
from launch.verification import check_sizes, refuse_damaged
from prune_distill.errors import ConfigError
from prune_distill.pipeline import lock
from prune_distill.pipeline.artifact import Located, locate, read_state, write_json
from prune_distill.pipeline.names import LOG, METRICS, RESOLVED, STATE, STOP
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stage_log import Reason, describe_exit, read_reason
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig

SECONDS_BETWEEN_LOOKS = 0.2
# The state of a stage that its launcher started and that has not ended.
STARTED = {"state": "started"}
# Signals by which people and systems ask a process to end.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# With less, the last lines of a log may be missing.
ROOM_FOR_A_LOG = 64 * 1024


@dataclass
class StageFailedError(Exception):
    """A stage failed or was paused.

    Attributes:
        message: the stage, the reason, and the path of its log.
        exit_code: 2 if the user can fix it, otherwise 1.
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
    """Run all stages, or those up to `until`.

    Args:
        cfg: the config of the run.
        until: name of the last stage; None: all stages.
        stages: the stage table.
        beat: called several times per second with the name of the current stage.
        command: the command line, for the records.

    Raises:
        ConfigError: a missing input, or a stage that does not exist or does not fit the GPU.
        InputError: the run folder is in use, or files of a complete stage are missing or have changed.
        StageFailedError: a stage failed. Complete stages are kept.
    """
    progress = StatusLine(sys.stdout)
    run_dir = Path(cfg.run_dir)
    located = up_to(locate(cfg, stages), until)
    to_do = [stage.stage.name for stage in located if not stage.complete]
    refuse_damaged(located, run_dir)
    plan = make_plan(cfg)
    plan.refuse_impossible(to_do)
    with lock.hold_lock(run_dir) as lock_file:
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
    """Describe settings of a complete stage that have changed since it ran, to append to its line."""
    changed = stage.ignored_changes()
    return f"; ignored settings: {', '.join(changed)}; to run it again, remove {stage.folder}" if changed else ""


def listing(cfg: RunConfig, until: str | None = None, stages: Sequence[Stage] = STAGES) -> str:
    """Format the stages of a run with their states (complete, damaged or to do) and folders."""
    located = up_to(locate(cfg, stages), until)
    width = max(len(stage.stage.name) for stage in located)
    return "\n".join(f"{stage.stage.name:<{width}}  {_state(stage):<8}  {stage.folder}" for stage in located)


def _state(stage: Located) -> str:
    if not stage.complete:
        return "to do"
    return "damaged" if check_sizes(stage) else "complete"


def commands(cfg: RunConfig, until: str | None = None, stages: Sequence[Stage] = STAGES) -> str:
    """Return the shell commands that start the incomplete stages."""
    resolved = Path(cfg.run_dir) / RESOLVED
    located = up_to(locate(cfg, stages), until)
    return "\n".join(shlex.join(local.command(stage, resolved)) for stage in located if not stage.complete)


def up_to(located: dict[str, Located], until: str | None) -> list[Located]:
    """Return the stages up to `until`; None: all. Raises: ConfigError, if the run has no such stage."""
    names = list(located)
    if until is not None and until not in names:
        raise ConfigError(f"--until={until}: this run has no such stage; use one of {', '.join(names)}")
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
    """Run one stage, with its output appended to the log in its folder."""
    started = time.time()
    located.folder.mkdir(parents=True, exist_ok=True)
    (located.folder / STOP).unlink(missing_ok=True)
    # It stays if a signal ends the launcher or the stage.
    write_json(located.folder / STATE, STARTED)
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
            f"stage {located.stage.name} is paused at step {state['step']}; run the same command to resume it"
        )
    if not located.complete and -process.returncode in STOP_SIGNALS:
        raise StageFailedError(
            f"stage {located.stage.name} was interrupted ({describe_exit(process.returncode)}); "
            "run the same command to resume it"
        )
    if state == STARTED:
        (located.folder / STATE).unlink(missing_ok=True)
    if not located.complete:
        raise _failure(located, process.returncode, read_reason(log, begin), log)
    progress.event(f"{label}: done in {duration(time.time() - started)}")


def _failure(located: Located, code: int, reason: Reason, log: Path) -> StageFailedError:
    ending = reason.death or describe_exit(code)
    if code == 0:
        ending = f"exit code 0, but no manifest.json in {located.folder}, so it is incomplete"
    parts = [f"stage {located.stage.name} failed ({ending})"]
    fault = reason.fault or _disk_fault(located.folder)
    if fault is not None:
        parts += [fault]
    elif reason.lines:
        parts += ["last lines of its log:", *(f"  {line}" for line in reason.lines)]
    parts += [f"log: {log}", "complete stages are kept: fix the cause, then run the same command to resume"]
    return StageFailedError("\n".join(parts), 2 if fault is not None else 1)


def _disk_fault(folder: Path) -> str | None:
    """What a stage would have said if its disk had room for a line of the log."""
    if free_bytes(folder) >= ROOM_FOR_A_LOG:
        return None
    return f"error: no space left on the disk of {folder}; free some space and run again: complete results are kept"
