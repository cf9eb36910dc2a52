"""Which layers to drop, by the loss of the model without them: a block of neighbours, or others than those at hand.

Scattered layers of least importance often leave a lower loss just after pruning, and lose to a block after training
(arXiv 2408.11796): a block's own loss is compared with that of other blocks only. Summed importance would not do: each
layer's score is its effect with all its neighbours there.

The set with the lowest loss is not always the one to distil: on the demo's teacher without layers 3 and 4 it is
3.77, without 2 and 4 it is 3.84, and after 160 steps of distillation the second is 0.005 ahead. So a search tries more
than one (`make bench-prune`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prune_distill.pruning.losses import broadcast_from_last_stage, compute_logits, cross_entropy, skip_layers


def losses_without(core: Any, batches: Sequence[torch.Tensor], sets: Sequence[Sequence[int]]) -> list[float]:
    """The model's loss without each set of layers; nats per token.

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


def blocks(num_layers: int, length: int) -> list[list[int]]:
    """All sets of `length` neighbours, by their first layer."""
    return [list(range(start, start + length)) for start in range(1, num_layers - length + 2)]


def shifted(layers: Sequence[int], num_layers: int) -> list[list[int]]:
    """The sets in which one of the layers gives its place to a neighbour that is not among them."""
    found = {
        tuple(sorted({*layers, other} - {layer}))
        for layer in layers
        for other in (layer - 1, layer + 1)
        if 1 <= other <= num_layers and other not in layers
    }
    return [list(one) for one in sorted(found)]


def best(core: Any, batches: Sequence[torch.Tensor], sets: Sequence[list[int]], count: int) -> list[list[int]]:
    """The `count` sets without which the loss is lowest, best first."""
    if not count or not sets:
        return []
    losses = losses_without(core, batches, sets)
    return [layers for _, layers in sorted(zip(losses, sets, strict=True))[:count]]
