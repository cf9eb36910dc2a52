"""A chunk of the distillation loss by Triton kernels, for `distill.kd.implementation=triton`.

PyTorch's operations read or write every fp32 logit about 25 times for forward KL. Here one kernel reads the logits for
the sums of their rows, keeping maximum and sum together (Milakov and Gimelshein, arXiv 1805.02867), and another reads
them again and writes the gradient in the weight's type. Jensen-Shannon, whose mixture needs both normalized
distributions, reads them once more between the two. The formulas are those of `loss_terms`, and ranks that share the
vocabulary all-reduce as often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prune_distill.distillation.loss_chunk import Chunk, Head
from prune_distill.schema import Divergence

# Logits that a program handles at a time, and its warps. Not tuned on a GPU.
BLOCK, WARPS = 4096, 8
# Codes of the divergences in the kernels.
NO_DIVERGENCE, FORWARD_KL, REVERSE_KL, JENSEN_SHANNON = (tl.constexpr(code) for code in range(4))
CODES = {
    None: NO_DIVERGENCE.value,
    Divergence.forward_kl: FORWARD_KL.value,
    Divergence.reverse_kl: REVERSE_KL.value,
    Divergence.jensen_shannon: JENSEN_SHANNON.value,
}
# Where a maximum starts: below every logit, and finite, so that a difference of two of them is a number.
LOWEST = tl.constexpr(-1e30)
LN2 = tl.constexpr(math.log(2))


@dataclass
class Rows:
    """Values of each row of a chunk, `[c]` float32.

    Attributes:
        s_max, t_max: largest logits of student and teacher.
        s_sum, t_sum: sums of exp((logit - maximum) / temperature).
        cross: for KL, the sum of the weighting model's exponentials x its logit less the other's, / temperature.
        lm_sum: sum of exp(logit - maximum) of the student.
        at_label: the student's logit at the label.
    """

    s_max: Tensor
    t_max: Tensor
    s_sum: Tensor
    t_sum: Tensor
    cross: Tensor
    lm_sum: Tensor
    at_label: Tensor

    @property
    def distributions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.s_max, self.t_max, self.s_sum, self.t_sum


class TritonChunk(Chunk):
    """`Chunk` for whole distributions. The gradient has the weight's type."""

    def compute(self, rows: slice, needs_grad: bool) -> tuple[Tensor | float, Tensor | float, Tensor | None]:
        self.divergence = self.config.divergence if self.config.kd_weight else None
        s = t = self._logits("student", self.student, rows)
        if self.divergence is not None:
            assert isinstance(self.teacher, Head)
            t = self._logits("teacher", self.teacher, rows)
        label = torch.full((s.shape[0],), -1, device=s.device)
        at_label = s.new_zeros(s.shape[0])
        if self.config.lm_weight:
            assert self.labels is not None
            position, is_local = self.vocabulary.local(self.labels[rows])
            label = position.where(is_local, label)
            at_label = s.gather(-1, position[:, None])[:, 0] * is_local
        values = self._reduce(s, t, at_label)
        kd, center = self._loss(s, t, values)
        lm = values.lm_sum.log() + values.s_max - values.at_label if self.config.lm_weight else 0.0
        return kd, lm, self._gradient(s, t, values, center, label, rows) if needs_grad else None

    def _reduce(self, s: Tensor, t: Tensor, at_label: Tensor) -> Rows:
        """Reduce each row over the vocabulary of all ranks."""
        inverse = 1 / self.config.temperature
        local = s.new_empty(6, s.shape[0])
        _row_sums[(s.shape[0],)](
            *(s, t, local, *s.shape, inverse, CODES[self.divergence], bool(self.config.lm_weight), BLOCK),
            num_warps=WARPS,
        )
        own_s_max, own_t_max, s_sum, t_sum, cross, lm_sum = local
        s_max, t_max = self.vocabulary.maximum([own_s_max, own_t_max])
        s_scale, t_scale = ((own_s_max - s_max) * inverse).exp(), ((own_t_max - t_max) * inverse).exp()
        cross_scale = s_scale if self.divergence is Divergence.reverse_kl else t_scale
        sums = [s_sum * s_scale, t_sum * t_scale, cross * cross_scale, lm_sum * (own_s_max - s_max).exp(), at_label]
        return Rows(s_max, t_max, *self.vocabulary.sum(sums))

    def _loss(self, s: Tensor, t: Tensor, values: Rows) -> tuple[Tensor | float, Tensor]:
        """Return the divergence `[c]`, and what its gradient subtracts from log(q / p) or log(q / m), `[c]`."""
        if self.divergence is None:
            return 0.0, values.cross
        if self.divergence is Divergence.jensen_shannon:
            local = s.new_empty(2, s.shape[0])
            _jensen_shannon_sums[(s.shape[0],)](
                *(s, t, *values.distributions, local, *s.shape, 1 / self.config.temperature, BLOCK), num_warps=WARPS
            )
            kl_p, kl_q = self.vocabulary.sum([*local])
            return (kl_p + kl_q) / 2, kl_q
        # log(sum of exp(s / temperature)) less that of t
        ratio = (values.s_max - values.t_max) / self.config.temperature + (values.s_sum / values.t_sum).log()
        if self.divergence is Divergence.reverse_kl:
            mean = values.cross / values.s_sum
            return mean - ratio, mean
        return values.cross / values.t_sum + ratio, values.cross

    def _gradient(self, s: Tensor, t: Tensor, values: Rows, center: Tensor, label: Tensor, rows: slice) -> Tensor:
        config, mask = self.config, self.mask[rows].float()
        gradient = self._buffer("gradient", rows, self.student.weight.dtype)
        factors = config.kd_weight * config.temperature * mask, config.lm_weight * mask
        _gradients[(s.shape[0], triton.cdiv(s.shape[1], BLOCK))](
            *(s, t, gradient, *values.distributions, values.lm_sum, center, label, *factors),
            *(s.shape[1], 1 / config.temperature, CODES[self.divergence], bool(config.lm_weight), BLOCK),
            num_warps=WARPS,
        )
        return gradient


@triton.jit
def _row_sums(  # type: ignore[no-untyped-def]
    s_ptr,
    t_ptr,
    sums_ptr,
    rows,
    columns,
    inverse_temperature,
    DIVERGENCE: tl.constexpr,
    WITH_LM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce one row `[columns]` of both models' logits to the first six values of `Rows`, a column of `[6, rows]`."""
    row = tl.program_id(0)
    s_ptr += row.to(tl.int64) * columns
    t_ptr += row.to(tl.int64) * columns
    s_max = LOWEST
    t_max = LOWEST
    s_sum = 0.0
    t_sum = 0.0
    cross = 0.0
    lm_sum = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        s = tl.load(s_ptr + column, mask=inside, other=LOWEST)
        s_new = tl.maximum(s_max, tl.max(s, 0))
        s_exp = tl.where(inside, tl.exp((s - s_new) * inverse_temperature), 0.0)
        s_scale = tl.exp((s_max - s_new) * inverse_temperature)
        s_sum = s_sum * s_scale + tl.sum(s_exp, 0)
        if WITH_LM:
            lm_sum = lm_sum * tl.exp(s_max - s_new) + tl.sum(tl.where(inside, tl.exp(s - s_new), 0.0), 0)
        s_max = s_new
        if DIVERGENCE != NO_DIVERGENCE:
            t = tl.load(t_ptr + column, mask=inside, other=LOWEST)
            t_new = tl.maximum(t_max, tl.max(t, 0))
            t_exp = tl.where(inside, tl.exp((t - t_new) * inverse_temperature), 0.0)
            t_scale = tl.exp((t_max - t_new) * inverse_temperature)
            t_sum = t_sum * t_scale + tl.sum(t_exp, 0)
            t_max = t_new
            if DIVERGENCE == FORWARD_KL:
                cross = cross * t_scale + tl.sum(t_exp * (t - s), 0) * inverse_temperature
            if DIVERGENCE == REVERSE_KL:
                cross = cross * s_scale + tl.sum(s_exp * (s - t), 0) * inverse_temperature
    sums_ptr += row
    tl.store(sums_ptr, s_max)
    tl.store(sums_ptr + rows, t_max)
    tl.store(sums_ptr + 2 * rows, s_sum)
    tl.store(sums_ptr + 3 * rows, t_sum)
    tl.store(sums_ptr + 4 * rows, cross)
    tl.store(sums_ptr + 5 * rows, lm_sum)


@triton.jit
def _log_mixture(log_q, log_p):  # type: ignore[no-untyped-def]
    """log((q + p) / 2)."""
    larger = tl.maximum(log_q, log_p)
    return larger + tl.log(tl.exp(log_q - larger) + tl.exp(log_p - larger)) - LN2


@triton.jit
def _jensen_shannon_sums(  # type: ignore[no-untyped-def]
    s_ptr,
    t_ptr,
    s_max_ptr,
    t_max_ptr,
    s_sum_ptr,
    t_sum_ptr,
    sums_ptr,
    rows,
    columns,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """KL(p, m) and KL(q, m) of one row `[columns]`, a column of `[2, rows]`."""
    row = tl.program_id(0)
    s_ptr += row.to(tl.int64) * columns
    t_ptr += row.to(tl.int64) * columns
    s_max = tl.load(s_max_ptr + row)
    t_max = tl.load(t_max_ptr + row)
    log_s_sum = tl.log(tl.load(s_sum_ptr + row))
    log_t_sum = tl.log(tl.load(t_sum_ptr + row))
    kl_p = 0.0
    kl_q = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        log_q = (tl.load(s_ptr + column, mask=inside, other=0.0) - s_max) * inverse_temperature - log_s_sum
        log_p = (tl.load(t_ptr + column, mask=inside, other=0.0) - t_max) * inverse_temperature - log_t_sum
        log_m = _log_mixture(log_q, log_p)
        kl_p += tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0), 0)
        kl_q += tl.sum(tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0), 0)
    tl.store(sums_ptr + row, kl_p)
    tl.store(sums_ptr + rows + row, kl_q)


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    s_ptr,
    t_ptr,
    gradient_ptr,
    s_max_ptr,
    t_max_ptr,
    s_sum_ptr,
    t_sum_ptr,
    lm_sum_ptr,
    center_ptr,
    label_ptr,
    kd_factor_ptr,
    lm_factor_ptr,
    columns,
    inverse_temperature,
    DIVERGENCE: tl.constexpr,
    WITH_LM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient with respect to one block of a row of the student's logits, in the type of `gradient_ptr`."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * columns
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    student = tl.load(s_ptr + begin + column, mask=inside, other=0.0)
    s = student - tl.load(s_max_ptr + row)
    gradient = tl.zeros([BLOCK], tl.float32)
    if DIVERGENCE != NO_DIVERGENCE:
        teacher = tl.load(t_ptr + begin + column, mask=inside, other=0.0)
        t = teacher - tl.load(t_max_ptr + row)
        s_sum = tl.load(s_sum_ptr + row)
        t_sum = tl.load(t_sum_ptr + row)
        center = tl.load(center_ptr + row)
        q = tl.exp(s * inverse_temperature) / s_sum
        if DIVERGENCE == FORWARD_KL:
            gradient = q - tl.exp(t * inverse_temperature) / t_sum
        if DIVERGENCE == REVERSE_KL:
            gradient = q * ((student - teacher) * inverse_temperature - center)
        if DIVERGENCE == JENSEN_SHANNON:
            log_q = s * inverse_temperature - tl.log(s_sum)
            log_p = t * inverse_temperature - tl.log(t_sum)
            gradient = q * (log_q - _log_mixture(log_q, log_p) - center) / 2
        gradient *= tl.load(kd_factor_ptr + row)
    if WITH_LM:
        q = tl.exp(s) / tl.load(lm_sum_ptr + row)
        q = tl.where(column == tl.load(label_ptr + row), q - 1, q)
        gradient += q * tl.load(lm_factor_ptr + row)
    tl.store(gradient_ptr + begin + column, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
