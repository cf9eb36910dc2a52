"""Distillation through torchrun: a published recipe's settings, killed ranks and full disks."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers import tiny, tolerance
from tests.helpers.launches import wait_for_exit
from tests.integration.conftest import SmallDisk

TWO_RANKS = "cluster.devices_per_node=2"
DP2 = (TWO_RANKS,)


def test_settings_of_a_published_recipe_in_bf16(finished: Path, tmp_path: Path) -> None:
    """The settings of the 8B recipes (bf16, tensor parallel) with smaller sizes and fewer steps."""
    recipe = ("distill=minitron", TWO_RANKS, "distill.parallel.tensor_model_parallel_size=2", "distill.lr=1e-3")
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, *tiny.DEPTH, *recipe, "--until", "distill")
    folder = tiny.stages(run_dir, *tiny.DEPTH, *recipe)["distill"].folder
    fp32 = tiny.stages(finished, *tiny.DEPTH)["distill"].folder
    first, reference = tiny.losses(folder)[0], tiny.losses(fp32)[0]
    assert all(math.isfinite(loss) for loss in tiny.losses(folder))
    # Before any step the models are the same, rounded to bf16's 8 bits: logits of size 5 are off by up to 0.02, which
    # the KL divergence sees squared beside itself.
    assert first == pytest.approx(reference, rel=0.1)
    assert tiny.losses(folder)[-1] < first


@pytest.mark.usefixtures("real_start")
def test_a_killed_rank_stops_the_other_and_training_resumes(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    folder = tiny.stages(run_dir, *tiny.DEPTH)["distill"].folder
    launcher = subprocess.Popen(
        tiny.command(run_dir, *tiny.DEPTH, *DP2, "--until", "distill"),
        env=tiny.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    tiny.wait_for_checkpoint(folder, launcher)
    ranks = _ranks(run_dir)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = launcher.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert wait_for_exit(ranks[0])
    assert launcher.returncode == 1
    assert "stage distill failed" in err
    assert "log.txt" in err
    tiny.launch(run_dir, *tiny.DEPTH, "--until", "distill")  # resumes on one rank
    one_rank = tiny.stages(finished, *tiny.DEPTH)["distill"].folder
    assert tiny.losses(folder) == pytest.approx(tiny.losses(one_rank), abs=tolerance.LOSS)


def test_training_resumes_after_a_full_disk(finished: Path, small_disk: SmallDisk) -> None:
    done = tiny.stages(finished, *tiny.DEPTH)["distill"].folder
    (checkpoint,) = done.glob("checkpoints/step=*")
    disk = small_disk("1g")
    run_dir = tiny.copy_run(finished, disk / "run")
    folder = tiny.stages(run_dir, *tiny.DEPTH)["distill"].folder
    # Room for the first checkpoint, not for the second.
    small_disk(str(shutil.disk_usage(disk).used + 3 * size_of(checkpoint) // 2))
    failed = tiny.launch(run_dir, *tiny.DEPTH, "--until", "distill", check=False)
    assert failed.returncode == 2, failed.stderr
    assert "no space left" in failed.stderr
    assert "free some space and run again" in failed.stderr
    assert [path.name for path in folder.glob("checkpoints/step=*")] == ["step=2"]
    small_disk("1g")
    tiny.launch(run_dir, *tiny.DEPTH, "--until", "distill")
    assert "training from " + str(folder / "checkpoints" / "step=2") in (folder / "log.txt").read_text()
    assert tiny.losses(folder) == pytest.approx(tiny.losses(done), rel=0, abs=tolerance.RESUMED)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


def _ranks(run_dir: Path) -> list[int]:
    """Return the pids of torchrun's workers by rank, found by the path of their config."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(v.split("=", 1) for v in (process / "environ").read_text().split("\0") if "=" in v)
            command = (process / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "RANK" in variables and {"recipes", "distill"} <= set(command) and str(run_dir / "resolved.yaml") in command:
            found[int(variables["RANK"])] = int(process.name)
    return [found[rank] for rank in sorted(found)]
