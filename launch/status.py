"""python -m launch.status RUN_DIR [--watch] [--json]

Show the status of a run: its stages, their jobs, the step and speed of a training, why a stage failed, and what earlier
settings left. It reads the run's folder and, with Slurm, `squeue`; it works on any machine that can access the folder,
and changes nothing without --remove-old.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.old_stages import find_old_stages, format_list, remove_old_stages
from launch.progress import duration, newest, training_status
from launch.queue import ENDED, Queued, query_jobs, read_submissions
from launch.verification import check_sizes, verify
from prune_distill.config.load import load_resolved
from prune_distill.credentials import redact
from prune_distill.errors import ConfigError, InputError
from prune_distill.pipeline import lock
from prune_distill.pipeline.artifact import Located, find_runs, in_use, locate, read_manifest, read_state
from prune_distill.pipeline.names import LOG, METRICS, RESOLVED
from prune_distill.pipeline.stage import Output, Stage
from prune_distill.pipeline.stage_log import last_attempt, read_attempts, read_reason
from prune_distill.pipeline.stages import STAGES

SECONDS_BETWEEN_LOOKS = 5.0
# Maximum number of log lines to show for a failed stage.
LINES = 5


@dataclass
class StageStatus:
    """Status of one stage.

    Attributes:
        state: complete, damaged (files of a complete stage are missing or have other sizes), running, queued, paused,
            interrupted (by a signal or the end of the machine), failed, canceled (the value is "cancelled"), or "to
            do".
        jobs: ids of its Slurm jobs, in order.
        detail: one line of further information.
        cause: why it failed or cannot resume, or what is damaged.
        figures: the newest metrics of a training: step, max_steps, loss, tokens_per_second, seconds_left, ...
    """

    stage: str
    state: str
    folder: str
    jobs: list[str] = field(default_factory=list)
    detail: str = ""
    cause: str | None = None
    figures: dict[str, float] = field(default_factory=dict)


def status(run_dir: Path, stages: Sequence[Stage] = STAGES) -> list[StageStatus]:
    """Return the status of each stage of a run, in order.

    Raises:
        ConfigError: the folder is not a run, or the run's inputs are missing.
    """
    located = _located(run_dir, stages)
    jobs = {name: list(entry["jobs"]) for name, entry in read_submissions(run_dir).items()}
    queue = query_jobs({job for ids in jobs.values() for job in ids})
    # A launcher on this machine runs the first incomplete stage.
    here = next((name for name, stage in located.items() if not stage.complete), None)
    running = {here} if in_use(run_dir) else set()
    return [_stage(stage, jobs.get(name, []), queue, name in running, located) for name, stage in located.items()]


def _located(run_dir: Path, stages: Sequence[Stage]) -> dict[str, Located]:
    cfg = load_resolved(run_dir / RESOLVED)
    cfg.run_dir = str(run_dir)
    return locate(cfg, stages)


def _stage(
    stage: Located, jobs: list[str], queue: Mapping[str, Queued], running_here: bool, located: Mapping[str, Located]
) -> StageStatus:
    found = StageStatus(stage.stage.name, "to do", str(stage.folder), jobs)
    metrics = stage.folder / METRICS
    found.figures = newest(metrics, since=0)
    last = read_state(stage.folder)
    alive = [queue[job] for job in jobs if job in queue and queue[job].state not in ENDED]
    log = stage.folder / LOG
    damage = check_sizes(stage)
    if damage is not None:
        found.state, found.cause = "damaged", str(damage)
    elif stage.complete:
        found.state = "complete"
        found.detail = duration((read_manifest(stage.folder) or {}).get("seconds", 0))
    elif running_here or any(job.state != "PENDING" for job in alive):
        found.state = "running"
        left = [f"{job.time_left} of job time left" for job in alive if job.state != "PENDING"]
        found.detail = ", ".join(filter(None, [training_status(metrics, since=0), *left]))
    elif alive:
        found.state = "queued"
        at = [f"paused at step {last['step']}"] if last.get("state") == "paused" else []
        found.detail = ", ".join([*at, alive[0].reason])
    elif last.get("state") == "paused":
        found.state, found.detail = "paused", f"at step {last['step']}"
        # Why its job did not start it again, if the script recorded it.
        found.cause = read_reason(log, last_attempt(log)).fault if log.exists() else None
    elif _has_other_settings(stage.folder):
        found.detail = "complete for other settings"
    elif last.get("state") == "started":
        progress = training_status(metrics, since=0)
        found.state, found.detail = "interrupted", f"{progress and progress + '; '}the same command resumes it"
    elif log.exists() and log.stat().st_size:
        found.state, found.cause = "failed", _cause(log, [queue[job].state for job in jobs if job in queue])
        found.detail = training_status(metrics, since=0)
    elif jobs:
        found.state = "cancelled"
        sources = stage.stage.inputs(stage.cfg).values()
        needs = sorted({source.stage for source in sources if isinstance(source, Output)})
        missing = [name for name in needs if not located[name].complete]
        found.detail = f"needs {', '.join(missing)}" if missing else ""
    return found


def _has_other_settings(folder: Path) -> bool:
    """Whether the folder's last attempt completed it, for settings that have changed since."""
    manifest, starts = read_manifest(folder), read_attempts(folder / LOG)
    return manifest is not None and not (starts and starts[-1].started > float(manifest["ended"]))


def _cause(log: Path, states: Collection[str]) -> str:
    """Return why a stage failed: Slurm's reason if Slurm ended it, and the log."""
    reason = read_reason(log, last_attempt(log))
    lines = [reason.fault] if reason.fault is not None else reason.lines[-LINES:]
    ended = set(states) & ENDED
    # When a job of a chain fails, the later ones are canceled.
    by_slurm = sorted(ended - {"FAILED", "COMPLETED"} - ({"CANCELLED"} if "FAILED" in ended else set()))
    return redact("\n".join([*by_slurm, *filter(None, [reason.death]), *lines]))


def table(stages: Sequence[StageStatus]) -> str:
    """Format a table with one line per stage, followed by the causes of failures."""
    rows = [(stage.stage, stage.state, _span(stage.jobs), stage.detail) for stage in stages]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    for stage in stages:
        if stage.cause is not None:
            cause = stage.cause.replace("\n", "\n  ")
            lines += ["", f"{stage.stage} {stage.state}:\n  {cause}", f"  log: {stage.folder}/{LOG}"]
    return "\n".join(line.rstrip() for line in lines)


def _span(jobs: Sequence[str]) -> str:
    return jobs[0] if len(jobs) == 1 else f"{jobs[0]}..{jobs[-1]}" if jobs else ""


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the command line. Returns the exit status: 0, or 2 if the folder is not a run or `--verify` finds damage."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.status", description=(__doc__ or "").partition("\n")[2].strip()
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--watch", action="store_true", help="repeat every few seconds until nothing runs or waits")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--verify", action="store_true", help="read all outputs of complete stages, and list all damage"
    )
    parser.add_argument(
        "--remove-old",
        action="store_true",
        help="remove the stages of earlier settings, if those of the present ones are complete",
    )
    args = parser.parse_args(arguments)
    try:
        if args.verify:
            intact = [verify(_located(folder, stages), folder) for folder in find_runs(args.run_dir)]
            return 0 if all(intact) else 2
        if args.remove_old:
            for folder in find_runs(args.run_dir):
                with lock.hold_lock(folder, fix="end it"):
                    remove_old_stages(folder, _located(folder, stages), stages)
            return 0
        while True:
            runs = {str(folder): status(folder, stages) for folder in find_runs(args.run_dir)}
            if args.watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(_format_json(runs) if args.json else _format_text(runs, stages), flush=True)
            if not args.watch or all(
                stage.state not in ("running", "queued") for run in runs.values() for stage in run
            ):
                return 0
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _format_json(runs: Mapping[str, Sequence[StageStatus]]) -> str:
    return json.dumps({run: [dataclasses.asdict(stage) for stage in stages] for run, stages in runs.items()}, indent=1)


def _format_text(runs: Mapping[str, Sequence[StageStatus]], stages: Sequence[Stage]) -> str:
    tables = {run: "\n\n".join([table(found), *_old(Path(run), stages)]) for run, found in runs.items()}
    return (
        next(iter(tables.values()))
        if len(tables) == 1
        else "\n\n".join(f"{run}\n{text}" for run, text in tables.items())
    )


def _old(run_dir: Path, stages: Sequence[Stage]) -> list[str]:
    old = find_old_stages(run_dir, _located(run_dir, stages), stages)
    return [format_list(old)] if old else []


if __name__ == "__main__":
    sys.exit(main())
