"""The stand-in's attention against transformers' eager attention and PyTorch's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

if torch.cuda.is_available():
    pytest.skip("the stand-in is for machines without CUDA", allow_module_level=True)

from prune_distill.nemo import backend

backend.activate()

from transformer_engine.pytorch import DotProductAttention  # noqa: E402

# fp32 softmax sums over up to 17 keys, with and without blocks.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
HEADS, GROUPS, SIZE, LENGTH, BATCH = 6, 2, 16, 17, 3


def _inputs(groups: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (HEADS, groups, groups)
    return [torch.randn(LENGTH, BATCH, count, SIZE, requires_grad=True) for count in heads]


@pytest.mark.parametrize("scale", [None, 0.4])
@pytest.mark.parametrize("mask_type", ["causal", "no_mask"])
@pytest.mark.parametrize("groups", [HEADS, GROUPS], ids=["mha", "gqa"])
def test_output_and_gradients_equal_transformers(groups: int, mask_type: str, scale: float | None) -> None:
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    ours = _inputs(groups)
    attention = DotProductAttention(HEADS, SIZE, groups, attn_mask_type=mask_type, softmax_scale=scale)
    grad = torch.randn(LENGTH, BATCH, HEADS * SIZE)
    output = attention(*ours)
    output.backward(grad)

    theirs = [t.detach().clone().requires_grad_() for t in ours]
    mask = torch.full((1, 1, LENGTH, LENGTH), -torch.inf).triu(1) if mask_type == "causal" else None
    module = SimpleNamespace(num_key_value_groups=HEADS // groups, training=False)
    heads_first = [t.permute(1, 2, 0, 3) for t in theirs]
    expected, _ = eager_attention_forward(module, *heads_first, mask, scaling=scale or SIZE**-0.5)
    expected = expected.flatten(2).transpose(0, 1)
    expected.backward(grad)
    torch.testing.assert_close(output, expected, **ROUNDING)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **ROUNDING)


def test_the_mask_type_of_the_call_takes_precedence() -> None:
    query, key, value = _inputs(GROUPS)
    attention = DotProductAttention(HEADS, SIZE, GROUPS, attn_mask_type="causal")
    output = attention(query, key, value, None, attn_mask_type="no_mask")
    heads_first = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    expected = F.scaled_dot_product_attention(*heads_first, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(output, expected, **ROUNDING)


def test_a_decoding_step_sees_all_keys() -> None:
    query, key, value = (t.detach() for t in _inputs(GROUPS))
    attention = DotProductAttention(HEADS, SIZE, GROUPS)
    last = attention(query[-1:], key, value, attn_mask_type="no_mask")
    torch.testing.assert_close(last, attention(query, key, value)[-1:], **ROUNDING)


def _within_window(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, left: int) -> torch.Tensor:
    """Naively, in fp64: `[s, b, heads, d]` -> `[s, b, heads * d]`."""
    q, k, v = (t.double().permute(1, 2, 0, 3) for t in (query, key, value))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT / math.sqrt(SIZE)
    own = torch.arange(key.shape[0] - query.shape[0], key.shape[0])[:, None]
    distance = own - torch.arange(key.shape[0])
    scores = scores.masked_fill((distance < 0) | (distance > left), -math.inf)
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


# The sequence length is 17: windows of one token, shorter, equal and longer.
@pytest.mark.parametrize("left", [0, 1, 5, 15, 16, 17, 40])
@pytest.mark.parametrize("groups", [HEADS, GROUPS], ids=["mha", "gqa"])
def test_a_window_is_a_tokens_own_key_and_those_before_it(groups: int, left: int) -> None:
    ours = _inputs(groups)
    output = DotProductAttention(HEADS, SIZE, groups, window_size=(left, 0))(*ours)
    grad = torch.randn_like(output)
    output.backward(grad)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    expected = _within_window(*theirs, left)
    expected.backward(grad.double())
    torch.testing.assert_close(output, expected.float(), **ROUNDING)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **ROUNDING)


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_packed_sequences_do_not_see_each_other(window: tuple[int, int] | None) -> None:
    ours = [t.detach()[:, 0].clone().requires_grad_() for t in _inputs(GROUPS)]
    attention = DotProductAttention(HEADS, SIZE, GROUPS, window_size=window)
    ends = torch.tensor([0, 1, 9, LENGTH], dtype=torch.int32)
    packed = {"qkv_format": "thd", "cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": 8, "max_seqlen_kv": 8}
    output = attention(*ours, None, attn_mask_type="padding_causal", **packed)
    grad = torch.randn_like(output)
    output.backward(grad)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    left = LENGTH if window is None else window[0]
    parts = [[t[start:end, None] for t in theirs] for start, end in ((0, 1), (1, 9), (9, LENGTH))]
    expected = torch.cat([_within_window(*part, left) for part in parts]).squeeze(1)
    expected.backward(grad.double())
    torch.testing.assert_close(output, expected.float(), **ROUNDING)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **ROUNDING)


@pytest.mark.parametrize("window", [None, (-1, -1), (-1, 0)])
def test_no_window_is_all_keys(window: tuple[int, int] | None) -> None:
    inputs = _inputs(GROUPS)
    output = DotProductAttention(HEADS, SIZE, GROUPS, window_size=window)(*inputs)
    torch.testing.assert_close(output, _within_window(*inputs, LENGTH).float(), **ROUNDING)


@pytest.mark.parametrize("left", [0, 5, 40])
def test_a_decoding_step_has_the_window_too(left: int) -> None:
    query, key, value = (t.detach() for t in _inputs(GROUPS))
    attention = DotProductAttention(HEADS, SIZE, GROUPS, window_size=(left, 0))
    last = attention(query[-1:], key, value, attn_mask_type="no_mask")
    torch.testing.assert_close(last, _within_window(query[-1:], key, value, left).float(), **ROUNDING)


def test_heads_are_counted_as_model_optimizer_sets_them() -> None:
    attention = DotProductAttention(8, 4, 4, tp_size=2)
    assert (attention.num_attention_heads, attention.num_gqa_groups, attention.num_gqa_groups_per_partition) == (
        8,
        4,
        2,
    )
    assert DotProductAttention(8, (64, 32)).softmax_scale == 1 / math.sqrt(64)


def test_dropout_works_in_training_alone() -> None:
    query, key, value = (t.detach() for t in _inputs(HEADS))
    value = torch.ones_like(value)
    attention = DotProductAttention(HEADS, SIZE, attention_dropout=0.5, attn_mask_type="no_mask")
    # Weights sum to 1; half of them, doubled, only on average: 3 * 17 * 6 rows, deviation < 0.5 each.
    dropped = attention(query, key, value)
    assert dropped.std() > 0.05
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(attention.eval()(query, key, value), torch.ones(LENGTH, BATCH, HEADS * SIZE), **ROUNDING)


@pytest.mark.parametrize(
    ("build", "call", "named"),
    [
        ({"window_size": (8, 8)}, {}, "window"),
        ({"window_size": (8, 0), "attn_mask_type": "no_mask"}, {}, "window"),
        ({"qkv_format": "thd"}, {}, "packed sequences"),
        ({"softmax_type": "learnable"}, {}, "softmax_type='learnable'"),
        ({}, {"attn_mask_type": "arbitrary"}, "'arbitrary'"),
        ({"attn_mask_type": "padding"}, {}, "'padding'"),
        ({}, {"core_attention_bias_type": "post_scale_bias"}, "attention bias"),
        ({}, {"cu_seqlens_q": torch.tensor([0, 17])}, "cu_seqlens_q"),
        ({}, {"qkv_format": "bshd"}, "layout 'bshd'"),
        ({}, {"qkv_format": "thd", "attn_mask_type": "padding"}, "packed sequences with the mask 'padding'"),
    ],
)
def test_unsupported_options_raise(build: dict[str, object], call: dict[str, object], named: str) -> None:
    with pytest.raises(NotImplementedError, match=named):
        DotProductAttention(HEADS, SIZE, GROUPS, **build)(*_inputs(GROUPS), **call)


def test_query_key_layer_scaling_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_APPLY_QK_LAYER_SCALING", "1")
    with pytest.raises(NotImplementedError, match="unset NVTE_APPLY_QK_LAYER_SCALING"):
        DotProductAttention(HEADS, SIZE)
