"""Runs of the data stage alone: a model's folder without weights, documents, and the command line."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.data.folder import DataFolder
from prune_distill.data.shards import SplitWriter, read_documents
from prune_distill.pipeline.artifact import locate
from tests.conftest import QWEN3
from tests.helpers.hf_folders import write_weights
from tests.helpers.tokenizers import TEXTS, byte_level


def model_folder(folder: Path) -> Path:
    """A tokenizer, a config.json, and weights that are holes: the data stage reads none."""
    byte_level(folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**QWEN3, "vocab_size": vocab_size}))
    write_weights(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(" ".join(TEXTS).split(), k=draw.randrange(5, 120))) for _ in range(count)]


def write(path: Path, documents: list[Any], key: str = "text") -> Path:
    content = "".join(json.dumps({key: text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def settings(model: Path, run_dir: Path, *more: str) -> list[str]:
    sizes = ["prune.num_layers=2", "prune.calibration_seq_length=512", "evaluate.seq_length=512"]
    training = ["distill.seq_length=512", "distill.parallel.tensor_model_parallel_size=1"]
    return [
        *("model=local", "name=mine", f"model.hf_path={model}", f"run_dir={run_dir}", "data=jsonl"),
        *("data.num_workers=2", "data.holdout_every=20", *sizes, *training, *more),
    ]


def command(model: Path, run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "launch.run", *settings(model, run_dir, *more), "--until", "prepare_data"]


def folder_of(arguments: list[str]) -> Path:
    return locate(compose([word for word in arguments if "=" in word]))["prepare_data"].folder


def resolved(arguments: list[str]) -> Path:
    """The run's resolved.yaml, made without running anything."""
    cfg = compose([word for word in arguments if "=" in word])
    path = Path(cfg.run_dir) / "resolved.yaml"
    if not path.exists():
        save_resolved(cfg, path)
    return path


def write_masks(folder: Path) -> None:
    """Masks next to a data folder's tokens, as `data.learn` writes them: stretches of 100 tokens of which
    nothing, a tenth or all is learned, so that some sequences of 128 have next to nothing to learn."""
    draw = np.random.default_rng(0)
    data = DataFolder.read(folder)
    for prefix in (*(folder / part["prefix"] for part in data.train), folder / "validation"):
        writer = SplitWriter(Path(f"{prefix}_mask"), np.dtype(np.uint8), 2)
        for document in read_documents(prefix):
            shares = np.repeat(draw.choice([0.0, 0.1, 1.0], len(document) // 100 + 1), 100)[: len(document)]
            writer.add([(draw.random(len(document)) < shares).astype(np.uint8)], (0, 0, 0))
        writer.finish()
