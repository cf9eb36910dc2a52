"""Tiny runs with a teacher of its own: trained Hugging Face models of other families and sizes, and command lines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.planning.automatic import compose
from prune_distill.model.hf_tokenizer import SIDE_FILES
from prune_distill.pipeline.artifact import Located, locate
from tests.helpers import tiny

# Both have more ids than the tokenizer's 522, and one the more, so that each can be the teacher of the other. Slices of
# two ranks have 270 and 265 rows.
QWEN: dict[str, Any] = {
    "vocab_size": 540,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 530,
    "hidden_size": 160,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
STEPS, BATCH, LENGTH = 80, 8, 128


@dataclass(frozen=True)
class Models:
    """Folders of trained models with the same tokenizer, and the documents of the demo."""

    qwen: Path
    llama: Path
    corpus: Path


def train_models(demo: Path, folder: Path) -> Models:
    """Train both models with transformers on the documents of a demo's run.

    Args:
        demo: the folder of stage `demo_model`.
    """
    corpus = demo / "corpus"
    for name, family, sizes in (("qwen", "Qwen3", QWEN), ("llama", "Llama", LLAMA)):
        _train(family, sizes, demo / "hf", corpus, folder / name)
    return Models(folder / "qwen", folder / "llama", corpus)


def _train(family: str, sizes: dict[str, Any], reference: Path, corpus: Path, folder: Path) -> None:
    import json

    import torch
    import transformers

    from prune_distill.data.hf_tokenizer import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer(reference)
    end = tokenizer.eos_token_id
    config = getattr(transformers, f"{family}Config")(
        **sizes, max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=end, bos_token_id=None
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").read_text().splitlines()]
    ids = torch.tensor([id_ for text in texts[:400] for id_ in [*tokenizer(text)["input_ids"], end]])
    sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(STEPS):
        batch = sequences[torch.arange(step * BATCH, (step + 1) * BATCH) % len(sequences)]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    for name in SIDE_FILES:
        if (reference / name).exists():
            shutil.copy(reference / name, folder / name)


def overrides(run_dir: Path, model: Path, corpus: Path, *more: str) -> list[str]:
    """The command line of a tiny run that prunes a model of Hugging Face."""
    return [
        *("experiment=demo", "model=local", "name=own_teacher", f"model.hf_path={model}", f"run_dir={run_dir}"),
        *(f"data.train=[{corpus}/train.jsonl]", f"data.validation=[{corpus}/validation.jsonl]"),
        *(f"distill.{key}={value}" for key, value in tiny.DISTILL.items()),
        *("prune.num_layers=2", "prune.ffn_hidden_size=null", "prune.calibration_samples=16"),
        *("prune.calibration_seq_length=128", "evaluate.seq_length=128", "evaluate.max_sequences=64"),
        *("evaluate.verify_tokens=128", "evaluate.continuations.questions=12", "evaluate.samples=2"),
        *("evaluate.sample_new_tokens=8", "benchmark.batch_size=2", "benchmark.prompt_tokens=16"),
        *("benchmark.new_tokens=4", "benchmark.rounds=2", "distill.controls=[]", "quantize.formats=[]"),
        *more,
    ]


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "launch.run", *arguments]


def launch(arguments: list[str], *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m launch.run`."""
    full = [*command(arguments), *flags]
    done = subprocess.run(full, env=tiny.environment(), capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def stages(arguments: list[str]) -> dict[str, Located]:
    return locate(compose(arguments))


def kill_and_resume(arguments: list[str]) -> Path:
    """Kill launcher and ranks after the distillation's first checkpoint, run it again, and return its folder."""
    folder = stages(arguments)["distill"].folder
    launcher = subprocess.Popen(
        [*command(arguments), "--until", "distill"],
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    tiny.wait_for_checkpoint(folder, launcher)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    launch(arguments, "--until", "distill")
    assert "training from " + str(folder / "checkpoints") in (folder / "log.txt").read_text()
    return folder
