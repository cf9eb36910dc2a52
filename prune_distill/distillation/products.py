"""Matrix products of bf16 or fp16 tensors whose float32 results are not rounded to the inputs' type.

The kernels multiply bf16 exactly and add in float32 anyway; `left @ right` then rounds every sum to 8 bits, which a
loss between two similar distributions does not survive: the difference of two logits near 10 has an error of up to
0.06. `torch.mm(..., out_dtype=torch.float32)` keeps the sums (CUDA, PyTorch 2.8 and later; aten's `mm.dtype`). On a CPU
blocks of the inputs are converted to float32, which gives the same products.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

log = logging.getLogger("recipes.distillation")

# Columns or rows of the vocabulary whose float32 copies or products are in memory at a time: of 4,096 hidden units 128
# MiB.
BLOCK = 8192


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Compute out = left @ right.

    Args:
        left: `[n, k]`.
        right: `[k, m]`, of the type of `left`.
        out: `[n, m]` float32; overwritten.
    """
    if left.dtype is torch.float32:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":
        _multiply_blocks(left, right, out, 0)
        return out
    if _can_multiply(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.copy_(left @ right)


def add_product(left: Tensor, right: Tensor, total: Tensor) -> None:
    """Compute total += left @ right, with shapes and types as in `multiply`."""
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        _multiply_blocks(left, right, total, 1)
    elif _can_accumulate(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif _can_multiply(left.device, left.dtype):
        for start in range(0, left.shape[0], BLOCK):
            rows = slice(start, start + BLOCK)
            total[rows].add_(torch.mm(left[rows], right, out_dtype=torch.float32))
    else:
        total.add_(left @ right)


def _multiply_blocks(left: Tensor, right: Tensor, out: Tensor, beta: int) -> None:
    """Compute out = beta x out + left @ right in float32, in blocks along the longer side of `out`."""
    if out.shape[0] > out.shape[1]:
        left, right, out = right.t(), left.t(), out.t()
    left = left.float()
    for start in range(0, out.shape[1], BLOCK):
        columns = slice(start, start + BLOCK)
        out[:, columns].addmm_(left, right[:, columns].float(), beta=beta)


@functools.cache
def _can_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch has a product with a float32 result on the device."""
    sample = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(sample, sample, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        log.warning(
            "PyTorch %s cannot multiply %s into float32 on %s: logits are rounded to %s; 2.8 or later can",
            *(torch.__version__, dtype, device.type, dtype),
        )
        return False
    return True


@functools.cache
def _can_accumulate(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the product can be added to a float32 tensor in place, which the first versions refused."""
    if not _can_multiply(device, dtype):
        return False
    sample, total = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, sample, sample, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
