"""Which block of neighbouring layers to drop.

Scattered layers of least importance often leave a lower loss just after pruning, and lose to a block after training
(arXiv 2408.11796): a block's own loss is compared with that of other blocks only. Summed importance would not do: each
layer's score is its effect with all its neighbours there.
"""

from __future__ import annotations

from typing import Any

import torch

from recipes.runtime.pruning.losses import cross_entropy, forward, from_last_stage, without_layers


def block_losses(core: Any, batches: list[torch.Tensor], length: int) -> dict[int, float]:
    """The model's loss without each block of `length` layers, by the number of its first layer; nats per token.

    Args:
        batches: sequences `[b, s + 1]`.
    """
    starts = range(1, core.config.num_layers - length + 2)
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    sums = dict.fromkeys(starts, 0.0)
    for batch in batches:
        for start in starts:
            with without_layers(core, range(start, start + length)):
                logits = forward(core, batch[:, :-1].contiguous())
            if logits is not None:
                sums[start] += cross_entropy(logits, batch[:, 1:])
    return {start: total / tokens for start, total in zip(starts, from_last_stage([*sums.values()]), strict=True)}


def best_block(losses: dict[int, float], length: int) -> list[int]:
    """The layers of the block without which the loss is lowest."""
    start = min(losses, key=lambda first: losses[first])
    return list(range(start, start + length))
