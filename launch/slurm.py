"""Run the incomplete stages as Slurm jobs, one per stage, each of which waits for the stages whose output it reads.

With one job per stage, dependencies, failures, resumption and resubmission correspond to the stage table, and each job
requests the GPUs of its stage.
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
from launch.filesystem import find_unshared
from launch.jobs import Job, build_command, format_jobs, list_jobs
from launch.pipeline import ignored_changes, up_to
from launch.planning.output import summarize
from launch.planning.plan import make_plan
from launch.queue import filter_active, read_submissions, record_submission
from launch.verification import refuse_damaged
from prune_distill.config.rules.slurm import warnings
from prune_distill.errors import ConfigError
from prune_distill.pipeline import lock
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig

# Required commands, all from one package; jobs start their stages with srun.
COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")

# Patterns of sbatch's errors (slurm/src/common/slurm_errno.c), and how to fix them.
REJECTIONS = (
    ("policy", "the site limits your jobs: request fewer nodes, less time or fewer jobs"),
    ("account", "set cluster.slurm.account to one of your accounts (sacctmgr show associations user=$USER)"),
    ("qos", "set cluster.slurm.qos to one of yours (sacctmgr show associations user=$USER)"),
    ("partition", "set cluster.slurm.partition to one that sinfo lists"),
    ("time limit", "lower cluster.time_limit to the limit in sinfo -o '%P %l'"),
    (
        "[Nn]ode (configuration|count)|More processors|GRES|gres|[Mm]emory",
        "set cluster.nodes, cluster.devices_per_node and, of cluster.slurm, gpu_request, gpu_type, cpus_per_gpu, mem "
        "to values that sinfo -o '%P %D %c %m %G' shows",
    ),
    ("controller|timed out", "check it with scontrol ping, and run the same command again"),
    ("option", "fix cluster.slurm.sbatch"),
)


def run(
    cfg: RunConfig,
    until: str | None = None,
    stages: Sequence[Stage] = STAGES,
    dry_run: bool = False,
    command: str = "",
) -> None:
    """Submit the jobs of a run, or print them. `cfg` has absolute paths (see `launch.jobs.make_paths_absolute`).

    Raises:
        ConfigError: Slurm is not installed, the run folder is on a local disk, a stage does not fit the GPU, jobs of
            this run have not ended, an input is missing, or sbatch rejected a job.
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
        print("\n".join(format_jobs(jobs)))
        for fault in find_unshared(cfg):
            print(f"warning: {fault}", file=sys.stderr)
        return
    with lock.hold_lock(run_dir):
        _refuse_running(run_dir)
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
            f"cluster=slurm: {', '.join(absent)} not found; run this on a login node, or add dry_run=true "
            "to see the jobs"
        )
    faults += find_unshared(cfg)
    if not absent:
        faults += partition.faults(cfg)
    if faults:
        raise ConfigError(faults)


def _submit(run_dir: Path, jobs: Sequence[Job]) -> None:
    """Submit all jobs or none: if sbatch rejects one, the jobs before it are canceled."""
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
                ids.append(_sbatch(build_command(job, inputs, ids)))
                taken.append(ids[-1])
            last[job.name] = ids[-1]
            record_submission(run_dir, job.name, ids, job.script)
            print(f"{job.name}: {'job' if len(ids) == 1 else 'jobs'} {', '.join(ids)}, log in {job.located.folder}")
    except BaseException as error:
        outcome = _cancel(taken)
        for folder in {job.located.folder for job in jobs}:
            with contextlib.suppress(OSError):  # missing or not empty
                folder.rmdir()
        if isinstance(error, subprocess.CalledProcessError):
            reason = " ".join((error.stderr or "").split()) or f"exit code {error.returncode}"
            raise ConfigError(f"sbatch rejected {job.script} ({reason}){outcome}; {_fix(reason)}") from error
        if outcome:
            print(outcome.removeprefix("; "), file=sys.stderr)
        raise


def _fix(reason: str) -> str:
    """Return how to fix an error of sbatch."""
    return next((fix for pattern, fix in REJECTIONS if re.search(pattern, reason)), "check its #SBATCH lines")


def _sbatch(command: list[str]) -> str:
    """Run sbatch, and return the id of the job."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # "ID" or, with several clusters, "ID;CLUSTER".
    return done.stdout.strip().partition(";")[0]


def _cancel(ids: list[str]) -> str:
    """Cancel jobs. Returns a clause on the outcome for the error message."""
    if not ids:
        return ""
    try:
        subprocess.run(["scancel", *ids], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"; jobs {', '.join(ids)}, submitted before it, could not be canceled: scancel {' '.join(ids)}"
    return f"; jobs {', '.join(ids)}, submitted before it, are canceled"


def _refuse_running(run_dir: Path) -> None:
    ids = [job for entry in read_submissions(run_dir).values() for job in entry["jobs"]]
    alive = filter_active(ids)
    if alive:
        raise ConfigError(
            f"run_dir={run_dir}: unfinished jobs {', '.join(alive)}; wait for them, cancel them (scancel "
            f"{' '.join(alive)}), or set another run_dir"
        )
