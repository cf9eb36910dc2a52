"""The stand-in's rotary embedding against Megatron's own, whole and partial."""

from __future__ import annotations

import pytest
import torch

from prune_distill.nemo import backend

backend.activate()

from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd  # noqa: E402
from transformer_engine.pytorch.attention import apply_rotary_pos_emb  # noqa: E402


@pytest.mark.parametrize("rotated", [16, 8])
def test_output_and_gradient_equal_megatrons(rotated: int) -> None:
    torch.manual_seed(0)
    t = torch.randn(5, 2, 3, 16, requires_grad=True)
    freqs = torch.randn(7, 1, 1, rotated // 2).repeat(1, 1, 1, 2)
    ours = apply_rotary_pos_emb(t, freqs, tensor_format="sbhd", fused=True)
    (gradient,) = torch.autograd.grad(ours.square().sum(), t)
    theirs = _apply_rotary_pos_emb_bshd(t, freqs[:5])
    (their_gradient,) = torch.autograd.grad(theirs.square().sum(), t)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, their_gradient)


def test_packed_sequences_begin_at_position_0() -> None:
    torch.manual_seed(0)
    t = torch.randn(9, 3, 16, requires_grad=True)
    freqs = torch.randn(5, 1, 1, 8).repeat(1, 1, 1, 2)
    ours = apply_rotary_pos_emb(t, freqs, tensor_format="thd", fused=True, cu_seqlens=torch.tensor([0, 4, 9]))
    (gradient,) = torch.autograd.grad(ours.square().sum(), t)
    parts = [_apply_rotary_pos_emb_bshd(part[:, None], freqs[: len(part)]) for part in (t[:4], t[4:])]
    theirs = torch.cat(parts).squeeze(1)
    (their_gradient,) = torch.autograd.grad(theirs.square().sum(), t)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, their_gradient)


def test_other_layouts_are_rejected() -> None:
    with pytest.raises(NotImplementedError, match="layout 'bshd'"):
        apply_rotary_pos_emb(torch.zeros(4, 1, 1, 8), torch.zeros(4, 1, 1, 8), tensor_format="bshd")
