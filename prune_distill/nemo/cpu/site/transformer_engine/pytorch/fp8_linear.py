"""FP8 matrix products as Transformer Engine 2.9 computes them, emulated: rounded operands, products in fp32.

An FP8 product sums exact products of 8-bit floats in fp32 and multiplies by both inverse scales. Here the operands are
rounded to FP8 and scaled back, and multiplied in fp32. What differs is the order of sums, and that Hopper's tensor
cores keep fewer bits of a forward product's sums (`use_split_accumulator=False` in common/recipe/__init__.py,
Float8CurrentScaling).

Names of files are Transformer Engine's, below transformer_engine/.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.recipe import Float8BlockScaling, Recipe

# Elements with one scale in Float8BlockScaling (pytorch/tensor/float8_blockwise_tensor.py, block_len).
BLOCK = 128


def check_dimensions(*tensors: Tensor) -> None:
    """Raise AssertionError for tensors that FP8 products do not take, as pytorch/utils.py:438 does."""
    for tensor in tensors:
        if prod(tensor.shape[:-1]) % 8 or tensor.shape[-1] % 16:
            raise AssertionError(
                "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and the "
                f"last dimension to be divisible by 16, but got tensor with dims={list(tensor.shape)}"
            )


def fp8_linear(x: Tensor, weight: Tensor, rounded_weight: Tensor, recipe: Recipe) -> Tensor:
    """Return `x W^T`, `[..., in]` -> `[..., out]`, with operands rounded here and in the backward pass.

    Args:
        weight: `[out, in]`, which gets the gradient.
        rounded_weight: its values from `round_weight`.
    """
    return _Fp8Linear.apply(x, weight, rounded_weight, recipe)


class _Fp8Linear(torch.autograd.Function):
    """The three products of pytorch/module/linear.py. The input is rounded along the dimension that each of them sums
    over: its features in the forward pass, its tokens for the weight's gradient; so is the output's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded_weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.recipe, ctx.weight_dtype = recipe, weight.dtype
        ctx.save_for_backward(x, rounded_weight)
        rounded = _round(x.flatten(0, -2), torch.float8_e4m3fn, recipe)
        return (rounded @ rounded_weight.t()).to(x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, rounded_weight = ctx.saved_tensors
        rows, inputs, recipe = grad.flatten(0, -2), x.flatten(0, -2), ctx.recipe
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (_round(rows, recipe.gradient_dtype, recipe) @ rounded_weight).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            by_token = _round(rows.t(), recipe.gradient_dtype, recipe)
            inputs_by_token = _round(inputs.t(), torch.float8_e4m3fn, recipe)
            grad_weight = (by_token @ inputs_by_token.t()).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None


@torch.no_grad()
def round_weight(weight: Tensor, recipe: Recipe) -> Tensor:
    """Round a weight `[out, in]` to e4m3, in fp32: with one scale, or one per 128 x 128 elements."""
    if not isinstance(recipe, Float8BlockScaling):
        return _round(weight, torch.float8_e4m3fn, recipe)
    rows, columns = weight.shape
    blocks = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK)).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    rounded = _scaled_round(blocks, blocks.abs().amax((1, 3), keepdim=True), torch.float8_e4m3fn, power_of_two=True)
    return rounded.flatten(2).flatten(0, 1)[:rows, :columns]


def _round(matrix: Tensor, dtype: torch.dtype, recipe: Recipe) -> Tensor:
    """Round `[rows, columns]` to FP8, in fp32: with one scale, or one per 128 neighbors in a row."""
    if not matrix.numel():
        return matrix.float()  # an expert without tokens
    if not isinstance(recipe, Float8BlockScaling):
        return _scaled_round(matrix, matrix.abs().amax(), dtype, power_of_two=False)
    columns = matrix.shape[1]
    blocks = F.pad(matrix, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    return _scaled_round(blocks, blocks.abs().amax(2, keepdim=True), dtype, power_of_two=True).flatten(1)[:, :columns]


def _scaled_round(values: Tensor, amax: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    """Scale values so that `amax` becomes the largest FP8 number, round them, and scale them back."""
    largest = torch.finfo(dtype).max
    scale = _scale(amax.float(), largest, values.dtype if power_of_two else torch.float32, power_of_two)
    # The casting kernels saturate; torch's cast makes NaN of what is too large.
    rounded = (values.float() * scale).clamp(-largest, largest).to(dtype)
    return rounded.float() * scale.reciprocal()


def _scale(amax: Tensor, largest: float, value_type: torch.dtype, power_of_two: bool) -> Tensor:
    """As `compute_scale_from_amax` (common/recipe/recipe_common.cuh)."""
    scale = (largest / amax).clamp(max=torch.finfo(value_type).max)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where(amax.isfinite() & (amax != 0), scale, 1.0)
