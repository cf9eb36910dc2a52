"""Distillation in FP8 through the real command line.

On a CPU the arithmetic is emulated (tests/unit/nemo/test_cpu_fp8.py). Block scales need larger sizes than a tiny run's.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from prune_distill.pipeline.metrics_file import read_metrics
from tests.helpers import tiny, tolerance

# Half teacher, half data, so that both losses are recorded.
BF16 = (*tiny.DEPTH, "distill.precision=bf16", "distill.kd.kd_weight=0.5", "distill.kd.lm_weight=0.5")
TEACHER = (*BF16, "distill.teacher_fp8=true")
STUDENT = (*BF16, "distill.fp8=hybrid")
# Shares of a loss. e4m3 keeps 4 bits: products are off by 2 % (test_cpu_fp8.py), at random, so that the cross-entropy
# of thousands of tokens hardly moves: by 2e-4 at most in six steps; the divergence, which is small itself, by 1.5 %.
LM_LOSS, KD_LOSS = 2e-3, 0.1


@pytest.fixture(scope="module")
def run_dir(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, distilled without FP8, with a teacher in FP8, and with a student in FP8, which is exported too."""
    folder = tiny.copy_run(finished, tmp_path_factory.mktemp("fp8") / "run")
    for settings in (BF16, TEACHER):
        tiny.launch(folder, *settings, "--until", "distill")
    tiny.launch(folder, *STUDENT, "--until", "verify")
    return folder


def folder_of(run_dir: Path, settings: tuple[str, ...]) -> Path:
    return tiny.stages(run_dir, *settings)["distill"].folder


def parts(run_dir: Path, settings: tuple[str, ...], part: str) -> list[float]:
    """A part of the loss at every step."""
    return [line[part] for line in read_metrics(folder_of(run_dir, settings) / "metrics.jsonl") if part in line]


def test_a_student_in_fp8_learns_and_differs_within_bounds(run_dir: Path) -> None:
    exact, rounded = (parts(run_dir, settings, "lm_loss") for settings in (BF16, STUDENT))
    assert all(map(math.isfinite, rounded))
    assert rounded[-1] < rounded[0]
    assert 0 < abs(rounded[0] - exact[0]) < LM_LOSS * exact[0]  # the same weights
    assert abs(rounded[-1] - exact[-1]) < LM_LOSS * exact[-1]
    first, last = (parts(run_dir, STUDENT, "kd_loss")[step] for step in (0, -1))
    assert last < first


def test_a_teacher_in_fp8_changes_the_teacher_alone(run_dir: Path) -> None:
    # Before any step the students are equal, so that their own loss is.
    assert parts(run_dir, TEACHER, "lm_loss")[0] == parts(run_dir, BF16, "lm_loss")[0]
    exact, rounded = (parts(run_dir, settings, "kd_loss") for settings in (BF16, TEACHER))
    assert all(0 < abs(one - other) < KD_LOSS * one for one, other in zip(exact, rounded, strict=True))


def test_fp8_resumes_exactly(run_dir: Path, tmp_path: Path) -> None:
    copied = tiny.copy_run(run_dir, tmp_path / "run")
    folder, original = folder_of(copied, STUDENT), folder_of(run_dir, STUDENT)
    shutil.copytree(original, folder)
    # The state after a kill at the checkpoint of step 4.
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step=4"]
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "nemo")
    tiny.launch(copied, *STUDENT, "--until", "distill")
    assert f"training from {folder}/checkpoints/step=4" in (folder / "log.txt").read_text()
    assert tiny.losses(folder) == pytest.approx(tiny.losses(original), rel=0, abs=tolerance.RESUMED)


def test_cached_logits_of_a_teacher_in_fp8(run_dir: Path) -> None:
    top_k = 64
    bf16, live = (*BF16, f"distill.kd.top_k={top_k}"), (*TEACHER, f"distill.kd.top_k={top_k}")
    cached = (*TEACHER, "distill.teacher_logits=cached", f"distill.cached_logits_top_k={top_k}")
    losses = []
    for settings in (bf16, live, cached):
        tiny.launch(run_dir, *settings, "--until", "distill")
        losses.append(parts(run_dir, settings, "kd_loss")[0])
    # The cache's logits are rounded to bf16, and its log-probabilities to fp16: 1.2e-4 measured. A teacher in bf16
    # differs by 1.8e-3.
    assert losses[2] == pytest.approx(losses[1], rel=5e-4)
    assert losses[0] != pytest.approx(losses[1], rel=5e-4)


def test_tensor_parallel_ranks_with_recompute(run_dir: Path, tmp_path: Path) -> None:
    copied = tiny.copy_run(run_dir, tmp_path / "run")
    both = (*STUDENT, "distill.teacher_fp8=true")
    layout = ("cluster.devices_per_node=2", "distill.parallel.tensor_model_parallel_size=2", "distill.recompute=full")
    tiny.launch(copied, *both, *layout, "--until", "distill")
    one_rank = parts(run_dir, STUDENT, "lm_loss")
    # Each rank's shards have scales of their own.
    assert parts(copied, both, "lm_loss") == pytest.approx(one_rank, rel=LM_LOSS)
