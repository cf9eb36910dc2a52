"""A run as a chain of Slurm jobs: one a stage that is not complete, each waiting for those whose output it reads.

A job a stage rather than a job for several: what waits for what, what failed, what goes on and what is submitted again
by hand are then the same as in the stage table, and each job asks for the GPUs that its stage uses.
"""

from __future__ import annotations

import copy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2

from conf.errors import ConfigError
from conf.load import save_resolved
from conf.schema import RunConfig, SlurmConfig
from conf.slurm_rules import absolute
from launch import lock
from launch.disk import disk_warning
from launch.environment import ROOT, environment, nodes_and_ranks, stage_arguments
from launch.filesystem import unshared
from launch.pipeline import RESOLVED, up_to
from launch.queue import active, record, submitted
from recipes.artifact import Located, locate
from recipes.stages import STAGES, Output, Stage

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
# Besides what the user names. A job so depends on what its script says, not on the shell that it was submitted from.
EXPORTED = ("HOME", "USER", "PATH", "LANG")


@dataclass(frozen=True)
class Job:
    """What is submitted for one stage.

    Attributes:
        script: `RUN_DIR/slurm/NN-stage.sbatch`, of content `text`.
        after: the stages whose jobs have to succeed first.
        links: how often it is submitted, each waiting for the one before; above 1 where jobs cannot be requeued.
    """

    located: Located
    script: Path
    text: str
    after: tuple[str, ...]
    links: int

    @property
    def name(self) -> str:
        return self.located.stage.name


def run(cfg: RunConfig, until: str | None = None, stages: Sequence[Stage] = STAGES, dry_run: bool = False) -> None:
    """Submits what a run still needs, or prints it. `cfg` has absolute paths (see `everywhere`).

    Raises:
        ConfigError: no Slurm here, a run folder on this machine's own disk, jobs of this run that have not ended, a
            missing input, or what sbatch refused.
    """
    run_dir = Path(cfg.run_dir)
    _check(cfg, dry_run)
    located = up_to(locate(cfg, stages), until)
    jobs = plan(cfg, located)
    if dry_run:
        print("\n".join(_shown(jobs)))
        return
    with lock.held(run_dir):
        _refuse_twice(run_dir)
        save_resolved(cfg, run_dir / RESOLVED)
        warning = disk_warning(cfg, run_dir)
        if warning and jobs:
            print(f"warning: {warning}")
        for stage in located:
            if stage.complete:
                print(f"{stage.stage.name}: complete, skipped")
        _submit(run_dir, jobs)
    print(f"python -m launch.status {shlex.quote(str(run_dir))}")


def everywhere(cfg: RunConfig) -> RunConfig:
    """A copy whose paths mean the same on every node: absolute."""
    cfg = copy.deepcopy(cfg)
    cfg.run_dir = absolute(cfg.run_dir)
    path = cfg.model.hf_path
    if path is not None and Path(absolute(path)).exists():
        cfg.model.hf_path = absolute(path)
    for key in ("train", "validation"):
        files = getattr(cfg.data, key)
        if files is not None:
            setattr(cfg.data, key, [absolute(file) for file in files])
    return cfg


def _check(cfg: RunConfig, dry_run: bool) -> None:
    faults = []
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent and not dry_run:
        faults.append(
            f"cluster=slurm, but {', '.join(absent)} cannot be found; start this on a login node, or add dry_run=true "
            "to see what would be submitted"
        )
    faults += unshared(cfg)
    if faults:
        raise ConfigError(faults)


def plan(cfg: RunConfig, located: Sequence[Located]) -> list[Job]:
    """The jobs of the stages that are not complete, in the order in which they are submitted."""
    to_do = {stage.stage.name for stage in located if not stage.complete}
    jobs = []
    for number, stage in enumerate(located, 1):
        if stage.complete:
            continue
        script = Path(cfg.run_dir) / "slurm" / f"{number:02d}-{stage.stage.name}.sbatch"
        sources = stage.stage.inputs(stage.cfg).values()
        after = sorted({source.stage for source in sources if isinstance(source, Output)} & to_do)
        chained = stage.stage.trains and not _slurm(cfg).requeue
        links = 1 + _slurm(cfg).max_restarts if chained else 1
        jobs.append(Job(stage, script, _script(stage, script), tuple(after), links))
    return jobs


def _script(located: Located, script: Path) -> str:
    """What sbatch is given for a stage."""
    cfg, ranks = located.cfg, located.stage.ranks(located.cfg)
    slurm, run_dir = _slurm(located.cfg), Path(located.cfg.run_dir)
    nodes, ranks_per_node = nodes_and_ranks(located)
    in_container = slurm.container_image is not None
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["quote"] = lambda value: shlex.quote(str(value))
    settings: dict[str, Any] = {
        "stage": located.stage.name,
        "script": script,
        "job_name": f"{cfg.name}/{located.stage.name}",
        "log": str(located.folder / "log.txt"),
        "nodes": nodes,
        "ranks": ranks,
        "ranks_per_node": ranks_per_node,
        "time_limit": cfg.cluster.time_limit,
        "threads": cfg.cluster.threads_per_rank,
        "exported": [*EXPORTED, *slurm.secrets],
        "folder": located.folder,
        "config_hash": located.config_hash,
        "environment": environment(located),
        "code": slurm.container_workdir if in_container else ROOT,
        "python": "python" if in_container else sys.executable,
        "arguments": stage_arguments(located, run_dir / RESOLVED),
    }
    settings |= {
        key: getattr(slurm, key)
        for key in ("partition", "account", "qos", "sbatch", "setup", "container_image", "requeue", "max_restarts")
    }
    settings |= {
        "gpu_request": slurm.gpu_request.value,
        "warn_seconds": slurm.warn_seconds,
        "container_mounts": [f"{run_dir}:{run_dir}", *slurm.container_mounts],
    }
    return templates.get_template("slurm.sbatch.j2").render(settings)


def _submission(job: Job, link: int, dependencies: Sequence[str]) -> list[str]:
    """The command that submits a job; `dependencies` are job ids, or what stands for them where there are none yet."""
    command = ["sbatch", "--parsable"]
    if dependencies:
        command.append(f"--dependency=afterok:{':'.join(dependencies)}")
    return [*command, str(job.script), *([str(link), str(job.links)] if job.links > 1 else [])]


def _submit(run_dir: Path, jobs: Sequence[Job]) -> None:
    """Submits all of them, or none: those that were taken before one is refused are cancelled."""
    last: dict[str, str] = {}
    taken: list[str] = []
    try:
        for job in jobs:
            job.script.parent.mkdir(parents=True, exist_ok=True)
            job.located.folder.mkdir(parents=True, exist_ok=True)
            job.script.write_text(job.text)
            dependencies = [last[name] for name in job.after]
            ids: list[str] = []
            for link in range(1, job.links + 1):
                ids.append(_sbatch(_submission(job, link, [*dependencies, *ids[-1:]])))
                taken.append(ids[-1])
            last[job.name] = ids[-1]
            record(run_dir, job.name, ids, job.script)
            print(f"{job.name}: {'job' if len(ids) == 1 else 'jobs'} {', '.join(ids)}, log in {job.located.folder}")
    except BaseException as error:
        outcome = _cancel(taken)
        if isinstance(error, subprocess.CalledProcessError):
            reason = " ".join((error.stderr or "").split()) or f"exit code {error.returncode}"
            raise ConfigError(f"sbatch refused {error.cmd[-1]} ({reason}){outcome}") from error
        if outcome:
            print(outcome.removeprefix("; "), file=sys.stderr)
        raise


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


def _shown(jobs: Sequence[Job]) -> list[str]:
    """Each script with the command that would submit it."""
    if not jobs:
        return ["every stage is complete; nothing would be submitted"]
    shown = []
    for job in jobs:
        for link in range(1, job.links + 1):
            before = [*(f"<{name}>" for name in job.after), *([f"<{job.name} {link - 1}>"] if link > 1 else [])]
            shown.append(f"# {shlex.join(_submission(job, link, before))}")
        shown += [job.text]
    return shown


def _slurm(cfg: RunConfig) -> SlurmConfig:
    return cast(SlurmConfig, cfg.cluster.slurm)
