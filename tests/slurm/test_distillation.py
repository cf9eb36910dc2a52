"""The real stages on a real Slurm: a tiny distillation that it interrupts comes to what it is without."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from launch.queue import submitted
from recipes.artifact import read_state
from recipes.runtime.metrics_file import read_metrics
from tests.helpers import tiny
from tests.slurm.conftest import SITE, Chain, slurm

# More than are done in the 30 s within which Slurm warns: one took 0.1 s on two cores.
STEPS = 250
# One thread a process, so that sums come out in the same order.
SETTINGS = (
    *tiny.DEPTH,
    *(f"distill.{name}={value}" for name, value in {"max_steps": STEPS, "save_every_n_steps": 1000}.items()),
    *("distill.val_every_n_steps=100", "distill.controls=[]", "cluster.threads_per_rank=1"),
)


def losses(run_dir: Path) -> list[dict[str, float]]:
    (folder,) = run_dir.glob("distill-*")
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: line[key] for key in ("step", "loss", "val_loss") if key in line} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run up to distillation, on this machine and without Slurm."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    tiny.launch(run_dir, *SETTINGS, "--until", "distill")
    return run_dir


def test_a_distillation_that_meets_its_time_limit_ends_with_the_same_losses(
    cluster: Path, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = tiny.copy_run(unbroken, tmp_path / "run")
    # Further options overrule those that the config is checked for: with these Slurm warns within 30 s.
    site = {**SITE, "cluster.slurm.sbatch": "['--time=0:01:00','--signal=B:USR1@40']", "cluster.slurm.secrets": "[]"}
    submission = tiny.command(run_dir, *SETTINGS, *(f"{key}={value}" for key, value in site.items()))
    done = subprocess.run(submission, env=tiny.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("complete, skipped") == 4
    chain = Chain(run_dir)
    jobs = {stage: entry["jobs"][0] for stage, entry in submitted(run_dir).items()}
    # All but the first attempt may take their time, so that there are two however slow the machine is.
    for job in set(jobs.values()) - {jobs["distill"]}:
        slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    chain.wait(lambda: "requeued" in chain.log("distill-"), 120)
    slurm("scontrol", "update", f"JobId={jobs['distill']}", "TimeLimit=30")
    chain.wait_until_ended(600)
    log = chain.log("distill-")
    (folder,) = run_dir.glob("distill-*")
    assert (folder / "manifest.json").exists(), chain.told()
    (step,) = re.findall(r"paused at step (\d+): requeued", log)
    assert 0 < int(step) < STEPS
    assert f"checkpoints/step={step}\n" in log
    assert read_state(folder) == {"state": "done", "step": STEPS}
    assert losses(run_dir) == losses(unbroken)
    # The stages after it ran as jobs too.
    assert set(tiny.report(run_dir)["models"]) == {"teacher", "pruned", "student"}
    assert {stage["status"] for stage in tiny.report(run_dir)["stages"].values()} == {"complete"}
