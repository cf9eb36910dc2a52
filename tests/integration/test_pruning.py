"""Minitron pruning through the real command lines: width, depth, and over two pipeline ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.artifact import read_manifest
from tests.helpers import tiny, tolerance

HEADS = ("prune.num_attention_heads=2", "prune.num_query_groups=1")


def prune(finished: Path, run_dir: Path, *targets: str) -> tuple[Path, dict[str, Any]]:
    """The pruned checkpoint, and the stage's metrics."""
    tiny.copy_run(finished, run_dir)
    tiny.launch(run_dir, *targets, "--until", "prune")
    folder = tiny.stages(run_dir, *targets)["prune"].folder
    manifest = read_manifest(folder)
    assert manifest is not None
    return folder / "nemo", manifest["metrics"]


def test_width_pruned_student_is_the_same_in_transformers(finished: Path, tmp_path: Path) -> None:
    checkpoint, metrics = prune(finished, tmp_path / "run", *tiny.WIDTH, *HEADS)
    teacher = finished / tiny.report(finished)["models"]["teacher"]["hf_path"]
    exported = tmp_path / "hf"
    tiny.convert("nemo_to_hf", "--checkpoint", checkpoint, "--hf-model", teacher, "--out", exported, "--dtype", "keep")
    config = json.loads((exported / "config.json").read_text())
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert [config[size] for size in sizes] == [4, 64, 128, 2, 1]
    assert config["head_dim"] == tiny.SHAPE["kv_channels"]
    assert metrics["kept_layers"] == [1, 2, 3, 4]
    assert metrics["params"] < metrics["params_before"]
    done = tiny.convert("verify", exported, checkpoint)
    assert "all equal" in done.stdout
    assert float(done.stdout.partition("max_abs_diff ")[2].partition(",")[0]) < tolerance.LOGITS


def test_two_pipeline_ranks_prune_as_one(finished: Path, tmp_path: Path) -> None:
    two = ("cluster.devices_per_node=2", "prune.pipeline_model_parallel_size=2")
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    for folder in run_dir.glob("prune-*"):
        (folder / "manifest.json").unlink()
    tiny.launch(run_dir, *tiny.DEPTH, *two, "--until", "prune")
    of_one, of_two = (read_manifest(tiny.stages(folder, *tiny.DEPTH)["prune"].folder) for folder in (finished, run_dir))
    assert of_one is not None
    assert of_two is not None
    for key in ("params_before", "params", "kept_layers"):
        assert of_two["metrics"][key] == of_one["metrics"][key]
    assert abs(of_two["metrics"]["calibration_loss"] - of_one["metrics"]["calibration_loss"]) < tolerance.LOSS


def test_named_layers_are_dropped(finished: Path, tmp_path: Path) -> None:
    _, metrics = prune(finished, tmp_path / "run", "prune.drop_layers=[2,3]")
    assert metrics["kept_layers"] == [1, 4]
