"""The real stages on a real Slurm: the demo down to its report, and a distillation that Slurm interrupts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch.queue import read_submissions
from launch.status import status
from prune_distill.config.load import load_resolved
from prune_distill.pipeline.artifact import read_state
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.stages import select_stages
from tests.helpers import tiny
from tests.slurm.conftest import PATIENCE, SITE, WARNED_EARLY, Chain, slurm

# Of 0.06 to 0.1 s each on two cores.
STEPS = 250
# One thread a process, so that sums come out in the same order.
SETTINGS = (
    *tiny.DEPTH,
    *(f"distill.{name}={value}" for name, value in {"max_steps": STEPS, "save_every_n_steps": 1000}.items()),
    *("distill.val_every_n_steps=100", "cluster.threads_per_rank=1"),
)


def losses(run_dir: Path) -> list[dict[str, float]]:
    (folder,) = run_dir.glob("distill-*")
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: line[key] for key in ("step", "loss", "val_loss") if key in line} for line in lines]


def submit(run_dir: Path, site: dict[str, object], *more: str) -> Chain:
    """Submit a tiny run of the real stages."""
    values = {**SITE, "cluster.slurm.secrets": "[]", **site}
    command = tiny.command(run_dir, *SETTINGS, *(f"{key}={value}" for key, value in values.items()), *more)
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return Chain(run_dir)


@pytest.fixture(scope="module")
def reference_run(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with sufficient time for each job."""
    chain = submit(tmp_path_factory.mktemp("reference_run") / "run", {"cluster.time_limit": "0:30:00"})
    chain.wait_until_ended(600)
    assert chain.complete() >= {"prune", "distill"}, chain.report()
    return chain.run_dir


def test_every_stage_of_the_demo_as_a_job_down_to_the_report(reference_run: Path) -> None:
    stages = status(reference_run)
    names = [stage.name for stage in select_stages(load_resolved(reference_run / "resolved.yaml"))]
    assert [stage.stage for stage in stages] == names
    assert {stage.state for stage in stages} == {"complete"}, Chain(reference_run).report()
    # One job per stage, started once.
    assert [len(stage.jobs) for stage in stages] == [1] * len(names)
    assert [log.read_text().count("--- 20") for log in reference_run.glob("*/log.txt")] == [1] * len(names)
    report = tiny.report(reference_run)
    assert set(report["models"]) == {"teacher", "pruned", "student", "ce"}
    assert {stage["status"] for stage in report["stages"].values()} == {"complete"}
    assert report["models"]["student"]["val_loss"] < report["models"]["pruned"]["val_loss"]
    assert (reference_run / "report" / "index.html").exists()


def test_a_distillation_interrupted_by_its_time_limit_gives_the_same_losses(
    reference_run: Path, tmp_path: Path
) -> None:
    run_dir = tiny.copy_run(reference_run, tmp_path / "run")
    # The first attempt waits for most of the time in which Slurm may warn: a fast machine would end before.
    site = {"cluster.slurm.sbatch": WARNED_EARLY, "cluster.slurm.setup": "['[ $restarts -gt 0 ] || sleep 35']"}
    chain = submit(run_dir, site, "--until", "distill")
    assert list(read_submissions(run_dir)) == ["distill"]
    # All but the first attempt may take their time, so that there are two however slow the machine is.
    chain.wait(lambda: "requeued" in chain.log("distill-"))
    slurm("scontrol", "update", f"JobId={chain.jobs('distill')[0]}", "TimeLimit=30")
    chain.wait_until_ended(600)
    log = chain.log("distill-")
    (folder,) = run_dir.glob("distill-*")
    assert (folder / "manifest.json").exists(), chain.report()
    (step,) = re.findall(r"paused at step (\d+): requeued", log)
    assert 0 < int(step) < STEPS
    assert f"checkpoints/step={step}\n" in log
    assert read_state(folder) == {"state": "done", "step": STEPS}
    assert losses(run_dir) == losses(reference_run)
