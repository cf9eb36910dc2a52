"""Stands for `apply_rotary_pos_emb` of transformer_engine/pytorch/attention.py.

Megatron calls it where `apply_rope_fusion` is on, as NeMo's Llama configs have it
(megatron/core/extensions/transformer_engine.py:1939).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._refuse import refuse, refuse_options


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, tensor_format: str = "sbhd", fused: bool = False, **options: object
) -> Tensor:
    """Rotates the first `d_rot` of each head: `[s, b, heads, d]`, angles `[>= s, 1, 1, d_rot]` -> `[s, b, heads, d]`.

    Halves are rotated against each other, in fp32, as the fused kernel does.

    Raises:
        NotImplementedError: for other layouts, interleaved rotation and packed sequences.
    """
    if tensor_format != "sbhd":
        refuse(f"rotary embedding in the layout {tensor_format!r}", "use 'sbhd'")
    refuse_options("apply_rotary_pos_emb", options)
    angles = freqs[: t.shape[0]].float()
    rotated, rest = t.split((angles.shape[-1], t.shape[-1] - angles.shape[-1]), dim=-1)
    front, back = rotated.float().chunk(2, dim=-1)
    turned = rotated.float() * angles.cos() + torch.cat((-back, front), dim=-1) * angles.sin()
    return torch.cat((turned.to(t.dtype), rest), dim=-1)
