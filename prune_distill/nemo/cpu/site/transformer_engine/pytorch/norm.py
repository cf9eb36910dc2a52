"""Stand-in for `transformer_engine.pytorch.LayerNorm` and `RMSNorm`.

Megatron builds them at megatron/core/extensions/transformer_engine.py:218 and :229. As in Transformer Engine,
statistics and products are computed in fp32, and the result is cast to the input's type.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import parameter_options


class _RMSNormFunction(torch.autograd.Function):
    """`x / rms(x) * gamma` over the last dimension, with a fused backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gamma, rstd)
        return (x * rstd).mul_(gamma).to(x.dtype)  # fp32, as `rstd` is

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gamma, rstd = ctx.saved_tensors
        normed = x * rstd
        grad_by_normed = grad * normed
        projection = (grad_by_normed @ gamma).div_(x.shape[-1]).unsqueeze(-1)
        grad_gamma = grad_by_normed.flatten(0, -2).sum(0)
        del grad_by_normed  # fp32: with bf16 activations, twice as large as what the layer saves
        grad_x = (grad * gamma).addcmul_(normed, projection, value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_gamma, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered_gamma: bool) -> Tensor:
    """Normalize `[..., h]` by its root mean square and multiply by `weight` `[h]` (or `1 + weight`)."""
    gamma = weight.float() + 1 if zero_centered_gamma else weight.float()
    return _RMSNormFunction.apply(x, gamma, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, zero_centered_gamma: bool) -> Tensor:
    """Normalize `[..., h]` to mean 0 and variance 1, multiply by `weight` `[h]` (or `1 + weight`), add `bias` `[h]`."""
    gamma = weight.float() + 1 if zero_centered_gamma else weight.float()
    return F.layer_norm(x.float(), weight.shape, gamma, bias.float(), eps).to(x.dtype)


def new_gamma(size: int, zero_centered: bool, sequence_parallel: bool, options: dict[str, Any]) -> nn.Parameter:
    """Create a norm's weight `[size]`; Megatron sums the gradients of parameters marked `sequence_parallel`."""
    weight = nn.Parameter(torch.full((size,), 0.0 if zero_centered else 1.0, **options))
    weight.sequence_parallel = sequence_parallel
    return weight


def new_beta(size: int, sequence_parallel: bool, options: dict[str, Any]) -> nn.Parameter:
    """Create a norm's bias `[size]`."""
    bias = nn.Parameter(torch.zeros(size, **options))
    bias.sequence_parallel = sequence_parallel
    return bias


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension. As in Transformer Engine 1.9, it has no `_extra_state`.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean square.
        sequence_parallel: mark the weight, so that Megatron sums its gradient over the tensor-parallel group.
        params_dtype: type of the weight; PyTorch's default type if None.
        zero_centered_gamma: store `gamma - 1`.
        device: the CPU or "meta".
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        options = parameter_options(params_dtype, device)
        self.weight = new_gamma(hidden_size, zero_centered_gamma, sequence_parallel, options)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` -> the same shape and type."""
        return rms_norm(x, self.weight, self.eps, self.zero_centered_gamma)


class LayerNorm(nn.Module):
    """Layer norm over the last dimension; arguments as in `RMSNorm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        options = parameter_options(params_dtype, device)
        self.weight = new_gamma(hidden_size, zero_centered_gamma, sequence_parallel, options)
        self.bias = new_beta(hidden_size, sequence_parallel, options)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` -> the same shape and type."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.zero_centered_gamma)
