"""One chunk of tokens of the distillation loss: its logits, its losses, and the gradient with respect to its logits.

This module uses PyTorch alone. `triton_chunk` computes the same with fewer passes over the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prune_distill.distillation import products
from prune_distill.distillation.loss_terms import (
    DIVERGENCES,
    EXCLUDED,
    CrossEntropy,
    LossTerm,
    MassOutside,
    TopK,
    TopKKL,
    Vocabulary,
    select_top_k,
)
from prune_distill.schema import KdConfig


@dataclass(frozen=True)
class Head:
    """Inputs of the loss from one model: final hidden states `[n, h]`, and this rank's rows of the output weight `[v,
    h]`."""

    hidden: Tensor
    weight: Tensor


def slice_rows(weight: Tensor, vocabulary: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """Return this rank's rows of an output weight for a vocabulary of another size; zeros where it has no rows.

    Both vocabularies have an equal slice on each tensor-parallel rank, so the same id may be on different ranks.

    Args:
        weight: `[v / ranks, h]`, this rank's slice of the weight.
        group: the tensor-parallel ranks.
    """
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    size, given = vocabulary // ranks, weight.shape[0]
    if ranks == 1 and given >= size:
        return weight.detach()[:size]
    rows = weight.new_zeros(size, weight.shape[1])
    for owner in range(ranks):
        part = weight.detach().clone() if owner == rank else torch.empty_like(weight)
        torch.distributed.broadcast(part, torch.distributed.get_global_rank(group, owner), group)
        first, last = max(owner * given, rank * size), min((owner + 1) * given, (rank + 1) * size)
        if first < last:
            rows[first - rank * size : last - rank * size] = part[first - owner * given : last - owner * given]
    return rows


class Chunk:
    """Loss of a chunk of tokens and its gradient with respect to the logits. All chunks share the same buffers."""

    def __init__(
        self,
        student: Head,
        teacher: Head | TopK | None,
        labels: Tensor | None,
        mask: Tensor,
        config: KdConfig,
        vocabulary: Vocabulary,
    ) -> None:
        self.student, self.teacher, self.labels, self.mask = student, teacher, labels, mask
        self.config, self.vocabulary = config, vocabulary
        self.buffers: dict[str, Tensor] = {}

    def compute(self, rows: slice, needs_grad: bool) -> tuple[Tensor | float, Tensor | float, Tensor | None]:
        """Return divergence `[c]`, cross-entropy `[c]`, and the gradient `[c, v]` of their weighted and masked sum, in
        any type; None unless it is needed."""
        config = self.config
        s = self._logits("student", self.student, rows)
        t = self._logits("teacher", self.teacher, rows) if isinstance(self.teacher, Head) else None
        if t is not None:
            t[:, self.vocabulary.shared :] = -torch.inf
        models = [s] if t is None else [s, t]
        for logits, maximum in zip(models, self.vocabulary.maximum([x.amax(-1) for x in models]), strict=True):
            logits.sub_(maximum[:, None])
        terms: dict[str, LossTerm] = {}
        partial_sums: list[Tensor] = []
        if config.lm_weight:  # before the divergence, which overwrites the logits
            assert self.labels is not None
            exponentials = self._buffer("exponentials", rows)
            terms["lm"] = CrossEntropy(s, self.labels[rows], self.vocabulary, exponentials)
            partial_sums += terms["lm"].partial_sums()
        if config.kd_weight:
            s.div_(config.temperature)
            if not self.vocabulary.is_whole:
                terms["outside"] = MassOutside(s, self._buffer("outside", rows), self.vocabulary)
                partial_sums += terms["outside"].partial_sums()
            terms["kd"] = self._divergence(s, t, rows)
            partial_sums += terms["kd"].partial_sums()
        # One all-reduce for all terms.
        sums = self.vocabulary.sum(partial_sums)
        losses: dict[str, Tensor] = {}
        gradients: list[Tensor] = []
        kd_factor = config.kd_weight * config.temperature
        factors = {"lm": config.lm_weight, "outside": kd_factor, "kd": kd_factor}
        for name, term in terms.items():
            losses[name], gradient = term.finish(sums[: term.SUMS])
            sums = sums[term.SUMS :]
            if needs_grad:
                gradients.append(gradient.mul_((factors[name] * self.mask[rows])[:, None]))
        total = gradients[0] if gradients else None
        for other in gradients[1:]:
            gradients[0].add_(other)
        return losses.get("kd", 0.0) + losses.get("outside", 0.0), losses.get("lm", 0.0), total

    def _divergence(self, s: Tensor, t: Tensor | None, rows: slice) -> LossTerm:
        """Build the divergence term from both models' logits, less their maxima, of which the student's are divided by
        the temperature. The term overwrites them."""
        config = self.config
        if t is None:
            assert isinstance(self.teacher, TopK)
            return TopKKL(s, self.teacher[rows], self.vocabulary)
        t.div_(config.temperature)
        t[:, self.vocabulary.shared :] = EXCLUDED
        if config.top_k is not None:
            return TopKKL(s, select_top_k(t, config.top_k, self.vocabulary), self.vocabulary)
        return DIVERGENCES[config.divergence](s, t, self._buffer("difference", rows), self.vocabulary)

    def _logits(self, name: str, head: Head, rows: slice) -> Tensor:
        return products.multiply(head.hidden[rows], head.weight.t(), self._buffer(name, rows))

    def _buffer(self, name: str, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        count = rows.stop - rows.start
        if name not in self.buffers:  # allocated for the first chunk, which is the largest
            self.buffers[name] = self.student.weight.new_empty(count, self.vocabulary.size, dtype=dtype)
        return self.buffers[name][:count]
