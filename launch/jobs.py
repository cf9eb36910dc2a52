"""The Slurm jobs of a run: a script for each incomplete stage, and the command that submits it."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jinja2

from launch import torchrun
from launch.environment import ROOT, environment, nodes_and_ranks, stage_arguments
from prune_distill.config.data_files import is_on_hub
from prune_distill.config.input_files import HUB_FOLDERS, HUB_SETTINGS, absolute
from prune_distill.config.values import named_models
from prune_distill.pipeline.artifact import Located
from prune_distill.pipeline.names import LOG, RESOLVED, SLURM
from prune_distill.pipeline.stage import Output
from prune_distill.schema import RunConfig, SlurmConfig

# Variables that jobs inherit, in addition to those that the user names. Jobs do not depend on other variables of the
# shell that submits them.
EXPORTED = ("HOME", "USER", "PATH", "LANG", *HUB_FOLDERS, *HUB_SETTINGS)


@dataclass(frozen=True)
class Job:
    """The job or chain of jobs of one stage.

    Attributes:
        script: `RUN_DIR/slurm/NN-stage.sbatch`, with the content `text`.
        after: stages whose jobs must succeed first.
        links: number of jobs in the chain, each of which waits for the previous ones; above 1 without requeue.
    """

    located: Located
    script: Path
    text: str
    after: tuple[str, ...]
    links: int

    @property
    def name(self) -> str:
        return self.located.stage.name


def make_paths_absolute(cfg: RunConfig) -> RunConfig:
    """Return a copy with absolute paths, which are valid on every node."""
    cfg = copy.deepcopy(cfg)
    cfg.run_dir = absolute(cfg.run_dir)
    for model in named_models(cfg).values():
        if model.hf_path is not None and Path(absolute(model.hf_path)).exists():
            model.hf_path = absolute(model.hf_path)
    for key in ("train", "validation"):
        files = getattr(cfg.data, key)
        if files is not None:
            setattr(cfg.data, key, _make_absolute(files))
    for source in (cfg.data.sources or {}).values():
        source.files = _make_absolute(source.files)
    if cfg.distill.on_policy is not None and cfg.distill.on_policy.prompts is not None:
        cfg.distill.on_policy.prompts = _make_absolute(cfg.distill.on_policy.prompts)
    if cfg.evaluate.task_folder is not None:
        cfg.evaluate.task_folder = absolute(cfg.evaluate.task_folder)
    if cfg.benchmark.serve_python is not None:
        cfg.benchmark.serve_python = absolute(cfg.benchmark.serve_python)
    if Path(absolute(cfg.data.source_tokenizer)).exists():
        cfg.data.source_tokenizer = absolute(cfg.data.source_tokenizer)
    return cfg


def _make_absolute(files: Sequence[str]) -> list[str]:
    return [file if is_on_hub(file) else absolute(file) for file in files]


def list_jobs(cfg: RunConfig, located: Sequence[Located]) -> list[Job]:
    """List the jobs of the incomplete stages in the order of submission."""
    incomplete = {stage.stage.name for stage in located if not stage.complete}
    gates: set[str] = set()
    jobs = []
    for number, stage in enumerate(located, 1):
        if stage.complete:
            continue
        script = Path(cfg.run_dir) / SLURM / f"{number:02d}-{stage.stage.name}.sbatch"
        sources = stage.stage.inputs(stage.cfg).values()
        after = sorted(({source.stage for source in sources if isinstance(source, Output)} & incomplete) | gates)
        if stage.stage.gate:
            gates.add(stage.stage.name)
        chained = stage.stage.trains and not _slurm(cfg).requeue
        links = 1 + _slurm(cfg).max_restarts if chained else 1
        jobs.append(Job(stage, script, _script(stage, script, chained), tuple(after), links))
    return jobs


def _script(located: Located, script: Path, chained: bool) -> str:
    """Render the sbatch script of a stage; `chained`: one of several jobs, each of which resumes the previous one."""
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
    settings: dict[str, object] = {
        "stage": located.stage.name,
        "script": script,
        "chained": chained,
        "job_name": f"{cfg.name}/{located.stage.name}",
        "log": str(located.folder / LOG),
        "nodes": nodes,
        "ranks": ranks,
        "ranks_per_node": ranks_per_node,
        "tasks": located.stage.tasks(cfg),
        "time_limit": cfg.cluster.time_limit,
        "threads": cfg.cluster.threads_per_rank,
        "cores": _cores(located, ranks_per_node),
        "exported": [*EXPORTED, *slurm.secrets],
        "folder": located.folder,
        "config_hash": located.config_hash,
        "environment": environment(located),
        "code": slurm.container_workdir if in_container else ROOT,
        "python": "python" if in_container else sys.executable,
        "torchrun": torchrun.module(cfg.cluster),
        "arguments": stage_arguments(located, run_dir / RESOLVED),
    }
    settings |= {
        key: getattr(slurm, key)
        for key in (
            "partition",
            "account",
            "qos",
            "mem",
            "sbatch",
            "setup",
            "container_image",
            "requeue",
            "max_restarts",
        )
    }
    settings |= {
        "gpu_request": slurm.gpu_request.value,
        "gpus": ":".join([*([] if slurm.gpu_type is None else [slurm.gpu_type]), str(ranks_per_node)]),
        "warn_seconds": slurm.warn_seconds,
        "container_mounts": [f"{run_dir}:{run_dir}", *slurm.container_mounts],
    }
    return templates.get_template("slurm.sbatch.j2").render(settings)


def _cores(located: Located, ranks_per_node: int) -> int | None:
    """Return the cores per node that a stage requests; None for the site's default."""
    cfg, each = located.cfg, _slurm(located.cfg).cpus_per_gpu
    if each is None:
        return None
    # Data preparation has one rank, which uses all its cores.
    if located.stage.name == "prepare_data":
        return cfg.data.num_workers or each * cfg.cluster.devices_per_node
    return each * ranks_per_node


def build_command(job: Job, inputs: Sequence[str], before: Sequence[str]) -> list[str]:
    """Build the command that submits a job, or the next link of its chain.

    Ids are Slurm's, or placeholders in a dry run.

    Args:
        job: the job.
        inputs: ids of the jobs that must succeed first.
        before: ids of all earlier links of the chain, which must end first, with any exit code. If only the previous
            link were given and canceled, the next one could start while an earlier one runs.
    """
    conditions = {"afterok": inputs, "afterany": before}
    dependencies = [":".join([condition, *ids]) for condition, ids in conditions.items() if ids]
    command = ["sbatch", "--parsable", *([f"--dependency={','.join(dependencies)}"] if dependencies else [])]
    return [*command, str(job.script), *([str(len(before) + 1), str(job.links)] if job.links > 1 else [])]


def format_jobs(jobs: Sequence[Job]) -> list[str]:
    """Return each script with the commands that would submit it."""
    if not jobs:
        return ["every stage is complete; nothing would be submitted"]
    lines = []
    for job in jobs:
        inputs, links = [f"<{name}>" for name in job.after], [f"<{job.name} {link + 1}>" for link in range(job.links)]
        lines += [f"# {shlex.join(build_command(job, inputs, links[:before]))}" for before in range(job.links)]
        lines.append(job.text)
    return lines


def _slurm(cfg: RunConfig) -> SlurmConfig:
    return cast(SlurmConfig, cfg.cluster.slurm)
