"""launch.serve: which model it finds, and the server that it starts, checks and ends.

vLLM is a stand-in here; tests/serve has the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import serve
from launch.environment import ROOT
from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import locate, write_manifest
from prune_distill.pipeline.names import RESOLVED
from tests.helpers import fake_vllm
from tests.helpers.models import write_model

SECONDS = 60


def complete_run(folder: Path, *overrides: str, template: str | None = None) -> dict[str, Path]:
    """A run whose exported student and quantized student are complete; returns the folders of both."""
    run_dir = folder / "run"
    cfg = compose(["experiment=demo", f"run_dir={run_dir}", "quantize.formats=[fp8]", *overrides])
    run_dir.mkdir()
    save_resolved(cfg, run_dir / RESOLVED)
    located, models = locate(cfg), {}
    for stage, name in (("nemo_to_hf", "student"), ("quantize.fp8", "student_fp8")):
        models[name] = located[stage].folder / name
        write_model("qwen3_untied_bf16", models[name])
        (models[name] / "chat_template.jinja").unlink(missing_ok=True)
        settings = models[name] / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
        write_manifest(located[stage], 1.0, 2.0, {})
    return models


def free_port() -> int:
    with socket.socket() as attempt:
        attempt.bind(("127.0.0.1", 0))
        return int(attempt.getsockname()[1])


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "launch.serve", str(folder / "run"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell's background jobs ignore Ctrl-C, and so would what they start.
    return subprocess.Popen(command, **pipes, text=True, env=env, preexec_fn=_mind_interrupts)


def _mind_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word in line:
            break
    return "".join(lines)


def alive(pid: int) -> bool:
    try:
        return "Z" not in (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("chat", "signum", "status"), [(True, signal.SIGINT, 0), (False, signal.SIGTERM, 143)])
def test_a_model_is_served_checked_and_ended(tmp_path: Path, chat: bool, signum: int, status: int) -> None:
    python = fake_vllm.write(tmp_path)
    template = "{{ messages[0].content }}" if chat else None
    complete_run(tmp_path, f"benchmark.serve_python={python}", template=template)
    port = free_port()
    process = start(tmp_path, "--model", "student_fp8", "--port", str(port), "--", "--max-model-len", "64")
    try:
        output = read_until(process, "curl")
        started = json.loads((tmp_path / "started.json").read_text())
        process.send_signal(signum)
        assert process.wait(SECONDS) == status
    finally:
        process.kill()
    assert f"student_fp8 is served at http://127.0.0.1:{port}/v1 (Ctrl-C ends it)" in output
    assert "'The' was answered with ' answer', 8 tokens in" in output
    path = "chat/completions" if chat else "completions"
    assert f"curl http://127.0.0.1:{port}/v1/{path} -H 'Content-Type: application/json' -d '" in output
    words = started["words"]
    assert words[words.index("--served-model-name") + 1] == "student_fp8"
    assert words[-2:] == ["--max-model-len", "64"]
    # Nothing of the training's environment, and no helper is left.
    assert "PYTHONPATH" not in started["environment"]
    until = time.monotonic() + SECONDS
    while any(map(alive, started["pids"])) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, started["pids"]))


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ("ends", "error: vLLM ended with status 1 before it was ready; its messages are above"),
        ("broken", 'HTTP Error 400: Bad Request: {"message": "no such model"}'),
    ],
)
def test_a_server_that_does_not_serve(tmp_path: Path, fake: str, message: str) -> None:
    complete_run(tmp_path, f"benchmark.serve_python={fake_vllm.write(tmp_path)}")
    process = start(tmp_path, "--port", str(free_port()), "--", "--fake", fake)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert message in errors


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert serve.main([str(folder), *words]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_named_before_vllm_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    models = complete_run(
        tmp_path,
        f"benchmark.serve_python={python}",
    )
    run = tmp_path / "run"
    assert f"RUN_DIR={tmp_path}: a sweep; give one of its runs, such as {run}" in refusal(tmp_path, capsys)
    assert "--model=other: not a model of this run; take one of teacher, " in refusal(run, capsys, "--model", "other")
    # The demo's teacher is made by a stage, too.
    assert "--model=teacher: stage demo_model is not complete; run" in refusal(run, capsys, "--model", "teacher")
    assert "--model=ce: stage nemo_to_hf.ce is not complete; run" in refusal(run, capsys, "--model", "ce")
    assert f"benchmark.serve_python={python}: does not exist; run make serve-env" in refusal(run, capsys)
    fake_vllm.write(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"--port={port}: cannot listen on 127.0.0.1:{port}" in refusal(run, capsys, "--port", port)
    assert "set another --port" in refusal(run, capsys, "--port", "70000")
    (models["student"] / "config.json").unlink()
    assert "is damaged: student/config.json" in refusal(run, capsys)


def test_a_teacher_on_the_hub_is_not_downloaded(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(
        stage=SimpleNamespace(module="recipes.evaluate"), inputs={"teacher": "owner/name"}, folder=tmp_path
    )
    with pytest.raises(InputError, match="--model=teacher: owner/name is not a folder on this machine; download"):
        serve.find_model({"evaluate": stage}, "teacher")


def test_the_command_of_a_container(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = complete_run(tmp_path)["student_fp8"]
    assert serve.main([str(tmp_path / "run"), "--model", "student_fp8", "--print", "--", "--max-model-len", "64"]) == 0
    assert capsys.readouterr().out.strip() == (
        "docker run --rm --gpus all --ipc=host --publish 127.0.0.1:8000:8000 "
        f"--volume {folder}:{folder}:ro {serve.IMAGE} {folder} "
        "--served-model-name student_fp8 --host 0.0.0.0 --port 8000 --max-model-len 64"
    )
    # The image has the version that the serving environment has.
    pinned = re.findall(r"^vllm==(\S+)$", (ROOT / "requirements" / "serve-gpu.in").read_text(), re.MULTILINE)
    assert serve.IMAGE.endswith(f":v{pinned[0]}")
