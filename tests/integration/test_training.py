"""Bad losses, phases, checkpoints, and resuming at any step."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.stored import blocks
from convert.torch_dist import TorchDistReader
from launch import local
from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import Located, locate, read_manifest, update_record
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.schema.schedules import learning_rate
from tests.helpers import tiny, tolerance

EXPLODED = r"the loss is [\d.e+]+, more than 10 times the median of the last 12, [\d.e-]+"
TWO_RANKS = ("cluster.devices_per_node=2",)


def located(run_dir: Path, *overrides: str) -> Located:
    """Locate the distillation of a tiny run, and write the run's config."""
    cfg = compose(tiny.overrides(run_dir, *tiny.DEPTH, *overrides))
    save_resolved(cfg, run_dir / "resolved.yaml")
    return locate(cfg)["distill"]


def train(stage: Located, runner: str = "recipes", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a single distillation."""
    command = local.command(stage, stage.folder.parent / "resolved.yaml")
    command = [runner if word == "recipes" else word for word in command]
    return subprocess.run(
        command, env={**tiny.environment(), **environment}, capture_output=True, text=True, timeout=600
    )


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a training, without times."""
    clock = ("tokens_per_second", "seconds_left", "mfu")
    return [
        {key: value for key, value in line.items() if key not in clock}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def documents_in(message: str) -> list[int]:
    found = re.search(r"/prepare_data-\w+: ([\d, ]+) \(", message)
    assert found, message
    return [int(number) for number in found[1].split(", ")]


@pytest.mark.parametrize(
    ("ranks", "spoiled", "fault"),
    [
        ((), "4 nan", "non-finite gradients"),
        (TWO_RANKS, "4 nan", "non-finite gradients"),
        ((), "13 1e3", EXPLODED),
        (TWO_RANKS, "13 1e3", EXPLODED),
    ],
    ids=["nan", "nan_two_ranks", "explodes", "explodes_two_ranks"],
)
def test_a_bad_loss_stops_training_before_a_save(
    finished: Path, tmp_path: Path, ranks: tuple[str, ...], spoiled: str, fault: str
) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    step = int(spoiled.split()[0])
    settings = (*ranks, "distill.max_steps=15", "distill.keep_checkpoints=9", "distill.save_every_n_steps=1")
    settings += ("distill.max_loss_ratio=10",)
    stage = located(run_dir, *settings, "distill.async_save=false")
    failed = train(stage, "tests.helpers.spoiled_training", SPOILED=spoiled)
    assert failed.returncode == (1 if ranks else 2), failed.stderr[-4000:]  # torchrun's own, or the stage's
    assert re.search(rf"error: step {step}: {fault}", failed.stderr), failed.stderr[-4000:]
    assert f"distill.skip_steps='[[{step},{step}]]'" in failed.stderr
    assert f"resumes from step={step - 1}" in failed.stderr
    documents = documents_in(failed.stderr)
    assert len(documents) == len(set(documents)) > 0
    assert max(int(path.name[5:]) for path in stage.folder.glob("checkpoints/step=*")) == step - 1
    assert [line["step"] for line in curve(stage.folder) if "loss" in line] == list(range(1, step))
    if "nan" in spoiled:
        return

    # The same batch again, without what spoiled it, and passed over: the steps before it are not touched.
    stage = located(run_dir, *settings, f"distill.skip_steps=[[{step},{step}]]")
    done = train(stage, "tests.helpers.spoiled_training", SPOILED=spoiled)
    assert done.returncode == 0, done.stderr[-4000:]
    manifest = read_manifest(stage.folder)
    assert manifest is not None
    assert manifest["metrics"]["skipped_steps"] == [step]
    assert [line["step"] for line in curve(stage.folder) if "loss" in line] == list(range(1, 16))


PHASES = (
    "distill.max_steps=6",
    "distill.phases=[{max_steps:3,seq_length:64,global_batch_size:2},"
    "{tokens:3000,seq_length:128,global_batch_size:8,micro_batch_size:2,lr:5e-4,min_lr:1e-4}]",
    "distill.save_every_n_steps=1",
    "distill.keep_checkpoints=9",
)


def test_phases_count_tokens_and_resume_at_any_step(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    stage = located(run_dir, *PHASES)
    done = train(stage)
    assert done.returncode == 0, done.stderr[-4000:]
    unbroken = curve(stage.folder)
    unbroken_state = (stage.folder / "nemo/weights/common.pt").read_bytes()
    steps = [line for line in unbroken if "loss" in line]
    # 3 steps of 2 x 64 tokens, then 3 (3000 / 1024, rounded up) of 8 x 128.
    assert [line["tokens"] for line in steps] == [128, 256, 384, 384 + 1024, 384 + 2048, 384 + 3072]
    assert steps[-1]["lr"] == pytest.approx(1e-4)
    manifest = read_manifest(stage.folder)
    assert manifest is not None
    assert manifest["metrics"]["tokens"] == 384 + 3072

    # At the border, and within the second phase.
    for step in (3, 4):
        shutil.rmtree(stage.folder / "nemo")
        (stage.folder / "manifest.json").unlink()
        for later in range(step + 1, 6):
            shutil.rmtree(stage.folder / "checkpoints" / f"step={later}")
        again = train(stage)
        assert again.returncode == 0, again.stderr[-4000:]
        assert f"step={step}" in again.stderr
        assert_same(curve(stage.folder), unbroken, tolerance.RESUMED)
        # The final model does not show that its training was interrupted.
        assert (stage.folder / "nemo/weights/common.pt").read_bytes() == unbroken_state

    two = located(tiny.copy_run(finished, tmp_path / "two"), *PHASES, *TWO_RANKS)
    done = train(two)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(curve(two.folder), unbroken, tolerance.LOSS)


def assert_same(lines: list[dict[str, Any]], expected: list[dict[str, Any]], accuracy: float) -> None:
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=0, abs=accuracy)


def test_the_schedule_and_the_weight_decay_are_those_of_the_config(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    # 20 x the sum of the learning rates, 4.5e-3, takes 9 % off what decays; Adam itself moves norms by less than 2 %.
    settings = ("distill.schedule=wsd", "distill.decay_steps=2", "distill.weight_decay=20.0")
    stage = located(run_dir, *settings, "distill.decay_embeddings=false")
    done = train(stage)
    assert done.returncode == 0, done.stderr[-4000:]
    rates = [line["lr"] for line in curve(stage.folder) if "lr" in line]
    # As they are set after each step, for the next one.
    assert rates == pytest.approx([learning_rate(stage.cfg.distill, step) for step in range(1, 7)])
    assert rates[:4] == [1e-3] * 4
    assert rates[5] == pytest.approx(2e-5)
    shrunk = {
        key: norm(stage.folder / "nemo", key) / norm(stage.inputs["student"], key)
        for key in (
            "module.embedding.word_embeddings.weight",
            "module.decoder.final_layernorm.weight",
            "module.decoder.layers.mlp.linear_fc2.weight",
        )
    }
    embedding, norms, linear = shrunk.values()
    assert embedding == pytest.approx(1, abs=0.02), shrunk
    assert norms == pytest.approx(1, abs=0.02), shrunk
    assert linear < 0.95, shrunk


def norm(checkpoint: Path, key: str) -> float:
    """Of a float32 tensor in a NeMo checkpoint."""
    stored = TorchDistReader(checkpoint / "weights").tensor(key)
    assert stored.dtype == "F32"
    values = np.frombuffer(b"".join(bytes(block) for block in blocks(stored)), np.float32)
    return float(np.linalg.norm(values))


def test_another_models_checkpoint_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    stage = located(run_dir)
    shutil.copytree(stage.inputs["teacher"], stage.folder / "checkpoints" / "step=2")
    failed = train(stage)
    assert failed.returncode == 2, failed.stderr[-4000:]
    assert "contains another model (num_layers 4) than the one to train (num_layers 2)" in failed.stderr


def test_a_checkpoint_of_another_batch_size_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    """It would continue at another position in the data: upstream counts batches of the current size."""
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    (checkpoint,) = tiny.stages(finished, *tiny.DEPTH)["distill"].folder.glob("checkpoints/step=*")
    stage = located(run_dir, "distill.global_batch_size=8")
    shutil.copytree(checkpoint, stage.folder / "checkpoints" / checkpoint.name)
    failed = train(stage)
    assert failed.returncode == 2, failed.stderr[-4000:]
    assert "global batch size [[6, 128, 4]], and this run has [[6, 128, 8]]" in failed.stderr


def test_different_tokenizers_are_rejected(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    stage = located(run_dir)
    described = stage.inputs["student"] / "context" / "tokenizer" / "tokenizer.json"
    content = json.loads(described.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    described.write_text(json.dumps(content))
    update_record(stage.inputs["student"].parent, ["nemo/context/tokenizer/tokenizer.json"])
    failed = train(stage)
    assert failed.returncode == 2, failed.stderr[-4000:]
    assert re.search(r"error: the tokenizers in .* differ in the ids 5 ", failed.stderr)


@pytest.mark.parametrize(
    "layout",
    [
        (),
        (*TWO_RANKS, "distill.parallel.tensor_model_parallel_size=2"),
        (*TWO_RANKS, "distill.parallel.pipeline_model_parallel_size=2"),
    ],
    ids=["one_rank", "tp2", "pp2"],
)
def test_a_teacher_no_better_than_chance_is_rejected(finished: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    stage = located(run_dir, *layout)
    # Another tokenizer's ids, in effect: any of them, anywhere.
    validation = stage.inputs["data"] / "validation.bin"
    size = validation.stat().st_size // 2
    tokens = np.random.default_rng(1).integers(0, tiny.SHAPE["vocab_size"], size, dtype=np.uint16)
    validation.write_bytes(tokens.tobytes())
    update_record(stage.inputs["data"], ["validation.bin"])
    failed = train(stage)
    assert failed.returncode == (1 if layout else 2), failed.stderr[-4000:]
    found = re.search(r"error: the teacher's loss .* is ([\d.]+) nats per token, no better than chance", failed.stderr)
    assert found, failed.stderr[-4000:]
    assert float(found[1]) > math.log(tiny.SHAPE["vocab_size"])


def test_a_training_killed_ten_times_gives_the_same_curve(finished: Path, tmp_path: Path) -> None:
    settings = ("distill.max_steps=20", "distill.save_every_n_steps=2", "distill.val_every_n_steps=7")
    stage = located(tiny.copy_run(finished, tmp_path / "unbroken"), *settings)
    done = train(stage)
    assert done.returncode == 0, done.stderr[-4000:]

    killed = located(tiny.copy_run(finished, tmp_path / "killed"), *settings)
    seed = time.time_ns() % 10**6
    command = [
        sys.executable,
        "-m",
        "tests.helpers.killed_training",
        "--config",
        str(tmp_path / "killed/resolved.yaml"),
    ]
    command += ["--seed", str(seed), "--times", "10"]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=900)
    summary = f"seed {seed}\n{done.stdout}"
    print(summary)
    assert done.returncode == 0, summary + done.stderr[-4000:]
    assert done.stdout.count("killed after step") == 10, summary
    assert_same(curve(killed.folder), curve(stage.folder), tolerance.RESUMED)
    kept = sorted(path.name for path in killed.folder.glob("checkpoints/*"))
    assert kept == sorted(path.name for path in stage.folder.glob("checkpoints/*")), summary
    manifest = read_manifest(killed.folder)
    assert manifest is not None
    assert manifest["metrics"]["best_val_loss"] == min(tiny.validations(stage.folder).values())
