"""The process that serves a model with vLLM, with a stand-in for vLLM; `make test-serve` has the real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from prune_distill.benchmarking import vllm_engine
from prune_distill.errors import InputError
from prune_distill.schema import BenchmarkConfig
from prune_distill.serving.vllm_process import VllmProcess
from tests.helpers.models import write_model

# Continues a prompt with its length, and says of each token that its log-probability is minus its id.
VLLM = """
import os
from types import SimpleNamespace as Values

__version__ = "9.9"
print("printed by an import")

class LLM:
    def __init__(self, **settings):
        print("loading", settings)
        if settings["dtype"] == "broken":
            raise ValueError("cannot load this")
        assert os.path.exists(settings["model"] + "/config.json")
        assert "VIRTUAL_ENV" not in os.environ
        self.model_config = Values(dtype="torch.float32")
        self.space = os.environ["VLLM_CPU_KVCACHE_SPACE"]

    def generate(self, prompts, parameters, use_tqdm):
        assert (parameters.temperature, parameters.ignore_eos) == (0, True)
        assert parameters.min_tokens == parameters.max_tokens
        print("generating")
        answers = []
        for ids in (prompt["prompt_token_ids"] for prompt in prompts):
            log_probs = None
            if parameters.prompt_logprobs == 0:  # vLLM adds the most probable token
                log_probs = [None, *({token: Values(logprob=-token), 99: Values(logprob=0)} for token in ids[1:])]
            output = Values(token_ids=(len(ids),) * parameters.max_tokens)
            answers.append(Values(outputs=[output], prompt_logprobs=log_probs))
        return answers

class SamplingParams:
    def __init__(self, **values):
        self.__dict__ |= values
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that has the stand-in."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/vllm.py").write_text(VLLM)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/site" exec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("VIRTUAL_ENV", "/of/the/training")
    return program


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model("qwen3_tied", tmp_path / "model")
    return tmp_path / "model"


def test_generations(python: Path, model: Path) -> None:
    with VllmProcess(model, python, dtype="auto") as process:
        assert process.version == "9.9"
        first = process.generate([[1, 2, 3], [4, 5]], 2)
        assert first.pop("seconds") >= 0
        assert first == {"tokens": [[3, 3], [2, 2]]}
        assert process.generate([[1, 2, 3]], 1, prompt_log_probs=True)["log_probs"] == [[-2, -3]]
        running = process._worker._process
    assert running.returncode == 0


def test_a_model_that_cannot_be_loaded(python: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=f"{model}: vLLM ended with status 1"):
        VllmProcess(model, python, dtype="broken")
    assert "cannot load this" in capfd.readouterr().err


def test_a_missing_environment(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run make serve-env"):
        VllmProcess(model, tmp_path / "nowhere", dtype="auto")


def test_the_engine_times_generations(python: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "SECONDS_TO_REST", 0)
    cfg = BenchmarkConfig(batch_size=2, prompt_tokens=8, new_tokens=3, serve_python=str(python))
    engine = vllm_engine.Model(model, torch.zeros(2, 8, dtype=torch.long), cfg, share=0.4)
    try:
        memory, timed = engine.warm_up(), engine.generate()
    finally:
        engine.close()
    assert memory.peak == memory.weights + memory.kv_cache > 0
    assert timed.first_token > 0
    assert timed.others > 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        # The first times are those of waking the processes.
        ([9.0, 2.0, 5.0], (2.0, 3.0)),
        # An attempt that something else has disturbed is repeated.
        ([9.0, 4.0, 3.0, 2.0, 5.0], (2.0, 3.0)),
        ([9.0, *[4.0, 3.0] * vllm_engine.ATTEMPTS], None),
    ],
)
def test_noise_never_becomes_a_speed(
    seconds: list[float], expected: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "SECONDS_TO_REST", 0)
    engine = object.__new__(vllm_engine.Model)
    engine.folder, engine.cfg = Path("student"), BenchmarkConfig(new_tokens=32)
    times = iter(seconds)
    monkeypatch.setattr(engine, "_seconds", lambda new_tokens: next(times))
    if expected is None:
        with pytest.raises(RuntimeError, match="32 new tokens took no longer than one"):
            engine.generate()
    else:
        timed = engine.generate()
        assert (timed.first_token, timed.others) == expected
    assert next(times, None) is None
