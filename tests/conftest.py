"""Shared by all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.schema import RunConfig

Compose = Callable[..., RunConfig]


@pytest.fixture
def demo(tmp_path: Path) -> Compose:
    """Return a function that composes the demo experiment with overrides and a temporary run folder; without a
    quantized student, unless they name formats."""

    def make(*overrides: str) -> RunConfig:
        return compose(["experiment=demo", f"run_dir={tmp_path / 'run'}", "quantize.formats=[]", *overrides])

    return make


# A minimal Hugging Face config.json.
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a folder with Qwen3's `config.json` and some values changed, or removed if None."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "hf"
        folder.mkdir(exist_ok=True)
        config = {key: value for key, value in {**QWEN3, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
