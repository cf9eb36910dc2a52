"""Conversations through the real command line: rendered with Qwen3's template, packed whole, and learned by a student
where the assistant writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.planning.automatic import compose
from prune_distill.data.folder import DataFolder
from prune_distill.data.packing import pack
from prune_distill.data.shards import read_documents
from prune_distill.pipeline.artifact import locate
from tests.helpers import tiny
from tests.helpers.tokenizers import chat_template

LENGTH = 800
CALL = {"type": "function", "function": {"name": "help", "arguments": {"topic": "lists"}}}
TOOLS = [{"type": "function", "function": {"name": "help", "parameters": {"type": "object"}}}]
# Words of the documentation that the demo's teacher is trained on.
TEXT = "the list is a mutable sequence of items and it can be sorted in place with the method sort of the class"
WORDS = TEXT.split()


def sentence(number: int, length: int) -> str:
    draw = np.random.default_rng(number)
    return " ".join(draw.choice(WORDS, length))


def conversations() -> list[dict[str, Any]]:
    """Answers with and without thinking, in one turn and two, and one with a tool."""
    records: list[dict[str, Any]] = []
    for number in range(30):
        user = {"role": "user", "content": sentence(number, 2 + number % 9)}
        answer = {"role": "assistant", "content": sentence(100 + number, 3 + number % 7)}
        thinking = {**answer, "reasoning_content": sentence(200 + number, 4)} if number % 2 else answer
        again = [{**user, "content": "why"}, thinking] if number % 3 == 0 else []
        records.append({"messages": [user, thinking, *again]})
    tool = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "sorted"}]
    records.append({"messages": [{"role": "user", "content": "help"}, *tool, answer], "tools": TOOLS})
    return records


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained teacher as a Hugging Face folder with Qwen3's chat template."""
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    tiny.launch(run_dir, *tiny.DEPTH, "--until", "demo_model")
    folder = tmp_path_factory.mktemp("hf") / "teacher"
    shutil.copytree(tiny.stages(run_dir, *tiny.DEPTH)["demo_model"].folder / "hf", folder)
    chat_template(folder, "qwen3")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    records = conversations()
    bad = [
        {"messages": records[0]["messages"][:1]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]},
        {**records[1], "tools": "none"},
    ]
    long = {"messages": [{"role": "user", "content": sentence(7, 900)}, records[0]["messages"][1]]}
    lines = [json.dumps(record) for record in (*records, *bad, long)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    held_out = [json.dumps(record) for record in conversations() * 3]
    (folder / "validation.jsonl").write_text("\n".join(held_out) + "\n")
    return folder


def settings(run_dir: Path, teacher: Path, corpus: Path, *more: str) -> list[str]:
    own = [value for value in tiny.overrides(run_dir) if not value.startswith(("model.shape.", "model.demo."))]
    return [
        *own,
        *("model=local", f"model.hf_path={teacher}", "model.family=qwen3", "data=jsonl", "data.format=chat"),
        *(f"data.train=[{corpus}/train.jsonl]", f"data.validation=[{corpus}/validation.jsonl]"),
        *("data.learn=assistant", "data.max_invalid_fraction=0.1", "data.num_workers=1"),
        *("data.max_document_tokens=800", "distill.packing=documents", f"distill.seq_length={LENGTH}", *tiny.DEPTH),
        *("distill.max_steps=2", "distill.val_every_n_steps=2", "distill.val_batches=1", *more),
    ]


def launch(overrides: list[str], until: str, check: bool = True) -> str:
    """Run `launch.run`; return what it prints."""
    command = [sys.executable, "-m", "launch.run", *overrides, "--until", until]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == check, output
    return " ".join(output.split())


def mean_divergence(teacher: Path, student: Path, data: DataFolder) -> float:
    """Return the mean KL divergence on the learned tokens of all documents, each by itself, with transformers."""
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval() for folder in (teacher, student)
    ]
    total, learned = 0.0, 0
    for part in data.train:
        prefix = data.folder / part["prefix"]
        for ids, mask in zip(read_documents(prefix), read_documents(Path(f"{prefix}_mask")), strict=True):
            tokens = torch.from_numpy(ids.astype(np.int64))[None, :-1]
            with torch.no_grad():
                t, s = (model(tokens).logits[0].double().log_softmax(-1) for model in models)
            keep = torch.from_numpy(mask[1:].astype(bool))
            total += float((t.exp() * (t - s)).sum(-1)[keep].sum())
            learned += int(keep.sum())
    return total / learned


def test_a_student_learns_what_the_assistant_writes(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    first = settings(tmp_path / "run", teacher, corpus)
    launch(first, "prepare_data")
    prepared = locate(compose(first))["prepare_data"].folder
    metrics = json.loads((prepared / "manifest.json").read_text())["metrics"]
    counts = {name: metrics[name] for name in ("lines", "documents", "bad", "too_long", "dropped")}
    # The long conversation is cut before its answer, so that nothing of it is learned.
    assert counts == {"lines": 35 + 93, "documents": 32 + 93, "bad": 3, "too_long": 1, "dropped": 1}
    assert metrics["train_documents"] == 31
    # One global batch of all sequences has every document once.
    data = DataFolder.read(prepared)
    lengths = [len(ids) - 1 for part in data.train for ids in read_documents(data.folder / part["prefix"])]
    count = int(pack(np.array(lengths), LENGTH).max()) + 1
    live = [*first, f"distill.global_batch_size={count}"]
    launch(live, "nemo_to_hf")
    stages = locate(compose(live))
    assert stages["prepare_data"].folder == prepared
    losses = tiny.losses(stages["distill"].folder, 2)
    expected = mean_divergence(teacher, stages["nemo_to_hf"].folder / "pruned", data)
    # fp32 sums over up to 800 tokens and 522 logits, against fp64.
    assert losses[0] == pytest.approx(expected, rel=2e-4)
    assert losses[1] < losses[0]
    cached = [*live, "distill.teacher_logits=cached", "distill.cached_logits_top_k=521"]
    launch(cached, "distill")
    # fp16 log-probabilities: relative rounding of 5e-4 of values around 5, of both signs, over all tokens.
    assert tiny.losses(locate(compose(cached))["distill"].folder, 2) == pytest.approx(losses, rel=1e-3)


def test_faults_are_found_before_anything_runs(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(teacher, plain)
    (plain / "chat_template.jinja").unlink()
    wrong = ("distill.micro_batch_size=2", "distill.parallel.context_parallel_size=2")
    output = launch(settings(tmp_path / "run", plain, corpus, *wrong), "prepare_data", check=False)
    assert "no chat template, which data.train needs for documents in the format chat" in output
    assert "distill.packing=documents: takes one sequence per forward pass, unlike distill.micro_batch_size=2" in output
    assert "cannot be combined with distill.parallel.context_parallel_size=2" in output
    assert not (tmp_path / "run").exists()
