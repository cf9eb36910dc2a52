"""Quantization-aware distillation through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prune_distill.pipeline.artifact import read_state
from tests.helpers import tiny, tolerance

SETTINGS = (
    *(*tiny.DEPTH, "distill.quantize=int8", "quantize.formats=[int8]", "distill.controls=[]"),
    *("quantize.calibration_samples=4", "quantize.calibration_seq_length=64", "evaluate.verify_tokens=0"),
)
TWO_RANKS = "cluster.devices_per_node=2"
# A value whose last digit differs may be rounded to the next step of its format, 1/127 of a token's largest value.
# Largest difference of logits seen: 3.9e-4.
LOGITS = 2e-3
# Losses of layouts, for the same reason; seen: 2.1e-5.
LOSS = 10 * tolerance.LOSS
LAYOUTS = {
    "dp2": (TWO_RANKS,),
    "tp2_sp": (TWO_RANKS, "distill.parallel.tensor_model_parallel_size=2"),
    "pp2": (TWO_RANKS, "distill.parallel.pipeline_model_parallel_size=2"),
    "cp2": (TWO_RANKS, "distill.parallel.context_parallel_size=2"),
}


@pytest.fixture(scope="module")
def learned(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tiny.copy_run(finished, tmp_path_factory.mktemp("learned") / "run")
    tiny.launch(run_dir, *SETTINGS, "--until", "quantize.int8")
    return run_dir


def distill_folder(run_dir: Path) -> Path:
    return tiny.stages(run_dir, *SETTINGS)["distill"].folder


def test_the_written_model_has_the_logits_of_training(learned: Path) -> None:
    folder = tiny.stages(learned, *SETTINGS)["quantize.int8"].folder / "student_int8"
    arguments = [str(distill_folder(learned) / "nemo"), str(folder), "int8"]
    command = [sys.executable, "-m", "tests.helpers.fake_quantized", *arguments]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["quantized"] < LOGITS
    assert found["plain"] > 5 * LOGITS


def test_training_resumes_exactly(learned: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    folder, pipe = distill_folder(run_dir), subprocess.PIPE
    folder.mkdir()
    command = tiny.command(run_dir, *SETTINGS, "distill.save_every_n_steps=100", "--until", "distill")
    launcher = subprocess.Popen(command, env=tiny.environment(), stdout=pipe, stderr=pipe, text=True)
    tiny.wait_for("log.txt", folder, launcher)
    (folder / "stop").touch()
    _, message = launcher.communicate(timeout=600)
    assert read_state(folder) == {"state": "paused", "step": 1}, message
    tiny.launch(run_dir, *SETTINGS, "--until", "distill")
    assert f"training from {folder}/checkpoints/step=1" in (folder / "log.txt").read_text()
    unbroken = distill_folder(learned)
    assert tiny.losses(folder) == pytest.approx(tiny.losses(unbroken), rel=0, abs=tolerance.RESUMED)
    assert tiny.validations(folder) == pytest.approx(tiny.validations(unbroken), rel=0, abs=tolerance.RESUMED)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_losses_of_one_rank(learned: Path, finished: Path, tmp_path: Path, layout: str) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, *SETTINGS, *LAYOUTS[layout], "--until", "distill")
    found, expected = distill_folder(run_dir), distill_folder(learned)
    assert tiny.losses(found) == pytest.approx(tiny.losses(expected), abs=LOSS)
    assert tiny.validations(found) == pytest.approx(tiny.validations(expected), abs=LOSS)
