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
        most = hf_config.read_config(folder / "config.json")["max_position_embeddings"]
        if length > most:
            raise InputError(
                f"benchmark.prompt_tokens={cfg.prompt_tokens}: with {cfg.new_tokens} new tokens it exceeds the {most}"
                f" tokens of {name}; set benchmark.prompt_tokens (--prompt-tokens) to at most {most - cfg.new_tokens}"
            )


def draw(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int) -> torch.Tensor:
    """Draw ids `[b, s]` below the smallest vocabulary size."""
    limit = min(hf_config.read_config(folder / "config.json")["vocab_size"] for folder in folders.values())
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limit, (cfg.batch_size, cfg.prompt_tokens), generator=generator)
