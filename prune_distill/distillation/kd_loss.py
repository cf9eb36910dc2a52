"""Distillation losses from final hidden states, in chunks of tokens, so that the full logits are never in memory.

The loss includes both output layers. The forward pass computes the logits of a chunk, their loss, and immediately the
gradients of the student's hidden states and output weight; the next chunk reuses the memory. The peak memory does not
grow with the number of tokens, and the backward pass only multiplies by the incoming gradient. Under tensor parallelism
each rank has a slice of the vocabulary; per chunk the ranks all-reduce one maximum and one sum (Jensen-Shannon: two).

Computing gradients in the forward pass is the method of Liger Kernel's fused linear losses (arXiv 2410.10989). The
losses are defined in Hinton et al., arXiv 1503.02531 (temperature; its square is a factor, so that gradients keep their
size) and Agarwal et al., arXiv 2306.13649 (reverse KL and Jensen-Shannon).

In bf16, the logits and the sum of the weight's gradient are exact to float32 (`products`). The gradient with respect to
the logits is rounded to bf16 once, for the products with the weight and the hidden states.

This module uses PyTorch alone, no Megatron.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from prune_distill.distillation import products
from prune_distill.distillation.loss_chunk import Chunk, Head
from prune_distill.distillation.loss_terms import TopK, Vocabulary
from prune_distill.errors import InputError
from prune_distill.schema import KdConfig, LossImplementation


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
    shared: int | None = None,
) -> tuple[Tensor, TokenLosses]:
    """Compute the loss summed over tokens, and its parts per token.

    With `shared`, the divergence is that between both distributions renormalized over the shared ids, less the
    logarithm of the student's probability of all of them. With forward KL, that is the divergence from a teacher which
    gives the other ids no probability.

    Args:
        student: its tensors receive gradients if they require them. With a `group`, the gradient of `hidden` is the
            part of this slice; the caller sums it over the group (as Megatron's mappings do).
        teacher: None where `config.kd_weight` is 0.
        labels: `[n]` ids over the whole vocabulary; None where `config.lm_weight` is 0.
        mask: `[n]`, weight of each token in the sum.
        group: the ranks that share the vocabulary, in order of rank; None: this rank has the whole vocabulary.
        shared: the number of ids that the teacher has, the first of the student's; None: all. Rows of `teacher.weight`
            beyond do not count.

    Returns:
        A float32 scalar, the same on all ranks of the group; and `TokenLosses`, without the mask.
    """
    if not torch.is_grad_enabled():
        losses, _, _ = _compute(student, teacher, labels, mask, config, group, shared, (False, False))
        return _total(losses, mask, config), losses
    total, kd, lm = _Fused.apply(student.hidden, student.weight, teacher, labels, mask, config, group, shared)
    return total, TokenLosses(kd, lm)


class _Fused(torch.autograd.Function):
    """`_compute` as an autograd function, with the gradients that it returns."""

    @staticmethod
    def forward(ctx, hidden, weight, teacher, labels, mask, config, group, shared):  # type: ignore[no-untyped-def]
        needs_grad = ctx.needs_input_grad[:2]
        student = Head(hidden, weight)
        losses, ctx.grad_hidden, ctx.grad_weight = _compute(
            student, teacher, labels, mask, config, group, shared, needs_grad
        )
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
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _weight_gradient(weight: Tensor, grad_weight: Tensor, gradient: Tensor) -> Tensor:
    """Return the weight's gradient for autograd, or add it to Megatron's fp32 buffer without rounding.

    With the buffer, autograd's copy is ignored, or added if the weight is also the embedding, so it is zero then. The
    same as in Megatron's linear layer (megatron/core/tensor_parallel/layers.py:573-602).
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
    shared: int | None,
    needs_grad: Sequence[bool],
) -> tuple[TokenLosses, Tensor | None, Tensor | None]:
    """Compute the losses of all tokens, and the gradients of their sum: `[n, h]`, and `[v, h]` in float32."""
    hidden, weight = student.hidden, student.weight
    tokens = hidden.shape[0]
    kd, lm = (torch.zeros(tokens, device=hidden.device) for _ in range(2))
    grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad[1] else None
    chunk = _chunk_type(config)(student, teacher, labels, mask, config, Vocabulary(weight.shape[0], group, shared))
    for start in range(0, tokens, config.chunk_tokens):
        rows = slice(start, min(start + config.chunk_tokens, tokens))
        kd[rows], lm[rows], gradient = chunk.compute(rows, any(needs_grad))
        if gradient is None:
            continue
        gradient = gradient.to(weight.dtype)
        if grad_hidden is not None:
            torch.mm(gradient, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            products.add_product(gradient.t(), hidden[rows], grad_weight)
    return TokenLosses(kd.mul_(config.temperature**2), lm), grad_hidden, grad_weight


def check_implementation(config: KdConfig, device: str) -> None:
    """Refuse an implementation that this machine cannot run.

    Raises:
        InputError: Triton is not installed, or has no compiler for the device.
    """
    if config.implementation is not LossImplementation.triton:
        return
    key, fix = "distill.kd.implementation=triton", "set distill.kd.implementation=chunked"
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"{key}: the package triton is not installed; install it where PyTorch is, or {fix}")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(f"{key}: Triton needs a GPU, and this machine has none; {fix}")


def check_vocabularies(config: KdConfig, student: int, teacher: int) -> None:
    """Refuse vocabularies of different size that the implementation cannot compare.

    Raises:
        InputError: states both sizes.
    """
    implementation = config.implementation
    supported = implementation is LossImplementation.chunked or (
        implementation is LossImplementation.triton and student <= teacher
    )
    if student != teacher and not supported:
        raise InputError(
            f"distill.kd.implementation={implementation.value}: cannot compare the student's vocabulary of"
            f" {student} ids with the teacher's of {teacher}; set distill.kd.implementation=chunked"
        )


def _chunk_type(config: KdConfig) -> type[Chunk]:
    if config.implementation is not LossImplementation.triton:
        return Chunk
    # CPU builds of PyTorch come without Triton.
    from prune_distill.distillation.triton_chunk import TritonChunk

    return TritonChunk
