"""What the models go on from: random tokens, the same for all of them where they know the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from prune_distill.errors import InputError
from prune_distill.model import hf_config
from prune_distill.schema import BenchmarkConfig


def check(folders: Mapping[str, Path], cfg: BenchmarkConfig) -> None:
    """Raises: InputError, where a model takes fewer tokens than it is to be given."""
    length = cfg.prompt_tokens + cfg.new_tokens
    for name, folder in folders.items():
        most = hf_config.read_config(folder / "config.json")["max_position_embeddings"]
        if length > most:
            raise InputError(
                f"{name} takes {most} tokens at most, but {cfg.prompt_tokens} of the prompt and {cfg.new_tokens} new"
                f" ones are {length}; set benchmark.prompt_tokens (--prompt-tokens) to at most {most - cfg.new_tokens}"
            )


def draw(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int) -> torch.Tensor:
    """Ids below every model's vocabulary, `[b, s]`."""
    limit = min(hf_config.read_config(folder / "config.json")["vocab_size"] for folder in folders.values())
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(limit, (cfg.batch_size, cfg.prompt_tokens), generator=generator)
