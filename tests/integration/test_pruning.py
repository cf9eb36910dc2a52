"""Minitron pruning through the real command lines: width, depth, and over two pipeline ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_distill.pipeline.artifact import read_manifest, update_record
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


def metrics(run_dir: Path, *targets: str) -> dict[str, dict[str, Any]]:
    """Of importance and pruning."""
    located = tiny.stages(run_dir, *targets)
    manifests = {name: read_manifest(located[name].folder) for name in ("importance", "prune")}
    return {name: manifest["metrics"] for name, manifest in manifests.items() if manifest is not None}


def test_a_width_pruned_student_gives_the_same_logits_in_transformers(finished: Path, tmp_path: Path) -> None:
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


def test_two_pipeline_ranks_prune_like_one(finished: Path, tmp_path: Path) -> None:
    two = ("cluster.devices_per_node=2", "prune.pipeline_model_parallel_size=2")
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    for folder in [*run_dir.glob("importance-*"), *run_dir.glob("prune-*")]:
        (folder / "manifest.json").unlink()
    tiny.launch(run_dir, *tiny.DEPTH, *two, "--until", "prune")
    single, parallel = (metrics(finished, *tiny.DEPTH), metrics(run_dir, *tiny.DEPTH))
    assert parallel["prune"] == single["prune"]
    assert abs(parallel["importance"]["calibration_loss"] - single["importance"]["calibration_loss"]) < tolerance.LOSS


# Every axis alone, all together, named layers with and without widths.
AXES = (
    {"ffn_hidden_size": 128},
    {"hidden_size": 64},
    {"num_attention_heads": 2, "num_query_groups": 2},
    {"num_attention_heads": 2, "num_query_groups": 1},
    {"num_layers": 3},
    {"hidden_size": 64, "ffn_hidden_size": 192, "num_layers": 3, "num_attention_heads": 2, "num_query_groups": 1},
    {"hidden_size": 64, "drop_layers": [2, 3]},
    {"drop_layers": [1, 2]},
)


@pytest.mark.parametrize("stages", [1, 2])
def test_pruning_equals_modelopt_called_directly(finished: Path, tmp_path: Path, stages: int) -> None:
    located = tiny.stages(finished, *tiny.DEPTH)
    inputs = located["hf_to_nemo"].folder / "nemo", located["importance"].folder
    start = [sys.executable, "-W", "ignore"]
    if stages > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={stages}"]
    command = [*start, "-m", "tests.helpers.prune_directly", *inputs, tmp_path, *map(json.dumps, AXES)]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == stages * len(AXES)
    for line in lines:
        assert line["differ"] == []
        assert line["kept"] == line["wanted"]
        assert line["tensors"] > 0


def test_documents_of_another_tokenizer_are_rejected(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    located = tiny.stages(run_dir, *tiny.DEPTH)
    (located["importance"].folder / "manifest.json").unlink()
    described = located["prepare_data"].folder / "data.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps({**content, "vocab_size": content["vocab_size"] + 1}))
    update_record(located["prepare_data"].folder, ["data.json"])
    done = tiny.launch(run_dir, *tiny.DEPTH, "--until", "importance", check=False)
    assert done.returncode == 2
    assert "prepared with another tokenizer: entries of the vocabulary 523, but 522 in the model" in done.stderr


def test_a_run_that_prunes_all_axes(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    tiny.launch(run_dir, "prune.num_layers=3", *tiny.WIDTH, *HEADS)
    checks = tiny.report(run_dir)["checks"]
    assert checks["export_max_abs_logit_diff"] < tolerance.LOGITS
    student = tiny.report(run_dir)["models"]["student"]
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    assert [student[size] for size in sizes] == [3, 64, 128, 2, 1]


def test_a_block_of_neighbors_over_uneven_stages(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    block = ("prune.num_layers=2", "prune.layer_selection=block")
    tiny.launch(run_dir, *block, "--until", "prune")
    located = tiny.stages(run_dir, *block)["prune"]
    found = json.loads((located.folder / "blocks.json").read_text())["loss_without_block_from_layer"]
    assert set(found) == {"1", "2", "3"}
    start = int(min(found, key=lambda layer: found[layer]))
    alone = read_manifest(located.folder)
    assert alone is not None
    assert alone["metrics"]["kept_layers"] == [layer for layer in (1, 2, 3, 4) if layer not in (start, start + 1)]
    (located.folder / "manifest.json").unlink()
    # Three stages of 4 layers: 1, 1 and 2.
    three = ("cluster.devices_per_node=3", "prune.pipeline_model_parallel_size=3", "distill.global_batch_size=3")
    tiny.launch(run_dir, *block, *three, "--until", "prune")
    spread = read_manifest(tiny.stages(run_dir, *block, *three)["prune"].folder)
    assert spread is not None
    assert spread["metrics"] == alone["metrics"]


def test_named_layers_are_dropped_also_under_tensor_parallelism(finished: Path, tmp_path: Path) -> None:
    two = ("cluster.devices_per_node=2", "prune.tensor_model_parallel_size=2")
    alone, single = prune(finished, tmp_path / "one", "prune.drop_layers=[2,3]")
    halves, metrics = prune(finished, tmp_path / "two", "prune.drop_layers=[2,3]", *two)
    assert metrics["kept_layers"] == single["kept_layers"] == [1, 4]
    assert metrics["params"] == single["params"]
    teacher = finished / tiny.report(finished)["models"]["teacher"]["hf_path"]
    exported = tmp_path / "hf"
    tiny.convert("nemo_to_hf", "--checkpoint", alone, "--hf-model", teacher, "--out", exported, "--dtype", "keep")
    assert "all equal" in tiny.convert("verify", exported, halves).stdout
