"""Engines that sample completions: transformers here; `make test-serve` has vLLM. The server is a local one."""

from __future__ import annotations

import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.generation.engines import (
    Completion,
    Request,
    SeededSampling,
    ServerEngine,
    TransformersEngine,
    open_engine,
    read_stop_ids,
    served_name,
)
from prune_distill.schema import GenerationEngine, OnPolicy
from tests.helpers.models import write_model

EOD = 0
REQUESTS = [Request([5, 6, 7, 8], 1), Request([9], 2), Request([5, 6, 7, 8], 3)]


def settings(**values: Any) -> OnPolicy:
    return OnPolicy(steps=1, lr=1.0, prompts_per_round=1, max_new_tokens=12, **values)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "nemo_to_hf.on_policy1-00000000" / "student"
    write_model("qwen3_tied", folder)
    return folder


def test_samples_follow_the_distribution_of_the_logits() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    sampling = SeededSampling(range(4000), torch.device("cpu"))
    scores = probabilities.log().expand(4000, 4)
    counts = Counter(sampling(torch.empty(0), scores).argmax(-1).tolist())
    # 4 standard deviations of a share of 4000 samples are at most 0.032.
    assert [counts[token] / 4000 for token in range(4)] == pytest.approx(probabilities.tolist(), abs=0.032)
    assert counts[3] == 0


def test_a_sample_depends_on_its_prompt_and_seed_alone(student: Path) -> None:
    """Not on the batch: its size, its other prompts, or the padding."""
    engine = TransformersEngine(student, settings(batch_size=8), [EOD])
    together = engine.complete(REQUESTS)
    engine.batch_size = 1
    assert engine.complete(REQUESTS) == together
    assert engine.complete(REQUESTS[::-1]) == together[::-1]
    assert together[0] != together[2]


def test_a_completion_ends_with_its_first_stop_token(student: Path) -> None:
    engine = TransformersEngine(student, settings(), [EOD])
    (whole,) = engine.complete(REQUESTS[:1])
    assert (len(whole.ids), whole.ended) == (12, False)
    stop = whole.ids[4]
    stopped = TransformersEngine(student, settings(), [stop]).complete(REQUESTS[:1])
    assert stopped == [Completion(whole.ids[: whole.ids.index(stop) + 1], True)]


def test_a_low_temperature_and_a_low_top_p_are_nearly_greedy(student: Path) -> None:
    cold = TransformersEngine(student, settings(temperature=1e-4), [EOD]).complete(REQUESTS)
    assert cold[0] == cold[2]
    narrow = TransformersEngine(student, settings(top_p=1e-6), [EOD]).complete(REQUESTS)
    assert narrow == cold


def test_the_models_own_generation_config_only_says_where_a_completion_ends(student: Path, tmp_path: Path) -> None:
    plain = TransformersEngine(student, settings(), [EOD]).complete(REQUESTS)
    path = student / "generation_config.json"
    before = path.read_text()
    try:
        config = {**json.loads(before), "repetition_penalty": 5.0, "top_k": 1, "eos_token_id": [3, 4]}
        path.write_text(json.dumps(config))
        assert TransformersEngine(student, settings(), [EOD]).complete(REQUESTS) == plain
        assert read_stop_ids(student, EOD) == [EOD, 3, 4]
    finally:
        path.write_text(before)


class Handler(http.server.BaseHTTPRequestHandler):
    """A server that continues a prompt with its length and the seed, then ends."""

    model = token_ids = None
    requests: ClassVar[list[Any]] = []

    def do_GET(self) -> None:
        self.answer({"data": [{"id": self.model}]})

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.headers.get("Authorization"), content))
        ids = {"token_ids": [len(content["prompt"]), content["seed"], EOD]} if self.token_ids else {}
        self.answer({"choices": [{"text": "", "finish_reason": "stop", **ids}]})

    def answer(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    Handler.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}/v1"
        made.shutdown()


def test_a_server_completes_in_the_order_of_the_requests(
    student: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "model", served_name(student))
    monkeypatch.setattr(Handler, "token_ids", True)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    engine = ServerEngine(student, settings(server_url=f"{server}/", temperature=0.5), [EOD])
    assert engine.complete(REQUESTS) == [
        Completion([len(request.prompt), request.seed, EOD], True) for request in REQUESTS
    ]
    authorization, content = Handler.requests[0]
    assert authorization == "Bearer secret"
    assert {key: content[key] for key in ("model", "max_tokens", "temperature", "top_p", "stop_token_ids")} == {
        "model": "nemo_to_hf.on_policy1-00000000",
        "max_tokens": 12,
        "temperature": 0.5,
        "top_p": 1.0,
        "stop_token_ids": [EOD],
    }


def test_a_server_must_serve_the_student_of_the_round(
    student: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "model", "another")
    name = served_name(student)
    with pytest.raises(
        InputError, match=rf"serves another, .*; serve it with: vllm serve .* --served-model-name {name}"
    ):
        ServerEngine(student, settings(server_url=server), [EOD])


def test_a_server_must_return_token_ids(student: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "model", served_name(student))
    engine = ServerEngine(student, settings(server_url=server), [EOD])
    with pytest.raises(InputError, match=r"returns no token ids; use vLLM 0\.10\.2"):
        engine.complete(REQUESTS)


def test_a_server_that_cannot_be_reached(student: Path) -> None:
    # Nobody listens on this port.
    on_policy = settings(engine=GenerationEngine.server, server_url="http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match=r"^distill\.on_policy\.server_url=http://127.0.0.1:9/v1: does not answer"):
        open_engine(student, on_policy, 64, EOD, Path("python"))


def test_the_environment_with_vllm_must_exist(student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make serve-env"):
        open_engine(student, settings(), 64, EOD, tmp_path / "python")
