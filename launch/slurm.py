"""A run as a chain of Slurm jobs: one a stage that is not complete, each waiting for those whose output it reads.

A job a stage rather than a job for several: what waits for what, what failed, what goes on and what is submitted again
by hand are then the same as in the stage table, and each job asks for the GPUs that its stage uses.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import partition, records
from launch.filesystem import unshared
from launch.jobs import Job, list_jobs, shown, submission
from launch.pipeline import ignored_changes, up_to
from launch.planning.output import summarize
from launch.planning.plan import make_plan
from launch.queue import active, record, submitted
from launch.verification import refuse_damaged
from prune_distill.config.rules.slurm import warnings
from prune_distill.errors import ConfigError
from prune_distill.pipeline import lock
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig

# One package brings them all; srun is what the jobs start their stages with.
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")

# What sbatch says (slurm/src/common/slurm_errno.c), and what to set.
REFUSALS = (
    ("policy", "the site limits what you may queue: ask for fewer nodes, less time or fewer jobs"),
    ("account", "set cluster.slurm.account to one of yours (sacctmgr show associations user=$USER)"),
    ("qos", "set cluster.slurm.qos to one that you may use (sacctmgr show associations user=$USER)"),
    ("partition", "set cluster.slurm.partition to one that sinfo lists"),
    ("time limit", "set cluster.time_limit to what sinfo -o '%P %l' shows"),
    (
        "[Nn]ode (configuration|count)|More processors|GRES|gres|[Mm]emory",
        "set cluster.nodes, cluster.devices_per_node and, of cluster.slurm, gpu_request, gpu_type, cpus_per_gpu, mem "
        "to what sinfo -o '%P %D %c %m %G' shows",
    ),
    ("controller|timed out", "scontrol ping shows whether it is up; the same command tries again"),
    ("option", "fix cluster.slurm.sbatch"),
)


def run(
    cfg: RunConfig,
    until: str | None = None,
    stages: Sequence[Stage] = STAGES,
    dry_run: bool = False,
    command: str = "",
) -> None:
    """Submits what a run still needs, or prints it. `cfg` has absolute paths (see `launch.jobs.make_paths_absolute`).

    Raises:
        ConfigError: no Slurm here, a run folder on this machine's own disk, a stage that cannot fit the GPU, jobs of
            this run that have not ended, a missing input, or what sbatch refused.
    """
    run_dir = Path(cfg.run_dir)
    if not dry_run:
        _check(cfg)
    located = up_to(locate(cfg, stages), until)
    if not dry_run:
        refuse_damaged(located, run_dir)
    jobs = list_jobs(cfg, located)
    plan = make_plan(cfg)
    plan.refuse_impossible([job.name for job in jobs])
    for warning in warnings(cfg) if jobs else []:
        print(f"warning: {warning}", file=sys.stderr)
    if dry_run:
        print("\n".join(shown(jobs)))
        for fault in unshared(cfg):
            print(f"warning: {fault}", file=sys.stderr)
        return
    with lock.held(run_dir):
        _refuse_twice(run_dir)
        records.write_records(cfg, plan, command)
        for line in summarize(plan) if jobs else []:
            print(line)
        for stage in located:
            if stage.complete:
                print(f"{stage.stage.name}: complete, skipped{ignored_changes(stage)}")
        _submit(run_dir, jobs)
    print(f"python -m launch.status {shlex.quote(str(run_dir))}")


def _check(cfg: RunConfig) -> None:
    faults = []
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        faults.append(
            f"cluster=slurm, but {', '.join(absent)} cannot be found; start this on a login node, or add dry_run=true "
            "to see what would be submitted"
        )
    faults += unshared(cfg)
    if not absent:
        faults += partition.faults(cfg)
    if faults:
        raise ConfigError(faults)


def _submit(run_dir: Path, jobs: Sequence[Job]) -> None:
    """Submits all of them, or none: those that were taken before one is refused are cancelled."""
    last: dict[str, str] = {}
    taken: list[str] = []
    try:
        for job in jobs:
            job.script.parent.mkdir(parents=True, exist_ok=True)
            job.located.folder.mkdir(parents=True, exist_ok=True)
            job.script.write_text(job.text)
            inputs = [last[name] for name in job.after]
            ids: list[str] = []
            for _ in range(job.links):
                ids.append(_sbatch(submission(job, inputs, ids)))
                taken.append(ids[-1])
            last[job.name] = ids[-1]
            record(run_dir, job.name, ids, job.script)
            print(f"{job.name}: {'job' if len(ids) == 1 else 'jobs'} {', '.join(ids)}, log in {job.located.folder}")
    except BaseException as error:
        outcome = _cancel(taken)
        for folder in {job.located.folder for job in jobs}:
            with contextlib.suppress(OSError):  # not there, or not empty
                folder.rmdir()
        if isinstance(error, subprocess.CalledProcessError):
            reason = " ".join((error.stderr or "").split()) or f"exit code {error.returncode}"
            raise ConfigError(f"sbatch refused {job.script} ({reason}){outcome}; {_fix(reason)}") from error
        if outcome:
            print(outcome.removeprefix("; "), file=sys.stderr)
        raise


def _fix(reason: str) -> str:
    """What to do about a refusal of sbatch's."""
    return next((fix for pattern, fix in REFUSALS if re.search(pattern, reason)), "its #SBATCH lines are what it asks")


def _sbatch(command: list[str]) -> str:
    """The id of the job that a command submits."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # "ID" or, with several clusters, "ID;CLUSTER".
    return done.stdout.strip().partition(";")[0]


def _cancel(ids: list[str]) -> str:
    """Cancels jobs; a clause on what became of them."""
    if not ids:
        return ""
    try:
        subprocess.run(["scancel", *ids], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"; jobs {', '.join(ids)} were taken before and could not be cancelled: scancel {' '.join(ids)}"
    return f"; jobs {', '.join(ids)}, which were taken before, are cancelled"


def _refuse_twice(run_dir: Path) -> None:
    ids = [job for entry in submitted(run_dir).values() for job in entry["jobs"]]
    alive = active(ids)
    if alive:
        raise ConfigError(
            f"run_dir={run_dir} has jobs that have not ended: {', '.join(alive)}; wait for them, cancel them (scancel "
            f"{' '.join(alive)}), or set another run_dir"
        )
