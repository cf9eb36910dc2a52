"""python -m launch.status RUN_DIR [--watch] [--json]

Where a run stands: its stages, their jobs, the step and speed of a training, and why a stage failed. From the run's
folder and, where there is Slurm, `squeue`; it changes nothing, and works from any machine that sees the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.progress import duration, newest, training_status
from launch.queue import ENDED, Queued, ask, submitted
from launch.verification import check_sizes, verify
from prune_distill.config.load import load_resolved
from prune_distill.credentials import redact
from prune_distill.errors import ConfigError
from prune_distill.pipeline.artifact import Located, in_use, locate, read_manifest, read_state
from prune_distill.pipeline.names import LOG, METRICS, RESOLVED
from prune_distill.pipeline.stage import Output, Stage
from prune_distill.pipeline.stage_log import last_attempt, read_reason
from prune_distill.pipeline.stages import STAGES

SECONDS_BETWEEN_LOOKS = 5.0
# Lines of a failed stage's log that are shown; its log has the rest.
LINES = 5


@dataclass
class StageStatus:
    """Where one stage stands.

    Attributes:
        state: complete, damaged (files of a complete stage are missing or have other sizes), running, queued, paused,
            failed, cancelled, or "to do".
        jobs: ids of its Slurm jobs, in the order in which they run.
        detail: for a person, in a line.
        cause: why it failed or stays paused, or what is damaged.
        figures: the newest of what a training tells: step, max_steps, loss, tokens_per_second, seconds_left, ...
    """

    stage: str
    state: str
    folder: str
    jobs: list[str] = field(default_factory=list)
    detail: str = ""
    cause: str | None = None
    figures: dict[str, float] = field(default_factory=dict)


def status(run_dir: Path, stages: Sequence[Stage] = STAGES) -> list[StageStatus]:
    """Where the stages of a run stand, in the order in which they run.

    Raises:
        ConfigError: the folder holds no run, or the run's inputs are gone.
    """
    located = _located(run_dir, stages)
    jobs = {name: list(entry["jobs"]) for name, entry in submitted(run_dir).items()}
    queue = ask({job for ids in jobs.values() for job in ids})
    # A launcher on this machine works on the first stage that is not complete.
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
    paused = read_state(stage.folder)
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
        left = [f"{job.time_left} of the job left" for job in alive if job.state != "PENDING"]
        found.detail = ", ".join(filter(None, [training_status(metrics, since=0), *left]))
    elif alive:
        found.state = "queued"
        at = [f"paused at step {paused['step']}"] if paused.get("state") == "paused" else []
        found.detail = ", ".join([*at, alive[0].reason])
    elif paused.get("state") == "paused":
        found.state, found.detail = "paused", f"at step {paused['step']}"
        # Why it was not started again, where its job's script says so.
        found.cause = read_reason(log, last_attempt(log)).fault if log.exists() else None
    elif log.exists() and log.stat().st_size:
        found.state, found.cause = "failed", _cause(log, [queue[job].state for job in jobs if job in queue])
        found.detail = training_status(metrics, since=0)
    elif jobs:
        found.state = "cancelled"
        sources = stage.stage.inputs(stage.cfg).values()
        needs = sorted({source.stage for source in sources if isinstance(source, Output)})
        lacking = [name for name in needs if not located[name].complete]
        found.detail = f"for lack of {', '.join(lacking)}" if lacking else ""
    return found


def _cause(log: Path, states: Collection[str]) -> str:
    """Why a stage failed: what Slurm says where it is Slurm that ended it, and the log."""
    reason = read_reason(log, last_attempt(log))
    said = [reason.fault] if reason.fault is not None else reason.lines[-LINES:]
    ended = set(states) & ENDED
    # A chain's later jobs are cancelled once one has failed.
    by_slurm = sorted(ended - {"FAILED", "COMPLETED"} - ({"CANCELLED"} if "FAILED" in ended else set()))
    return redact("\n".join([*by_slurm, *filter(None, [reason.death]), *said]))


def table(stages: Sequence[StageStatus]) -> str:
    """For a person: a line a stage, then the causes of what failed."""
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


def find_runs(folder: Path) -> Iterator[Path]:
    """The folder's run, or those of a sweep."""
    sweep = sorted(path.parent for path in folder.glob(f"*/{RESOLVED}"))
    yield from sweep if sweep and not (folder / RESOLVED).exists() else [folder]


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """The command line; returns the exit status: 0, or 2 where there is no run in the folder, or damage in what
    `--verify` reads."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.status", description=(__doc__ or "").partition("\n")[2].strip()
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--watch", action="store_true", help="look again every few seconds until nothing runs or waits")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read what complete stages wrote, and list all damage")
    args = parser.parse_args(arguments)
    try:
        if args.verify:
            whole = [verify(_located(folder, stages), folder) for folder in find_runs(args.run_dir)]
            return 0 if all(whole) else 2
        while True:
            runs = {str(folder): status(folder, stages) for folder in find_runs(args.run_dir)}
            if args.watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            print(_format_json(runs) if args.json else _format_text(runs), flush=True)
            if not args.watch or all(
                stage.state not in ("running", "queued") for run in runs.values() for stage in run
            ):
                return 0
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _format_json(runs: Mapping[str, Sequence[StageStatus]]) -> str:
    return json.dumps({run: [dataclasses.asdict(stage) for stage in stages] for run, stages in runs.items()}, indent=1)


def _format_text(runs: Mapping[str, Sequence[StageStatus]]) -> str:
    tables = {run: table(stages) for run, stages in runs.items()}
    return (
        next(iter(tables.values()))
        if len(tables) == 1
        else "\n\n".join(f"{run}\n{text}" for run, text in tables.items())
    )


if __name__ == "__main__":
    sys.exit(main())
