"""Losses and gradients of masked data are the same with any micro batch size (layouts: see test_layouts.py)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launch import local
from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import locate
from tests.helpers import tiny, tolerance
from tests.helpers.data_runs import write_masks
from tests.helpers.masked_trainings import KINDS

STEPS = 3
# All terms of the loss. The checkpoint of step 2 has the optimizer's moments.
SETTINGS = (
    *(f"distill.max_steps={STEPS}", "distill.save_every_n_steps=2", "distill.val_every_n_steps=1"),
    *("distill.kd.temperature=2", "distill.kd.kd_weight=0.7", "distill.kd.lm_weight=0.3"),
    *("distill.kd.intermediate_pairs=[{student:2,teacher:4}]", "distill.kd.intermediate_weight=0.5"),
)


@pytest.fixture(scope="module")
def trained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds a training of each kind and micro batch size."""
    run_dir = tiny.copy_run(finished, tmp_path_factory.mktemp("masked") / "run")
    cfg = compose(tiny.overrides(run_dir, *tiny.DEPTH, *SETTINGS))
    save_resolved(cfg, run_dir / "resolved.yaml")
    stage = locate(cfg)["distill"]
    write_masks(stage.inputs["data"])
    command = local.command(stage, run_dir / "resolved.yaml")
    command = ["tests.helpers.masked_trainings" if word == "recipes" else word for word in command]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return stage.folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_size_changes_neither_losses_nor_gradients(trained: Path, kind: str) -> None:
    one, four = trained / kind / "1", trained / kind / "4"
    assert tiny.losses(four, STEPS) == pytest.approx(tiny.losses(one, STEPS), rel=0, abs=tolerance.LOSS)
    assert tiny.validations(four) == pytest.approx(tiny.validations(one), rel=0, abs=tolerance.LOSS)
    assert tiny.max_gradient_difference(four, one, step=2) < tolerance.GRADIENTS
