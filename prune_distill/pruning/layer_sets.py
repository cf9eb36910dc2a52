"""Select layers to drop by the loss of the model without them: a block of neighbors, or sets similar to a given set.

Dropping scattered, least important layers often gives a lower loss right after pruning than dropping a block, but a
higher loss after training (arXiv 2408.11796). So blocks are only compared with other blocks. The sum of importance
scores cannot replace the loss: each score is the effect of one layer while all others are present.

The set with the lowest loss is not always the best one to distill. The loss of the demo's teacher is 3.77 without
layers 3 and 4, and 3.84 without 2 and 4; after 160 steps of distillation the second is 0.005 lower. So a search tries
several sets (`make bench-prune`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prune_distill.pruning.losses import broadcast_from_last_stage, compute_logits, cross_entropy, skip_layers


def compute_ablation_losses(core: Any, batches: Sequence[torch.Tensor], sets: Sequence[Sequence[int]]) -> list[float]:
    """Return the loss of the model without each set of layers, in nats per token.

    Args:
        batches: sequences `[b, s + 1]`.
    """
    tokens = sum(batch[:, 1:].numel() for batch in batches)
    sums = [0.0] * len(sets)
    for batch in batches:
        for index, layers in enumerate(sets):
            with skip_layers(core, layers):
                logits = compute_logits(core, batch[:, :-1].contiguous())
            if logits is not None:
                sums[index] += cross_entropy(logits, batch[:, 1:])
    return [total / tokens for total in broadcast_from_last_stage(sums)]


def list_blocks(num_layers: int, length: int) -> list[list[int]]:
    """List all sets of `length` neighboring layers, in order of their first layer."""
    return [list(range(start, start + length)) for start in range(1, num_layers - length + 2)]


def list_shifted(layers: Sequence[int], num_layers: int) -> list[list[int]]:
    """List the sets in which one layer is replaced by a neighbor outside the set."""
    found = {
        tuple(sorted({*layers, other} - {layer}))
        for layer in layers
        for other in (layer - 1, layer + 1)
        if 1 <= other <= num_layers and other not in layers
    }
    return [list(layers) for layers in sorted(found)]


def find_best(core: Any, batches: Sequence[torch.Tensor], sets: Sequence[list[int]], count: int) -> list[list[int]]:
    """Return the `count` sets whose removal gives the lowest loss, best first."""
    if not count or not sets:
        return []
    losses = compute_ablation_losses(core, batches, sets)
    return [layers for _, layers in sorted(zip(losses, sets, strict=True))[:count]]
