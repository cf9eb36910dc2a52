"""The whole job through `launch.run`: from the demo's text to the report, repeated, killed and resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prune_distill.pipeline import lock
from prune_distill.pipeline.metrics_file import read_metrics
from tests.helpers import tiny, tolerance
from tests.helpers.killed_run import kill_and_resume


def test_the_format_of_the_report(finished: Path) -> None:
    report = tiny.report(finished)
    assert report["experiment"] == "demo"
    assert report["backend"] == tolerance.BACKEND
    assert set(report["models"]) == {"teacher", "pruned", "student", "ce"}
    teacher, student = report["models"]["teacher"], report["models"]["student"]
    assert (teacher["num_layers"], student["num_layers"]) == (4, 2)
    assert student["params"] < teacher["params"]
    for model in report["models"].values():
        assert 0 < model["val_loss"] < math.log(tiny.SHAPE["vocab_size"])
        assert (finished / model["hf_path"] / "config.json").exists()
        assert {"params", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"} <= set(model)
    assert 0 <= report["checks"]["import_max_abs_logit_diff"] < tolerance.LOGITS
    assert 0 <= report["checks"]["export_max_abs_logit_diff"] < tolerance.LOGITS
    assert all(stage["status"] == "complete" and stage["seconds"] > 0 for stage in report["stages"].values())
    assert {"prune", "distill", "distill.ce", "evaluate"} <= set(report["stages"])
    page = (finished / "report" / "index.html").read_text()
    # Held-out and training losses of two students, importance by four axes, the timeline.
    assert page.count("<svg") >= 8
    assert str(finished) not in page + json.dumps(report)


def test_training_and_transformers_agree_on_the_loss(finished: Path) -> None:
    """NeMo's validation loss after the last step equals that of the exported model, within the precision of fp32 sums.

    The demo's tokenizer pads with its end-of-text token, which upstream's dataset would leave out (`DocumentDataset`).
    """
    located = tiny.stages(finished, *tiny.DEPTH)
    nemo = read_metrics(located["distill"].folder / "metrics.jsonl")[-1]["val_loss"]
    student = finished / tiny.report(finished)["models"]["student"]["hf_path"]
    command = [sys.executable, "-m", "tests.helpers.sequences", located["prepare_data"].folder, student]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["left"] == []  # a truncated index would be read as complete
    assert seen["counted"] == 1
    assert seen["ends"]["inputs"] > 0
    assert seen["ends"]["labels"] > 0
    assert nemo == pytest.approx(seen["loss"], abs=tolerance.LOSS)


def test_the_exported_student_needs_no_code_of_this_repository(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / tiny.report(finished)["models"]["student"]["hf_path"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The import statement", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] > prompt["input_ids"].shape[1]
    assert tokenizer.decode(generated[0]).startswith("The import statement")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.head_dim == tiny.SHAPE["kv_channels"]


def test_second_run_does_nothing(finished: Path) -> None:
    manifests = {path: path.stat().st_mtime_ns for path in finished.glob("*/manifest.json")}
    assert len(manifests) == 15
    started = time.monotonic()
    tiny.launch(finished, *tiny.DEPTH)
    assert time.monotonic() - started < 20
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/manifest.json")} == manifests


@pytest.mark.usefixtures("real_start")
def test_killed_distillation_resumes_with_the_same_losses(finished: Path, tmp_path: Path) -> None:
    resumed = kill_and_resume(tiny.copy_run(finished, tmp_path / "run"), *tiny.DEPTH)
    assert resumed.step > 0
    unbroken = tiny.stages(finished, *tiny.DEPTH)["distill"].folder
    assert resumed.losses == pytest.approx(tiny.losses(unbroken), rel=0, abs=tolerance.RESUMED)


@pytest.mark.usefixtures("real_start")
def test_a_stage_started_twice_by_hand_runs_once(finished: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    folder = tiny.stages(run_dir, *tiny.DEPTH)["hf_to_nemo"].folder
    (folder / "manifest.json").unlink()
    command = [sys.executable, "-m", "recipes", "hf_to_nemo", "--config", str(run_dir / "resolved.yaml")]

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        environment = {**tiny.environment(), **more}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    with lock.hold_lock(folder):
        second = start()
    assert second.returncode == 2
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert f"stage hf_to_nemo={folder}: in use by process {os.getpid()} on " in line
    foreign = start(RANK="0", WORLD_SIZE="2")
    assert foreign.returncode == 2
    assert "error: WORLD_SIZE=2: " in foreign.stderr
    assert not (folder / "manifest.json").exists()
    assert start(RANK="1", WORLD_SIZE="1").returncode == 0
    assert (folder / "manifest.json").exists()
