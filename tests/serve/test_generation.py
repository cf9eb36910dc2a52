"""Completions of on-policy rounds by the real vLLM, in a process of its own and as a server, on this machine's CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.serve import SERVER
from prune_distill.config.values import SERVE_PYTHON
from prune_distill.generation.engines import (
    Completion,
    Request,
    ServerEngine,
    TransformersEngine,
    VllmEngine,
    read_stop_ids,
    served_name,
)
from prune_distill.pipeline.processes import serving_environment
from prune_distill.schema import OnPolicy
from tests.helpers.quantized import write_student
from tests.unit.launch.test_serve import free_port

SECONDS_TO_START, SECONDS_TO_END = 300, 60
EOD, LENGTH, NEW_TOKENS = 0, 64, 16
# As in test_vllm.py: what vLLM's kernels for CPUs take.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
REQUESTS = [Request(list(range(5, 5 + length)), seed) for seed, length in enumerate((4, 9, 2, 9, 4, 30))]


def settings(**values: Any) -> OnPolicy:
    return OnPolicy(steps=1, lr=1.0, prompts_per_round=1, max_new_tokens=NEW_TOKENS, **values)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "nemo_to_hf.on_policy1-00000000" / "student"
    return write_student(folder, "qwen3_tied", **SIZES)


@pytest.fixture
def stop_ids(student: Path) -> list[int]:
    """As in a run: vLLM stops at those of the generation config by itself."""
    return read_stop_ids(student, EOD)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start vLLM in a single process, because each takes seconds to import it."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def sample(student: Path, requests: list[Request], stop_ids: list[int], **values: Any) -> list[Completion]:
    engine = VllmEngine(student, settings(**values), LENGTH, stop_ids, SERVE_PYTHON)
    try:
        return engine.complete(requests)
    finally:
        engine.close()


def test_vllm_samples_by_the_seed_and_stops_where_transformers_does(student: Path, stop_ids: list[int]) -> None:
    engine = VllmEngine(student, settings(batch_size=4), LENGTH, stop_ids, SERVE_PYTHON)
    try:
        first, again = engine.complete(REQUESTS), engine.complete(REQUESTS)
        assert first == again
        assert engine.complete(REQUESTS[:1]) == first[:1]
        other = engine.complete([request._replace(seed=request.seed + 100) for request in REQUESTS])
        assert other != first
    finally:
        engine.close()
    for completion in first:
        assert completion.ended == (completion.ids[-1] in stop_ids)
        assert completion.ended or len(completion.ids) == NEW_TOKENS
    # Without a choice, both compute the same tokens in fp32.
    greedy = {"top_p": 1e-6, "batch_size": 4}
    expected = TransformersEngine(student, settings(**greedy), stop_ids).complete(REQUESTS)
    assert sample(student, REQUESTS, stop_ids, **greedy) == expected
    stop = expected[0].ids[3]
    stopped = TransformersEngine(student, settings(**greedy), [*stop_ids, stop]).complete(REQUESTS)
    assert stopped[0].ids[-1] == stop
    assert stopped[0].ended
    assert sample(student, REQUESTS, [*stop_ids, stop], **greedy) == stopped


@pytest.fixture
def server(student: Path, tmp_path: Path) -> Iterator[str]:
    """vLLM's server with the student; yields the base URL of its API."""
    port = free_port()
    command = [str(SERVE_PYTHON), "-P", "-m", SERVER, "--model", str(student), "--port", str(port)]
    command += ["--served-model-name", served_name(student), "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--max-model-len", str(LENGTH), "--enforce-eager"]
    environment = {**serving_environment(), "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + SECONDS_TO_START
        while not is_ready(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(SECONDS_TO_END)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_a_server_completes_as_transformers_does(student: Path, server: str, stop_ids: list[int]) -> None:
    greedy = {"top_p": 1e-6, "batch_size": 4}
    expected = TransformersEngine(student, settings(**greedy), stop_ids).complete(REQUESTS)
    stop = expected[0].ids[3]
    engine = ServerEngine(student, settings(**greedy, server_url=server), [*stop_ids, stop])
    assert engine.complete(REQUESTS) == TransformersEngine(student, settings(**greedy), [*stop_ids, stop]).complete(
        REQUESTS
    )
    warm = ServerEngine(student, settings(server_url=server), stop_ids)
    assert warm.complete(REQUESTS) == warm.complete(REQUESTS)
