"""Prompts: random tokens from the vocabulary that all models share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from prune_distill.errors import InputError
from prune_distill.model import hf_config
from prune_distill.schema import BenchmarkConfig


def check(folders: Mapping[str, Path], cfg: BenchmarkConfig) -> None:
    """Check the prompts' length. Raises: InputError, if a model supports fewer tokens."""
    length = cfg.prompt_tokens + cfg.new_tokens
    for name, folder in folders.items():
        most = hf_config.read_unchecked(folder / "config.json")["max_position_embeddings"]
        if length > most:
            raise InputError(
                f"benchmark.prompt_tokens={cfg.prompt_tokens}: with {cfg.new_tokens} new tokens it exceeds the {most}"
                f" tokens of {name}; set benchmark.prompt_tokens (--prompt-tokens) to at most {most - cfg.new_tokens}"
            )


def draw(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int, count: int | None = None) -> torch.Tensor:
    """Draw `count` prompts (a batch by default), `[b, s]`: ids below the smallest vocabulary size."""
    limit = min(hf_config.read_unchecked(folder / "config.json")["vocab_size"] for folder in folders.values())
    generator = torch.Generator().manual_seed(seed)
    size = (cfg.batch_size if count is None else count, cfg.prompt_tokens)
    return torch.randint(limit, size, generator=generator)
