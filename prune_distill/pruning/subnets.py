"""Score many shapes with one model: ModelOpt's search space runs the forward pass of any shape without pruning.

All axes are sorted by importance once. A shape then uses the first channels and heads of each axis, as in ModelOpt's
pruning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from modelopt.torch.nas.utils import sort_parameters
from modelopt.torch.opt.utils import named_hparams

from prune_distill.pruning.importance import Importance
from prune_distill.pruning.losses import (
    broadcast_from_last_stage,
    compute_logits,
    cross_entropy,
    divergence,
    skip_layers,
)
from prune_distill.pruning.search_space import convert_to_search_space, restore_scores
from prune_distill.schema import Shape


class Subnets:
    """A teacher as a search space. Converts the model, which can then no longer be saved or pruned."""

    def __init__(self, model: Any, importance: Importance, teacher: Shape) -> None:
        self.core = convert_to_search_space(model).eval()
        self.teacher = teacher
        restore_scores(importance, self.core)
        sort_parameters(self.core, {"hidden_size", "ffn_hidden_size", "num_query_groups", "num_heads_per_group"})
        # Otherwise more forward passes would change the importance, which determines the order of heads.
        for module in self.core.modules():
            for handle in [*getattr(module, "hook_handles", ()), getattr(module, "hook_handle", None)]:
                if handle is not None:
                    handle.remove()

    @contextmanager
    def cut_to(self, shape: Shape, drop_layers: list[int]) -> Iterator[Any]:
        """Yield the core as if it were pruned to a shape."""
        self._set(shape)
        try:
            with skip_layers(self.core, drop_layers):
                yield self.core
        finally:
            self._set(self.teacher)

    def _set(self, shape: Shape) -> None:
        sizes = {
            "hidden_size": shape.hidden_size,
            "ffn_hidden_size": shape.ffn_hidden_size,
            "num_query_groups": shape.num_query_groups,
            "num_heads_per_group": shape.num_attention_heads // shape.num_query_groups,
        }
        for name, size in named_hparams(self.core, configurable=True):
            if name.rpartition(".")[2] in sizes:
                size.active = sizes[name.rpartition(".")[2]]
        # It determines the buffers that pipeline stages exchange (megatron/core/pipeline_parallel/schedules.py).
        self.core.config.hidden_size = shape.hidden_size

    def scores(
        self, shapes: list[tuple[Shape, list[int]]], batches: list[torch.Tensor]
    ) -> tuple[float, list[tuple[float, float]]]:
        """Return the teacher's loss, and the loss and KL(teacher || shape) of each shape, in nats per token.

        Args:
            shapes: shapes, each with the layers to drop.
            batches: sequences `[b, s + 1]`. The teacher runs once over each batch; its logits are freed after it.
        """
        sums = [0.0] * (1 + 2 * len(shapes))
        tokens = sum(batch[:, 1:].numel() for batch in batches)
        for batch in batches:
            ids, targets = batch[:, :-1].contiguous(), batch[:, 1:]
            teacher_logits = compute_logits(self.core, ids)
            if teacher_logits is not None:
                sums[0] += cross_entropy(teacher_logits, targets)
            for index, (shape, drop_layers) in enumerate(shapes):
                with self.cut_to(shape, drop_layers) as core:
                    logits = compute_logits(core, ids)
                if logits is not None and teacher_logits is not None:
                    sums[1 + 2 * index] += cross_entropy(logits, targets)
                    sums[2 + 2 * index] += divergence(logits, teacher_logits)
        whole, *pairs = [total / tokens for total in broadcast_from_last_stage(sums)]
        return whole, list(zip(pairs[::2], pairs[1::2], strict=True))
