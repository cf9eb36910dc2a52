"""The whole tiny job on CUDA, and a distillation that is killed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny, tolerance
from tests.helpers.killed_run import kill_and_resume

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: run `make test-gpu` on a machine with one", allow_module_level=True)


def test_the_run_is_complete_and_was_on_the_gpu(finished: Path) -> None:
    report = tiny.report(finished)
    assert report["backend"] == "gpu"
    assert all(stage["status"] == "complete" for stage in report["stages"].values())
    losses = {name: model["val_loss"] for name, model in report["models"].items()}
    assert set(losses) == {"teacher", "pruned", "student", "ce"}
    assert max(losses.values()) < math.log(tiny.SHAPE["vocab_size"])
    assert losses["student"] < losses["pruned"]


def test_the_imported_teacher_and_the_exported_student_equal_nemos(finished: Path) -> None:
    """NeMo's and transformers' logits of the same weights."""
    checks = tiny.report(finished)["checks"]
    assert 0 <= checks["import_max_abs_logit_diff"] < tolerance.LOGITS
    assert 0 <= checks["export_max_abs_logit_diff"] < tolerance.LOGITS


def test_a_killed_distillation_resumes_with_identical_losses(finished: Path, tmp_path: Path) -> None:
    """To the last digit, as all kernels add in a fixed order (`tolerance.DETERMINISTIC`)."""
    undisturbed = tiny.losses(tiny.stages(finished, *tiny.DEPTH)["distill"].folder)
    resumed = kill_and_resume(tiny.copy_run(finished, tmp_path / "run"), *tiny.DEPTH)
    assert resumed.step > 0
    assert resumed.losses == undisturbed
