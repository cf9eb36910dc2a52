"""launch.serve with the real vLLM, on this machine's CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from launch import serve
from launch.environment import ROOT
from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.nemo import hf_models
from prune_distill.pipeline.artifact import locate, write_manifest
from prune_distill.pipeline.names import RESOLVED
from tests.helpers.quantized import write_student
from tests.helpers.served_run import SIZES
from tests.unit.launch.test_serve import free_port, read_until

SECONDS_TO_END = 60


def greedy(folder: Path) -> str:
    """What transformers adds to the prompt of the check."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), hf_models.load(folder)
    ids = tokenizer(serve.PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        for _ in range(serve.NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], -1)
    return tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(serve.PROMPT)


def test_the_student_of_a_run_is_served(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cfg = compose(["experiment=demo", f"run_dir={run_dir}"])
    run_dir.mkdir()
    save_resolved(cfg, run_dir / RESOLVED)
    stage = locate(cfg)["nemo_to_hf"]
    student = write_student(stage.folder / "student", "qwen3_tied", **SIZES)
    (student / "chat_template.jinja").unlink(missing_ok=True)  # a text to continue, and no chat
    write_manifest(stage, 1.0, 2.0, {})
    command = [sys.executable, "-m", "launch.serve", str(run_dir), "--port", str(free_port())]
    command += ["--", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    with (tmp_path / "log").open("w") as log:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
    try:
        output = read_until(process, "curl")
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS_TO_END) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert f"{serve.PROMPT!r} was answered with {greedy(student)!r}, {serve.NEW_TOKENS} tokens" in output, (
        tmp_path / "log"
    ).read_text()[-4000:]
