"""Completions of on-policy rounds by the real vLLM, in a process of its own and as a server, on this machine's CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
from prune_distill.schema import OnPolicy
from prune_distill.serving import processes
from prune_distill.serving.server import KV_CACHE, LOCAL, find_free_port, start_server, wait_until_ready
from tests.helpers.quantized import write_student

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
def server(student: Path) -> Iterator[str]:
    """vLLM's server with the student; yields the base URL of its API."""
    port = find_free_port()
    options = ["--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager"]
    name, space = served_name(student), {KV_CACHE: "1"}
    process = start_server(SERVE_PYTHON, student, name, LOCAL, port, options, space, stdout=sys.stderr)
    try:
        wait_until_ready(process, LOCAL, port)
        yield f"http://{LOCAL}:{port}/v1"
    finally:
        processes.end(process)


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
