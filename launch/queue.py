"""What Slurm says of a run's jobs. `RUN_DIR/slurm/jobs.json` holds which they are; no accounting database is asked."""

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

# States of man squeue from which a job does not come back by itself.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}


@dataclass(frozen=True)
class Queued:
    """A job that Slurm still knows.

    Attributes:
        state: as in `man squeue`, such as PENDING, RUNNING, FAILED, CANCELLED.
        reason: why it is not running, such as Dependency.
        time_left: of its time limit, as Slurm writes it.
    """

    job: str
    state: str
    reason: str
    time_left: str


class Submission(TypedDict):
    """What was submitted last for a stage: the ids of its jobs in order, and the name of their script."""

    jobs: list[str]
    script: str


def submitted(run_dir: Path) -> dict[str, Submission]:
    """What was submitted last, by stage."""
    try:
        stages: dict[str, Submission] = json.loads((run_dir / SLURM / JOBS).read_text())
    except FileNotFoundError:
        return {}
    return stages


def record(run_dir: Path, stage: str, jobs: list[str], script: Path) -> None:
    """Notes what was submitted for a stage."""
    write_json(run_dir / SLURM / JOBS, {**submitted(run_dir), stage: {"jobs": jobs, "script": script.name}})


def ask(ids: Collection[str]) -> dict[str, Queued]:
    """What Slurm knows of jobs, by id: all that have not ended, and others for some minutes (MinJobAge).

    Empty where Slurm cannot be asked.
    """
    if not ids or shutil.which("squeue") is None:
        return {}
    # All of the user's, as an id that Slurm has forgotten makes it refuse the whole question.
    command = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%r|%L"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split("|", 3) for line in done.stdout.splitlines()]
    # ID_TASK, or ID_[TASKS], of a job array: what matters most of its tasks speaks for it.
    found = [Queued(row[0].partition("_")[0], *row[1:]) for row in rows if len(row) == 4]
    return {queued.job: queued for queued in sorted(found, key=_weight) if queued.job in ids}


def _weight(queued: Queued) -> int:
    """Running tasks before those that wait, and these before failed and completed ones."""
    if queued.state in ENDED:
        return 0 if queued.state == "COMPLETED" else 1
    return 2 if queued.state == "PENDING" else 3


def active(ids: Collection[str]) -> list[str]:
    """Those of the jobs that wait or run."""
    known = ask(ids)
    return [job for job in ids if job in known and known[job].state not in ENDED]
