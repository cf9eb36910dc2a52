"""What the models go on from: random tokens, the same for all of them where they know the same ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from conf.errors import InputError
from conf.schema import BenchmarkConfig


def check(folders: Mapping[str, Path], cfg: BenchmarkConfig) -> None:
    """Raises: InputError, where a model takes fewer tokens than it is to be given."""
    length = cfg.prompt_tokens + cfg.new_tokens
    for name, folder in folders.items():
        most = _config(folder).get("max_position_embeddings", length)
        if length > most:
            raise InputError(
                f"{name} takes {most} tokens at most, but {cfg.prompt_tokens} of the prompt and {cfg.new_tokens} new"
                f" ones are {length}; set benchmark.prompt_tokens (--prompt-tokens) to at most {most - cfg.new_tokens}"
            )


def draw(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int) -> torch.Tensor:
    """Ids below every model's vocabulary, `[b, s]`."""
    limit = min(_config(folder)["vocab_size"] for folder in folders.values())
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limit, (cfg.batch_size, cfg.prompt_tokens), generator=generator)


def _config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content
