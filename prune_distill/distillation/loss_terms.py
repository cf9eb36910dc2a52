"""Terms of the distillation loss over one chunk of tokens, with the vocabulary split over tensor-parallel ranks.

`kd_loss` computes the logits, weights the terms and sums their gradients. This module uses only PyTorch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from prune_distill.schema import Divergence

# In place of a logit whose token does not count: its exponential is 0 in float32, and the difference of two such logits
# is a number.
EXCLUDED = -1e4


@dataclass(frozen=True)
class TopK:
    """The most probable tokens of a teacher's distributions.

    Attributes:
        ids: `[n, k]`, the k most probable tokens; no row contains a token twice.
        log_probs: `[n, k]` float32, their log-probabilities at the loss's temperature.
        tail: `[n]` float32, log of the total probability of all other tokens; -inf if there are none.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.tail[rows])


class Vocabulary:
    """The slice of the vocabulary whose logits this rank computes.

    The ranks of a group have slices of equal size, in order of rank.

    Attributes:
        shared: how many ids of this slice, from the first one on, the other model has too.
        is_whole: whether the other model has all ids, of all slices.
    """

    def __init__(self, size: int, group: ProcessGroup | None = None, shared: int | None = None) -> None:
        """`shared`: the number of ids that both models have, the first of the whole vocabulary; None: all."""
        self.size, self.group = size, group
        self.ranks = 1 if group is None else torch.distributed.get_world_size(group)
        self.first = 0 if group is None else size * torch.distributed.get_rank(group)
        self.is_whole = shared is None or shared >= size * self.ranks
        self.shared = size if shared is None else min(max(shared - self.first, 0), size)

    def maximum(self, rows: Sequence[Tensor]) -> Tensor:
        """All-reduce the maximum of each row `[c]` in one call; returns `[rows, c]`."""
        return self._all_reduce(rows, ReduceOp.MAX)

    def sum(self, rows: Sequence[Tensor]) -> Tensor:
        """All-reduce the sum of each row `[c]` in one call; returns `[rows, c]`."""
        return self._all_reduce(rows, ReduceOp.SUM)

    def _all_reduce(self, rows: Sequence[Tensor], op: ReduceOp.RedOpType) -> Tensor:
        values = torch.stack(list(rows))
        if self.ranks > 1:
            torch.distributed.all_reduce(values, op, self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """All-gather `[c, k]`; returns `[c, ranks x k]`."""
        if self.ranks == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, values.contiguous(), self.group)
        return torch.cat(parts, -1)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the positions of token ids in this slice (0 for ids of another slice), and which are in this slice."""
        positions = ids.long() - self.first
        is_local = (positions >= 0) & (positions < self.size)
        return positions.where(is_local, 0), is_local


class LossTerm(ABC):
    """A term of the loss over one chunk, computed in two steps with an all-reduce between them.

    `s` and `t` are `[c, v]`: the student's and the teacher's logits less their maxima over the whole vocabulary,
    divided by the temperature. Gradients are with respect to `s`. In the formulas, q = softmax(s) and p = softmax(t).
    Terms compute in place: they overwrite `s`, `t` and `spare`, a buffer `[c, v]`.
    """

    SUMS: int  # number of sums that the term needs

    @abstractmethod
    def partial_sums(self) -> list[Tensor]:
        """Return sums over this rank's slice of the vocabulary, `[c]` each."""

    @abstractmethod
    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss `[c]`, and its gradient with respect to the logits `[c, v]`.

        Args:
            sums: `[SUMS, c]`, `partial_sums` summed over all slices of the vocabulary.
        """


@dataclass
class CrossEntropy(LossTerm):
    """-log q[label]; its gradient, in `spare`, is q less 1 at the label.

    Only `partial_sums` reads `s`, and does not change it. `s` may be overwritten afterwards.
    """

    SUMS = 2

    s: Tensor
    labels: Tensor
    vocabulary: Vocabulary
    spare: Tensor

    def partial_sums(self) -> list[Tensor]:
        self.positions, self.is_local = self.vocabulary.local(self.labels)
        at_label = self.s.gather(-1, self.positions[:, None])[:, 0] * self.is_local
        torch.exp(self.s, out=self.spare)
        return [self.spare.sum(-1), at_label]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        total, at_label = sums
        q = self.spare.div_(total[:, None])
        q.scatter_add_(-1, self.positions[:, None], -self.is_local[:, None].float())
        return total.log() - at_label, q


@dataclass
class DivergenceTerm(LossTerm):
    """A divergence between two full distributions."""

    s: Tensor
    t: Tensor
    spare: Tensor
    vocabulary: Vocabulary


class ForwardKL(DivergenceTerm):
    """Sum of p log(p / q); its gradient, in `s`, is q - p."""

    SUMS = 3

    def partial_sums(self) -> list[Tensor]:
        difference = torch.sub(self.t, self.s, out=self.spare)
        self.s.exp_()
        self.t.exp_()
        return [self.s.sum(-1), self.t.sum(-1), torch.linalg.vecdot(self.t, difference)]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        student_sum, teacher_sum, cross = sums
        gradient = self.s.div_(student_sum[:, None]).sub_(self.t.div_(teacher_sum[:, None]))
        return cross / teacher_sum + (student_sum / teacher_sum).log(), gradient


class ReverseKL(DivergenceTerm):
    """Sum of q log(q / p) = d; its gradient, in `s`, is q (log(q / p) - d)."""

    SUMS = 3

    def partial_sums(self) -> list[Tensor]:
        difference = torch.sub(self.s, self.t, out=self.spare)
        self.s.exp_()
        self.t.exp_()
        return [self.s.sum(-1), self.t.sum(-1), torch.linalg.vecdot(self.s, difference)]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        student_sum, teacher_sum, cross = sums
        log_ratio = (teacher_sum / student_sum).log()
        mean = cross / student_sum
        gradient = self.s.div_(student_sum[:, None]).mul_(self.spare.sub_(mean[:, None]))
        return mean + log_ratio, gradient


class JensenShannon(DivergenceTerm):
    """Half of KL(p, m) + KL(q, m), m = (p + q) / 2; its gradient, in `s`, is q (log(q / m) - KL(q, m)) / 2."""

    SUMS = 2

    def partial_sums(self) -> list[Tensor]:
        return [torch.exp(self.s, out=self.spare).sum(-1), torch.exp(self.t, out=self.spare).sum(-1)]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        student_sum, teacher_sum = sums
        log_q, log_p = self.s.sub_(student_sum.log()[:, None]), self.t.sub_(teacher_sum.log()[:, None])
        log_m = torch.logaddexp(log_q, log_p, out=self.spare).sub_(math.log(2))
        log_p.sub_(log_m)  # log(p / m)
        log_q.sub_(log_m)  # log(q / m)
        kl_p = torch.linalg.vecdot(log_p.exp().mul_(log_m.exp()), log_p)
        q = torch.exp(log_m.add_(log_q), out=self.spare)
        # m is the mean of the normalized distributions, so its logarithm needs a second all-reduce.
        kl_p, kl_q = self.vocabulary.sum([kl_p, torch.linalg.vecdot(q, log_q)])
        return (kl_p + kl_q) / 2, log_q.sub_(kl_q[:, None]).mul_(q).div_(2)


class MassOutside(LossTerm):
    """-log Q, where Q is the student's probability of the ids that the teacher has too.

    Its gradient, in `spare`, is (1 - Q) x the student's distribution over the other ids, less (1 - Q) x that over the
    shared ids. `s` is prepared for a divergence over the shared ids alone: less their maximum, `EXCLUDED` elsewhere.
    """

    SUMS = 2

    def __init__(self, s: Tensor, spare: Tensor, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.inside, self.outside = spare[:, : vocabulary.shared], spare[:, vocabulary.shared :]
        self.spare = spare.copy_(s)
        # Maxima of their own: the exponentials of either part could all be 0 beside the other's.
        maximum, other_maximum = vocabulary.maximum([_row_maximum(part) for part in (self.inside, self.outside)])
        self.inside.sub_(maximum[:, None])
        self.outside.sub_(other_maximum[:, None])
        self.log_ratio = other_maximum - maximum
        s.copy_(spare)
        s[:, vocabulary.shared :] = EXCLUDED

    def partial_sums(self) -> list[Tensor]:
        self.spare.exp_()
        return [self.inside.sum(-1), self.outside.sum(-1)]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        inside_sum, outside_sum = sums
        log_ratio = self.log_ratio + (outside_sum / inside_sum).log()  # of (1 - Q) / Q
        mass = log_ratio.sigmoid()
        self.inside.mul_((-mass / inside_sum)[:, None])
        self.outside.mul_((mass / outside_sum)[:, None])
        return torch.nn.functional.softplus(log_ratio), self.spare


def _row_maximum(values: Tensor) -> Tensor:
    return values.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], -torch.inf)


@dataclass
class TopKKL(LossTerm):
    """Forward KL in which all tokens outside the top k are merged into one token.

    Its probability is r for the teacher, and u = 1 - (sum of q over the k) for the student. The gradient, in `s`, is
    q - p at the k, and q (1 - r / u) elsewhere.
    """

    SUMS = 3

    s: Tensor
    teacher: TopK
    vocabulary: Vocabulary

    def partial_sums(self) -> list[Tensor]:
        self.positions, is_local = self.vocabulary.local(self.teacher.ids)
        self.p = self.teacher.log_probs.exp() * is_local
        cross = (self.p * (self.teacher.log_probs - self.s.gather(-1, self.positions))).sum(-1)
        self.s.exp_()
        self.kept = _extract(self.s, self.positions, is_local)
        return [self.s.sum(-1), self.kept.sum(-1), cross]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        rest_sum, kept_sum, cross = sums
        total = rest_sum + kept_sum
        tail = self.teacher.tail
        r = tail.exp()
        # The rest has no gradient if the k are all tokens, or if the student gives it no probability.
        rest_term = torch.where((r > 0) & (rest_sum > 0), r * (tail - rest_sum.log()), 0.0)
        scale = torch.where(rest_sum > 0, 1 / total - r / rest_sum, 0.0)
        self.s.mul_(scale[:, None]).scatter_add_(-1, self.positions, self.kept / total[:, None] - self.p)
        return cross + total.log() + rest_term, self.s


def _extract(values: Tensor, positions: Tensor, is_local: Tensor) -> Tensor:
    """Return the values `[c, k]` at some positions, 0 for those of another slice, and set them to 0 in `values`."""
    taken = values.gather(-1, positions) * is_local
    values.scatter_add_(-1, positions, -taken)  # x - x is exactly 0
    return taken


def select_top_k(t: Tensor, k: int, vocabulary: Vocabulary) -> TopK:
    """Select the `k` most probable tokens over the whole vocabulary, and compute the probability of the rest.

    Args:
        t: `[c, v]` float32, logits of this rank's slice, less their maxima over all slices, divided by the
            temperature; overwritten.
    """
    values, positions = t.topk(min(k, vocabulary.size), -1)
    values, ids = vocabulary.gather(values), vocabulary.gather(positions + vocabulary.first)
    values, chosen = values.topk(k, -1)
    ids = ids.gather(-1, chosen)
    _extract(t.exp_(), *vocabulary.local(ids))
    (rest_sum,) = vocabulary.sum([t.sum(-1)])
    log_total = (rest_sum + values.exp().sum(-1)).log()
    return TopK(ids, values - log_total[:, None], rest_sum.log() - log_total)


DIVERGENCES: dict[Divergence, type[DivergenceTerm]] = {
    Divergence.forward_kl: ForwardKL,
    Divergence.reverse_kl: ReverseKL,
    Divergence.jensen_shannon: JensenShannon,
}
