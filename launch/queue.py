"""Query the states of a run's jobs (ids in `RUN_DIR/slurm/jobs.json`). An accounting database is not needed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import JOBS, SLURM

# Final states in `man squeue`.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue.

    Attributes:
        state: state as in `man squeue`, such as PENDING, RUNNING, FAILED, CANCELLED.
        reason: why it is not running, such as Dependency.
        time_left: remaining time, in Slurm's format.
    """

    job: str
    state: str
    reason: str
    time_left: str


class Submission(TypedDict):
    """Last submission of a stage: the ids of its jobs in order, and the name of their script."""

    jobs: list[str]
    script: str


def read_submissions(run_dir: Path) -> dict[str, Submission]:
    """Read the last submission of each stage."""
    try:
        stages: dict[str, Submission] = json.loads((run_dir / SLURM / JOBS).read_text())
    except FileNotFoundError:
        return {}
    return stages


def record_submission(run_dir: Path, stage: str, jobs: list[str], script: Path) -> None:
    """Record the submission of a stage."""
    write_json(run_dir / SLURM / JOBS, {**read_submissions(run_dir), stage: {"jobs": jobs, "script": script.name}})


def query_jobs(ids: Collection[str]) -> dict[str, Queued]:
    """Query jobs by id. Slurm keeps jobs for some minutes after their end (MinJobAge).

    Empty if Slurm is not available.
    """
    if not ids or shutil.which("squeue") is None:
        return {}
    # Query all jobs of the user, because a single unknown id makes squeue fail.
    command = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%L"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split("|", 3) for line in done.stdout.splitlines()]
    # ID_TASK or ID_[TASKS] of a job array: the array has the state of its most relevant task.
    found = [Queued(row[0].partition("_")[0], *row[1:]) for row in rows if len(row) == 4]
    return {queued.job: queued for queued in sorted(found, key=_priority) if queued.job in ids}


def _priority(queued: Queued) -> int:
    """Order tasks: running, then pending, then failed, then completed."""
    if queued.state in ENDED:
        return 0 if queued.state == "COMPLETED" else 1
    return 2 if queued.state == "PENDING" else 3


def filter_active(ids: Collection[str]) -> list[str]:
    """Return the jobs that are pending or running."""
    known = query_jobs(ids)
    return [job for job in ids if job in known and known[job].state not in ENDED]
