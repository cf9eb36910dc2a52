"""Stand-in for `apply_rotary_pos_emb` of transformer_engine/pytorch/attention.py.

Megatron calls it if `apply_rope_fusion` is set (megatron/core/extensions/transformer_engine.py:1939).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._refuse import refuse, refuse_options


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: object,
) -> Tensor:
    """Rotate the first `d_rot` of each head: `[s, b, heads, d]`, angles `[>= s, 1, 1, d_rot]` -> `[s, b, heads, d]`.

    The two halves of a head are rotated against each other, in fp32, as in the fused kernel. Packed sequences,
    `[t, heads, d]` with `tensor_format="thd"`, each begin at position 0; `cu_seqlens` are their first tokens and the
    number of all tokens.

    Raises:
        NotImplementedError: for other layouts and interleaved rotation.
    """
    refuse_options("apply_rotary_pos_emb", options)
    if tensor_format == "thd" and cu_seqlens is not None:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        positions = torch.arange(t.shape[0], device=t.device) - starts.repeat_interleave(lengths)
        angles = freqs[positions].float()
        return _Rotation.apply(t[:, None], angles.cos(), angles.sin())[:, 0]
    if tensor_format != "sbhd":
        refuse(f"rotary embedding in the layout {tensor_format!r}", "use 'sbhd', or 'thd' with cu_seqlens")
    angles = freqs[: t.shape[0]].float()
    return _Rotation.apply(t, angles.cos(), angles.sin())


class _Rotation(torch.autograd.Function):
    """Rotary embedding that reads and writes each half of a head once, in forward and backward."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(t, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # The transpose of a rotation swaps the sines and negates them.
        return _rotate(grad, cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    half = size // 2
    t32 = t.float()
    out = torch.empty_like(t32, memory_format=torch.contiguous_format)
    front, back = t32[..., :half], t32[..., half:size]
    torch.mul(front, cos[..., :half], out=out[..., :half]).addcmul_(back, sin[..., :half], value=-1)
    torch.mul(back, cos[..., half:], out=out[..., half:size]).addcmul_(front, sin[..., half:])
    out[..., size:] = t32[..., size:]
    return out.to(t.dtype)
