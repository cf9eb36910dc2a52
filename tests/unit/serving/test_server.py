"""vLLM's server and requests to it. vLLM is a stand-in here; tests/serve has the real one."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.environment import ROOT
from prune_distill.errors import InputError
from prune_distill.serving import server
from prune_distill.serving.prompt_scores import score_sequences
from tests.helpers import fake_vllm
from tests.helpers.models import write_model
from tests.helpers.processes import members_of_session, sessions_started_by

SECONDS = 60


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model("qwen3_tied", tmp_path / "model")
    return tmp_path / "model"


def wait_until(ready: Callable[[], Any]) -> None:
    until = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_server_runs_during_the_block(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("RANK", "1")
    with server.serve(model, fake_vllm.write(tmp_path), ["--max-model-len", "9"], 3 * 2**30, {"A": "1"}) as url:
        started = json.loads((tmp_path / "started.json").read_text())
        answer = server.ask(f"{url}/v1/completions", {"prompt": "a", "max_tokens": 2})
        sessions = [members_of_session(pid) for pid in started["pids"][:1]]
    assert answer["usage"]["completion_tokens"] == 2
    words = started["words"]
    assert words[words.index("--served-model-name") + 1] == server.MODEL
    assert words[-2:] == ["--max-model-len", "9"]
    variables = {name: started["environment"].get(name) for name in ("VLLM_CPU_KVCACHE_SPACE", "A", "RANK")}
    assert variables == {"VLLM_CPU_KVCACHE_SPACE": "3", "A": "1", "RANK": None}
    assert set(started["pids"]) <= sessions[0]
    assert not members_of_session(started["pids"][0])
    with pytest.raises(server.RequestError, match=f"{url}/version: "):
        server.ask(f"{url}/version")


def test_a_server_that_does_not_come_up(tmp_path: Path, model: Path) -> None:
    python = fake_vllm.write(tmp_path)
    with (
        pytest.raises(InputError, match=f"{model}: vLLM ended with status 1 before it was ready"),
        server.serve(model, python, ["--fake", "ends"], 0, {}),
    ):
        pytest.fail("it is not ready")
    with pytest.raises(InputError, match="run make serve-env"), server.serve(model, tmp_path / "no", [], 0, {}):
        pytest.fail("there is no such Python")


PARENT = """
import sys, time
from pathlib import Path
from prune_distill.serving import processes
processes.start(Path(sys.executable), [sys.argv[1]], {})
time.sleep(1000)
"""
PROGRAM = """
import os, subprocess, sys, time
print("for people")
helper = subprocess.Popen(["sleep", "1000"])
os.fdopen(int(sys.argv[1]), "w").write("ready\\n")
time.sleep(1000)
"""


def test_no_program_outlives_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-c", PARENT, str(tmp_path / "program.py")]
    parent = subprocess.Popen(
        command, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        (session,) = sessions_started_by(parent.pid)
        assert len(members_of_session(session)) == 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not members_of_session(session))


@contextmanager
def answering(change: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    """A server whose log-probability of each token is minus its id, and whose most probable token is the next id."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = [*content["prompt"], *content["allowed_token_ids"]]
            assert (content["echo"], content["max_tokens"], content["model"]) == (True, 1, "name")
            entries = [{f"token_id:{token}": -token, f"token_id:{token + 1}": 0} for token in ids]
            found = {"tokens": [f"token_id:{token}" for token in ids], "top_logprobs": [None, *entries[1:]]}
            found["token_logprobs"] = [None, *(-token for token in ids[1:])]
            body = json.dumps({"choices": [{"logprobs": change(found)}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()


def test_sequences_are_scored() -> None:
    with answering(lambda found: found) as url:
        log_probs, top = score_sequences(url, "name", [[5, 2, 9], [1, 3, 4]], parallel=2)
    assert log_probs == [[-2, -9], [-3, -4]]
    assert top == [[3, 10], [4, 5]]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda found: None, "no log-probabilities of tokens by id"),
        (lambda found: {**found, "tokens": ["a", "b", "c"]}, "no log-probabilities of tokens by id"),
        (lambda found: {**found, "tokens": found["tokens"][:2]}, "about other tokens"),
    ],
)
def test_answers_of_other_servers_are_refused(change: Callable[[dict[str, Any]], Any], part: str) -> None:
    with answering(change) as url, pytest.raises(server.RequestError, match=f"{url}: .*{part}.*use a server of vLLM"):
        score_sequences(url, "name", [[5, 2, 9]], parallel=1)
