"""Stages that use vLLM: what they measure, and that they complete after they were killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prune_distill.config.values import SERVE_PYTHON
from prune_distill.serving.server import serve
from tests.helpers import served_run
from tests.helpers.processes import members_of_session, sessions_started_by

SECONDS = 600
SERVED = ("teacher", "student", "student_fp8")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage quantize.fp8 was killed while it wrote the model, and then completed."""
    run_dir = tmp_path_factory.mktemp("served") / "run"
    stages = served_run.write_run(run_dir)
    folder = stages["quantize.fp8"].folder
    kill(run_dir, "quantize.fp8", lambda process: (folder / ".partial.student_fp8").exists())
    assert not stages["quantize.fp8"].complete
    served_run.run(run_dir, "quantize.fp8")
    assert stages["quantize.fp8"].complete
    assert sorted(path.name for path in folder.glob("*student*")) == ["student_fp8"]
    return run_dir


def kill(run_dir: Path, stage: str, ready: Callable[[subprocess.Popen[str]], Any]) -> set[int]:
    """Start a stage, and kill it once `ready` is true; returns the sessions of the serving environment that it had."""
    process = served_run.start(run_dir, stage)
    try:
        wait_until(lambda: ready(process), process)
        return sessions_started_by(process.pid)
    finally:
        process.kill()
        process.wait()


def wait_until(ready: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + SECONDS
    while not ready():
        assert process is None or process.poll() is None, "the stage ended first"
        assert time.monotonic() < until
        time.sleep(0.02)


def has_engine(process: subprocess.Popen[str]) -> bool:
    """Whether vLLM's server or worker has started its engine, a process of its own."""
    return any(len(members_of_session(session)) > 1 for session in sessions_started_by(process.pid))


def complete_after_kill(run_dir: Path, stage: str) -> None:
    """Kill a stage while vLLM runs for it, and run it again."""
    sessions = kill(run_dir, stage, has_engine)
    assert sessions
    # Nothing of vLLM outlives the stage.
    wait_until(lambda: not any(map(members_of_session, sessions)))
    served_run.run(run_dir, stage)


def test_the_loss_by_vllm_is_that_of_the_reader(run_dir: Path) -> None:
    served, read = (
        measured(run_dir, f"evaluate.engine={engine}", complete_after_kill if engine == "vllm" else served_run.run)
        for engine in ("vllm", "transformers")
    )
    assert re.fullmatch(r"vLLM \d+\.\d+\.\d+", served.pop("engine"))
    assert "engine" not in read
    for key in ("params", "num_layers", "hidden_size", "tokens"):
        assert served[key] == read[key]
    print(f"vLLM {served['val_loss']}, reader {read['val_loss']}; {served['agreement']}, {read['agreement']}")
    # The reader computes in the student's fp32, and vLLM in bf16, whose rounding moves activations to another step of
    # FP8. The mean of 96 tokens differed by 0.001 and 0.003 for two students.
    assert served["val_loss"] == pytest.approx(read["val_loss"], abs=0.01)
    # The same rounding changes the most probable of few tokens, where two are nearly as probable.
    assert 0.1 < read["agreement"]["top1"] < 0.95
    assert served["agreement"]["top1"] == pytest.approx(read["agreement"]["top1"], abs=0.1)
    assert set(served["agreement"]) == {"top1"}
    # An engine only tells the probabilities of few tokens.
    assert set(read["agreement"]) == {"top1", "kl"}


def measured(run_dir: Path, engine: str, run: Callable[[Path, str], None]) -> dict[str, Any]:
    folder = served_run.write_run(run_dir, engine)["evaluate.fp8"].folder
    run(run_dir, "evaluate.fp8")
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())["student_fp8"]
    return found


def test_the_benchmark_measures_all_models_and_servers_under_load(run_dir: Path) -> None:
    folder = served_run.write_run(run_dir)["benchmark"].folder
    complete_after_kill(run_dir, "benchmark")
    result = json.loads((folder / "benchmark.json").read_text())
    assert tuple(result["models"]) == SERVED
    assert (result["engine"], result["requests"]) == ("vllm", 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert result["engine_version"] == manifest["versions"]["vllm"]
    for model in result["models"].values():
        for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds"):
            assert 0 < model[name]["min"] <= model[name]["median"] <= model[name]["max"]
        assert [entry["request_rate"] for entry in model["load"]] == [8, None]
        for entry in model["load"]:
            spreads = [value for value in entry.values() if isinstance(value, dict)]
            assert len(spreads) == 4
            assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in spreads)
            assert entry["slow_time_to_first_token_seconds"]["min"] >= entry["time_to_first_token_seconds"]["min"]
    weights = {name: model["weights_bytes"] for name, model in result["models"].items()}
    assert weights["teacher"] > weights["student"] > weights["student_fp8"]
    assert set(result["ratios"]) == {"student", "student_fp8"}
    assert [entry["request_rate"] for entry in result["ratios"]["student_fp8"]["load"]] == [8, None]


def test_a_running_server_is_measured(run_dir: Path, tmp_path: Path) -> None:
    stages = served_run.write_run(run_dir)
    if not stages["evaluate.fp8"].complete:
        served_run.run(run_dir, "evaluate.fp8")
    folder = stages["quantize.fp8"].folder / "student_fp8"
    result = tmp_path / "served.json"
    with serve(folder, SERVE_PYTHON, ["--max-model-len", "33"], 0, served_run.COMPILE_NOTHING) as url:
        done = measure_server(run_dir, f"{url}/v1", "--out", str(result))
        assert done.returncode == 0, done.stderr[-4000:]
        too_long = measure_server(run_dir, url, "--seq-length", "48")
    expected = json.loads((stages["evaluate.fp8"].folder / "evaluation.json").read_text())["student_fp8"]
    found = json.loads(result.read_text())
    # The same computation, in other batches.
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-3)
    assert found["tokens"] == expected["tokens"]
    assert f"held-out loss {found['val_loss']:.4f} nats per token" in done.stdout
    for done, part in ((too_long, "maximum context length"), (measure_server(run_dir, url), "Connection refused")):
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"error: {url}/v1/")
        assert part in done.stderr


def measure_server(run_dir: Path, url: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.served", str(run_dir), url, *more]
    return subprocess.run(command, env=served_run.environment(), capture_output=True, text=True, timeout=SECONDS)
