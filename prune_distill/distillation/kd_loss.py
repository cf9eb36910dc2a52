"""Distillation losses from final hidden states, in chunks of tokens: neither model's logits exist as a whole.

The loss includes both output layers. The forward pass computes the logits of a chunk, their loss, and at once the
gradients of the student's hidden states and output weight; the next chunk reuses the memory. So the peak does not grow
with the number of tokens, and the backward pass only multiplies by the incoming gradient. Under tensor parallelism each
rank holds a slice of the vocabulary; per chunk the ranks exchange one maximum and one sum (Jensen-Shannon: two sums).

Computing gradients in the forward pass is the method of Liger Kernel's fused linear losses (arXiv 2410.10989). The
losses are defined in Hinton et al., arXiv 1503.02531 (temperature; its square is a factor, so that gradients keep their
size) and Agarwal et al., arXiv 2306.13649 (reverse KL and Jensen-Shannon).

This module uses PyTorch alone, no Megatron.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from prune_distill.schema import Divergence, KdConfig


@dataclass(frozen=True)
class Head:
    """The end of a model: final hidden states `[n, h]`, and this rank's rows of the output weight `[v, h]`."""

    hidden: Tensor
    weight: Tensor


@dataclass(frozen=True)
class TopK:
    """A teacher's distribution, reduced to its most probable tokens.

    Attributes:
        ids: `[n, k]`, the k most probable tokens; no token is twice in a row.
        log_probs: `[n, k]` float32, their log-probabilities at the loss's temperature.
        tail: `[n]` float32, log of the summed probability of all other tokens; -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows], self.tail[rows])


class Vocabulary:
    """The slice of the vocabulary whose logits this rank holds. The ranks of a group have slices of equal size, in
    order of rank."""

    def __init__(self, size: int, group: ProcessGroup | None = None) -> None:
        self.size, self.group = size, group
        self.ranks = 1 if group is None else torch.distributed.get_world_size(group)
        self.first = 0 if group is None else size * torch.distributed.get_rank(group)

    def maximum(self, rows: Sequence[Tensor]) -> Tensor:
        """The maximum over the ranks of each row `[c]`: `[rows, c]`, in one exchange."""
        return self._exchange(rows, ReduceOp.MAX)

    def sum(self, rows: Sequence[Tensor]) -> Tensor:
        """The sum over the ranks of each row `[c]`: `[rows, c]`, in one exchange."""
        return self._exchange(rows, ReduceOp.SUM)

    def _exchange(self, rows: Sequence[Tensor], op: ReduceOp.RedOpType) -> Tensor:
        values = torch.stack(list(rows))
        if self.ranks > 1:
            torch.distributed.all_reduce(values, op, self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Concatenates every rank's `[c, k]`: `[c, ranks x k]`."""
        if self.ranks == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.ranks)]
        torch.distributed.all_gather(parts, values.contiguous(), self.group)
        return torch.cat(parts, -1)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of token ids in this slice, 0 for ids of another slice; and whether each is in this slice."""
        positions = ids.long() - self.first
        is_local = (positions >= 0) & (positions < self.size)
        return positions.where(is_local, 0), is_local


@dataclass(frozen=True)
class TokenLosses:
    """Losses of every token, `[n]` float32, detached: divergence x temperature², and cross-entropy.

    A term of weight 0 is not computed and 0 here.
    """

    kd: Tensor
    lm: Tensor


def distillation_loss(
    student: Head,
    teacher: Head | TopK | None,
    labels: Tensor | None,
    mask: Tensor,
    config: KdConfig,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, TokenLosses]:
    """The loss summed over tokens, and its parts token by token.

    Args:
        student: its tensors get gradients where they require them. With a `group`, the gradient of `hidden` is this
            slice's share; the caller sums it over the group (as Megatron's mappings do).
        teacher: None where `config.kd_weight` is 0.
        labels: `[n]` ids over the whole vocabulary; None where `config.lm_weight` is 0.
        mask: `[n]`, a token's weight in the sum.
        group: the ranks that hold the slices of the vocabulary, in order of rank; None: this rank holds all of it.

    Returns:
        A float32 scalar, the same on all ranks of the group; and `TokenLosses`, without the mask.
    """
    if not torch.is_grad_enabled():
        losses, _, _ = _compute(student, teacher, labels, mask, config, group, (False, False))
        return _total(losses, mask, config), losses
    total, kd, lm = _Fused.apply(student.hidden, student.weight, teacher, labels, mask, config, group)
    return total, TokenLosses(kd, lm)


class _Fused(torch.autograd.Function):
    """`_compute` as a function of autograd, with the gradients that it returns."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher, labels, mask, config, group):  # type: ignore[no-untyped-def]
        needs_grad = ctx.needs_input_grad[:2]
        student = Head(hidden, weight)
        losses, ctx.grad_hidden, ctx.grad_weight = _compute(student, teacher, labels, mask, config, group, needs_grad)
        ctx.weight = weight
        ctx.mark_non_differentiable(losses.kd, losses.lm)
        return _total(losses, mask, config), losses.kd, losses.lm

    @staticmethod
    def backward(ctx, gradient, *_):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None  # free them before the graph is
        if grad_hidden is not None:
            grad_hidden.mul_(gradient)
        if grad_weight is not None:
            grad_weight = _weight_gradient(ctx.weight, grad_weight, gradient)
        return grad_hidden, grad_weight, None, None, None, None, None


def _weight_gradient(weight: Tensor, grad_weight: Tensor, gradient: Tensor) -> Tensor:
    """The weight's gradient for autograd. Where Megatron has an fp32 buffer for it, adds it there without rounding.

    Autograd's copy is then ignored, or added again where the weight is also the embedding, so it is zero there; as in
    Megatron's linear layer (megatron/core/tensor_parallel/layers.py:573-602).
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return grad_weight.mul_(gradient).to(weight.dtype)
    weight.main_grad.add_(grad_weight.mul_(gradient))
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _total(losses: TokenLosses, mask: Tensor, config: KdConfig) -> Tensor:
    return ((config.kd_weight * losses.kd + config.lm_weight * losses.lm) * mask.float()).sum()


def _compute(
    student: Head,
    teacher: Head | TopK | None,
    labels: Tensor | None,
    mask: Tensor,
    config: KdConfig,
    group: ProcessGroup | None,
    needs_grad: Sequence[bool],
) -> tuple[TokenLosses, Tensor | None, Tensor | None]:
    """Computes the losses of all tokens, and the gradients of their sum: `[n, h]`, and `[v, h]` in float32."""
    hidden, weight = student.hidden, student.weight
    tokens = hidden.shape[0]
    kd, lm = (torch.zeros(tokens, device=hidden.device) for _ in range(2))
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad[1] else None
    chunk = _Chunk(student, teacher, labels, mask, config, Vocabulary(weight.shape[0], group))
    for start in range(0, tokens, config.chunk_tokens):
        rows = slice(start, min(start + config.chunk_tokens, tokens))
        kd[rows], lm[rows], gradient = chunk.compute(rows)
        gradient = gradient.to(weight.dtype)
        if grad_hidden is not None:
            torch.mm(gradient, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            _add_product(grad_weight, gradient.t(), hidden[rows])
    return TokenLosses(kd.mul_(config.temperature**2), lm), grad_hidden, grad_weight


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total is float32."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _Chunk:
    """The loss of a chunk of tokens and its gradient by the logits. All chunks use the same buffers."""

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

    def compute(self, rows: slice) -> tuple[Tensor | float, Tensor | float, Tensor]:
        """Divergence `[c]`, cross-entropy `[c]`, and the gradient `[c, v]` of their weighted and masked sum."""
        config = self.config
        s = self._logits("student", self.student, rows)
        t = self._logits("teacher", self.teacher, rows) if isinstance(self.teacher, Head) else None
        both = [s] if t is None else [s, t]
        for logits, most in zip(both, self.vocabulary.maximum([x.amax(-1) for x in both]), strict=True):
            logits.sub_(most[:, None])
        terms: dict[str, _Term] = {}
        partial_sums: list[Tensor] = []
        if config.lm_weight:  # before the divergence, which overwrites the logits
            assert self.labels is not None
            exponentials = self._buffer("exponentials", rows)
            terms["lm"] = _CrossEntropy(s, self.labels[rows], self.vocabulary, exponentials)
            partial_sums += terms["lm"].partial_sums()
        if config.kd_weight:
            terms["kd"] = self._divergence(s, t, rows)
            partial_sums += terms["kd"].partial_sums()
        # One exchange for both terms.
        sums = self.vocabulary.sum(partial_sums)
        losses: dict[str, Tensor] = {}
        gradients: list[Tensor] = []
        factors = {"lm": config.lm_weight, "kd": config.kd_weight * config.temperature}
        for name, term in terms.items():
            losses[name], gradient = term.finish(sums[: term.SUMS])
            sums = sums[term.SUMS :]
            gradients.append(gradient.mul_((factors[name] * self.mask[rows])[:, None]))
        total, *others = gradients
        for other in others:
            total.add_(other)
        return losses.get("kd", 0.0), losses.get("lm", 0.0), total

    def _divergence(self, s: Tensor, t: Tensor | None, rows: slice) -> _Term:
        """The divergence term from both models' logits, less their maxima; it overwrites them."""
        config = self.config
        s.div_(config.temperature)
        if t is None:
            assert isinstance(self.teacher, TopK)
            return _TopKKL(s, self.teacher[rows], self.vocabulary)
        t.div_(config.temperature)
        if config.top_k is not None:
            return _TopKKL(s, top_k_of(t, config.top_k, self.vocabulary), self.vocabulary)
        return _DIVERGENCES[config.divergence](s, t, self._buffer("difference", rows), self.vocabulary)

    def _logits(self, name: str, head: Head, rows: slice) -> Tensor:
        logits = self._buffer(name, rows)
        if head.weight.dtype is torch.float32:
            return torch.mm(head.hidden[rows], head.weight.t(), out=logits)
        return logits.copy_(head.hidden[rows] @ head.weight.t())

    def _buffer(self, name: str, rows: slice) -> Tensor:
        count = rows.stop - rows.start
        if name not in self.buffers:  # allocated for the first chunk, which is the largest
            self.buffers[name] = self.student.weight.new_empty(count, self.vocabulary.size, dtype=torch.float32)
        return self.buffers[name][:count]


class _Term(ABC):
    """A term of the loss over one chunk, computed in two steps with an exchange between the ranks in between.

    `s` and `t` are `[c, v]`: the student's and the teacher's logits less their maxima over the whole vocabulary,
    divided by the temperature. Gradients are by `s`. In the formulas, q = softmax(s) and p = softmax(t). Terms compute
    in place: they overwrite `s`, `t` and `spare`, a buffer `[c, v]`.
    """

    SUMS: int  # how many sums the term needs

    @abstractmethod
    def partial_sums(self) -> list[Tensor]:
        """Sums over this rank's slice of the vocabulary, `[c]` each."""

    @abstractmethod
    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The loss `[c]`, and its gradient by the logits `[c, v]`.

        Args:
            sums: `[SUMS, c]`, `partial_sums` summed over all slices of the vocabulary.
        """


@dataclass
class _CrossEntropy(_Term):
    """-log q[label]; its gradient, in `spare`, is q less 1 at the label.

    Only `partial_sums` reads `s`, and it doesn't change it: `s` may be overwritten afterwards.
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
class _Divergence(_Term):
    """A divergence between two distributions that are known in full."""

    s: Tensor
    t: Tensor
    spare: Tensor
    vocabulary: Vocabulary


class _ForwardKL(_Divergence):
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
        return cross / teacher_sum + student_sum.log() - teacher_sum.log(), gradient


class _ReverseKL(_Divergence):
    """Sum of q log(q / p) = d; its gradient, in `s`, is q (log(q / p) - d)."""

    SUMS = 3

    def partial_sums(self) -> list[Tensor]:
        difference = torch.sub(self.s, self.t, out=self.spare)
        self.s.exp_()
        self.t.exp_()
        return [self.s.sum(-1), self.t.sum(-1), torch.linalg.vecdot(self.s, difference)]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        student_sum, teacher_sum, cross = sums
        log_ratio = teacher_sum.log() - student_sum.log()
        mean = cross / student_sum
        gradient = self.s.div_(student_sum[:, None]).mul_(self.spare.sub_(mean[:, None]))
        return mean + log_ratio, gradient


class _JensenShannon(_Divergence):
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
        # m mixes the normalized distributions, so its logarithm needs an exchange of its own.
        kl_p, kl_q = self.vocabulary.sum([kl_p, torch.linalg.vecdot(q, log_q)])
        return (kl_p + kl_q) / 2, log_q.sub_(kl_q[:, None]).mul_(q).div_(2)


@dataclass
class _TopKKL(_Term):
    """Forward KL in which all tokens outside the top k count as one token, of probability r by the teacher.

    The student gives that token 1 - (its probabilities of the k) = u. The gradient, in `s`, is q - p at the k, and
    q (1 - r / u) elsewhere.
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
        self.kept = _take_out(self.s, self.positions, is_local)
        return [self.s.sum(-1), self.kept.sum(-1), cross]

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        rest_sum, kept_sum, cross = sums
        total = rest_sum + kept_sum
        tail = self.teacher.tail
        r = tail.exp()
        # The rest has no gradient where the k are all tokens, or where the student gives it no probability.
        rest_term = torch.where((r > 0) & (rest_sum > 0), r * (tail - rest_sum.log()), 0.0)
        scale = torch.where(rest_sum > 0, 1 / total - r / rest_sum, 0.0)
        self.s.mul_(scale[:, None]).scatter_add_(-1, self.positions, self.kept / total[:, None] - self.p)
        return cross + total.log() + rest_term, self.s


def _take_out(values: Tensor, positions: Tensor, is_local: Tensor) -> Tensor:
    """Returns the values `[c, k]` at some positions, 0 for those of another slice, and sets them to 0 in `values`."""
    taken = values.gather(-1, positions) * is_local
    values.scatter_add_(-1, positions, -taken)  # x - x is exactly 0
    return taken


def top_k_of(t: Tensor, k: int, vocabulary: Vocabulary) -> TopK:
    """The `k` most probable tokens of a distribution over the whole vocabulary, and the probability of the rest.

    Args:
        t: `[c, v]` float32, logits of this rank's slice, less their maxima over all slices, divided by the
            temperature; overwritten.
    """
    values, positions = t.topk(min(k, vocabulary.size), -1)
    values, ids = vocabulary.gather(values), vocabulary.gather(positions + vocabulary.first)
    values, chosen = values.topk(k, -1)
    ids = ids.gather(-1, chosen)
    _take_out(t.exp_(), *vocabulary.local(ids))
    (rest_sum,) = vocabulary.sum([t.sum(-1)])
    log_total = (rest_sum + values.exp().sum(-1)).log()
    return TopK(ids, values - log_total[:, None], rest_sum.log() - log_total)


_DIVERGENCES: dict[Divergence, type[_Divergence]] = {
    Divergence.forward_kl: _ForwardKL,
    Divergence.reverse_kl: _ReverseKL,
    Divergence.jensen_shannon: _JensenShannon,
}
