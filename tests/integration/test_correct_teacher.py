"""Teacher correction and distillation from cached logits, through the real command line on a tiny run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from prune_distill.pipeline.artifact import read_manifest, update_record
from tests.helpers import corruption, tiny, tolerance

# Lowers the held-out loss by 0.145 nats, much more than the order of sums.
CORRECTION = (
    "distill.teacher_correction={max_steps: 24, seq_length: 128, global_batch_size: 8, micro_batch_size: 4, lr: 1e-3, "
    "min_lr: 1e-4, warmup_steps: 4, precision: fp32, save_every_n_steps: 10, val_every_n_steps: 12, val_batches: 4, "
    "log_every_n_steps: 1, num_workers: 0}"
)
SWAP_AT = 3
SWAPPED = (*tiny.DEPTH, CORRECTION, f"distill.swap_teacher_at_step={SWAP_AT}")


@pytest.fixture(scope="module")
def corrected_run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny run with a corrected teacher."""
    run_dir = tiny.copy_run(finished, tmp_path_factory.mktemp("corrected_run") / "run")
    tiny.launch(run_dir, *tiny.DEPTH, CORRECTION)
    return run_dir


def test_the_gain_is_measured_and_reported(corrected_run: Path) -> None:
    folder = tiny.stages(corrected_run, *tiny.DEPTH, CORRECTION)["correct_teacher"].folder
    metrics = (read_manifest(folder) or {})["metrics"]
    losses = tiny.validations(folder)
    assert list(losses) == [0, 12, 24]
    assert (metrics["val_loss_before"], metrics["val_loss_after"]) == (losses[0], losses[24])
    assert metrics["val_loss_gain"] == losses[0] - losses[24] > 0.1
    report = tiny.report(corrected_run)
    assert report["correction"] == metrics
    models = report["models"]
    assert models["corrected_teacher"]["params"] == models["teacher"]["params"]
    # Measured by transformers, on other batches of the same documents.
    assert models["corrected_teacher"]["val_loss"] < models["teacher"]["val_loss"]
    assert "Teacher, corrected" in (corrected_run / "report" / "index.html").read_text()


def test_a_damaged_correction_is_rejected(corrected_run: Path, tmp_path: Path) -> None:
    stages = tiny.stages(corrected_run, *tiny.DEPTH, CORRECTION)
    tried, silent = corruption.find_silent_uses(stages, tmp_path / "aside", ["correct_teacher"])
    assert silent == []
    assert tried > 60


def test_a_corrected_teacher_changes_the_loss_from_the_first_step(finished: Path, corrected_run: Path) -> None:
    original, other = (
        tiny.losses(tiny.stages(run_dir, *tiny.DEPTH, *more)["distill"].folder)
        for run_dir, more in ((finished, ()), (corrected_run, (CORRECTION,)))
    )
    assert abs(original[0] - other[0]) > 1e-3


def test_a_swap_takes_effect_at_its_step_and_survives_a_pause(
    finished: Path, corrected_run: Path, tmp_path: Path
) -> None:
    original = tiny.losses(tiny.stages(finished, *tiny.DEPTH)["distill"].folder)
    tiny.launch(corrected_run, *SWAPPED, "--until", "distill")
    swapped = tiny.losses(tiny.stages(corrected_run, *SWAPPED)["distill"].folder)
    # The same losses before the swap, another one right after it.
    assert swapped[:SWAP_AT] == pytest.approx(original[:SWAP_AT], rel=0, abs=tolerance.RESUMED)
    assert abs(swapped[SWAP_AT] - original[SWAP_AT]) > 1e-3

    run_dir = tmp_path / "run"
    subprocess.run(["cp", "-a", corrected_run, run_dir], check=True)
    folder = tiny.stages(run_dir, *SWAPPED)["distill"].folder
    # The state after a kill at the checkpoint of step 4, after the swap.
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step=4"]
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "nemo")
    tiny.launch(run_dir, *SWAPPED, "--until", "distill")
    log = (folder / "log.txt").read_text()
    assert f"training from {folder}/checkpoints/step=4" in log
    assert "step 5: teacher weights replaced" in log
    assert tiny.losses(folder) == pytest.approx(swapped, rel=0, abs=tolerance.RESUMED)


def test_cached_logits_give_the_losses_of_the_live_teacher(finished: Path, tmp_path: Path) -> None:
    """With the same top k, read by a data loader worker, and on two ranks, although one rank made them."""
    top_k = 16
    live = (*tiny.DEPTH, f"distill.kd.top_k={top_k}")
    stored = (
        *tiny.DEPTH,
        "distill.teacher_logits=cached",
        f"distill.cached_logits_top_k={top_k}",
        "distill.num_workers=1",
    )
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, *live, "--until", "distill")
    tiny.launch(run_dir, *stored, "--until", "distill")
    live_stage, cached_stage = (tiny.stages(run_dir, *settings)["distill"] for settings in (live, stored))
    # fp16 moves a log-probability by 5e-4 nats in the mean, to both sides.
    assert tiny.losses(cached_stage.folder) == pytest.approx(tiny.losses(live_stage.folder), rel=0, abs=1e-4)
    assert "teacher" not in cached_stage.inputs
    cached_logits = cached_stage.inputs["cached_logits"]
    for layout in (
        ("distill.parallel.tensor_model_parallel_size=2",),
        ("distill.parallel.pipeline_model_parallel_size=2", "distill.num_workers=0"),
        ("distill.parallel.context_parallel_size=2",),
    ):
        one_rank = tiny.losses(cached_stage.folder)
        aside = cached_stage.folder.with_name("one_rank")
        cached_stage.folder.rename(aside)
        tiny.launch(run_dir, *stored, "cluster.devices_per_node=2", *layout, "--until", "distill")
        assert tiny.losses(cached_stage.folder) == pytest.approx(one_rank, abs=tolerance.LOSS), layout
        shutil.rmtree(cached_stage.folder)
        aside.rename(cached_stage.folder)

    # Cached logits of other data are rejected before the first step.
    index = json.loads((cached_logits / "cached_logits.json").read_text())
    (cached_logits / "cached_logits.json").write_text(json.dumps({**index, "packing": "00000000"}))
    update_record(cached_logits, ["cached_logits.json"])
    shutil.rmtree(cached_stage.folder)
    refused = tiny.launch(run_dir, *stored, "--until", "distill", check=False)
    assert refused.returncode == 2, refused.stderr
    assert f"were made for other data or settings: packing {'0' * 8}, not {index['packing']}" in refused.stderr
    assert not list(cached_stage.folder.glob("checkpoints/*"))
