"""Stand-in for `DotProductAttention` (megatron/core/extensions/transformer_engine.py:831)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .._refuse import refuse, refuse_options
from .base import BaseModule, divide
from .collectives import gather_sequence
from .rope import apply_rotary_pos_emb as apply_rotary_pos_emb  # Megatron imports it from here

# Maximum sequence length for `_plain_causal`.
_SHORT = 512
_MASKS = ("causal", "no_mask")
_NO_WINDOW = (None, (-1, -1), (-1, 0))


class DotProductAttention(BaseModule):
    """Multi-head or grouped-query attention without parameters, causal or unmasked, in the layout `[s, b, heads, d]`.

    Under context parallelism each of n ranks holds two of 2n chunks of the sequence, the r-th from the front and the
    r-th from the back, which balances causal work (megatron/core/utils.py, `get_batch_on_this_cp_rank`). Keys and
    values are gathered, queries are not.

    Args:
        num_attention_heads: of the whole model.
        kv_channels: size of a head, or the sizes of key and value heads.
        num_gqa_groups: key and value heads of the whole model; `num_attention_heads` if None.
        attention_dropout: probability, in training.
        qkv_format: must be "sbhd".
        attn_mask_type: "causal" or "no_mask"; other masks raise NotImplementedError.
        window_size: number of keys before a query's own that it attends to, and 0; None or -1 for all. Not supported
            with context parallelism.
        sequence_parallel: ignored.
        tp_size, tp_group: the tensor-parallel group, among whose ranks heads and groups are divided.
        get_rng_state_tracker: tracker whose default state dropout uses.
        layer_number: ignored; Transformer Engine scales by it if an environment variable is set, which raises here.
        attention_type: "self" or "cross".
        cp_group, cp_global_ranks, cp_stream: the context-parallel group; the other two are ignored.
        softmax_scale: factor of the scores; `1 / sqrt(kv_channels)` if None.
        **options: other options raise NotImplementedError.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: ProcessGroup | None = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: object = None,
        softmax_scale: float | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if int(os.getenv("NVTE_APPLY_QK_LAYER_SCALING", "0")):
            refuse("query-key layer scaling", "unset NVTE_APPLY_QK_LAYER_SCALING")
        window = None if window_size is None else tuple(window_size)
        if window not in _NO_WINDOW and (window[1] != 0 or attn_mask_type != "causal"):
            refuse(f"attention window {window} with the mask {attn_mask_type!r}", "use a causal one, (left, 0)")
        self.window = None if window in _NO_WINDOW else window[0]
        if qkv_format != "sbhd":
            refuse(f"attention in the layout {qkv_format!r} (packed sequences)", "use 'sbhd'")
        refuse_options("DotProductAttention", options)
        head_size = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        # Model Optimizer sets these three attributes when it prunes heads (modelopt/torch/nas/plugins/megatron.py:578).
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.num_gqa_groups_per_partition = divide(self.num_gqa_groups, tp_size)
        self.attention_dropout = attention_dropout
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(head_size)
        self.get_rng_state_tracker = get_rng_state_tracker
        self.attention_type = attention_type
        self.tp_group = tp_group
        self.cp_group = cp_group

    def set_context_parallel_group(
        self, cp_group: ProcessGroup | None, cp_global_ranks: list[int] | None = None, cp_stream: object = None
    ) -> None:
        """Set the context-parallel group after construction (nemo/collections/llm/gpt/model/base.py:438)."""
        self.cp_group = cp_group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: str | None = None,
        core_attention_bias_type: str = "no_bias",
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: object = None,
        max_seqlen_kv: object = None,
        **options: object,
    ) -> Tensor:
        """`[s, b, heads, d]`, `[s_kv, b, groups, d]`, `[s_kv, b, groups, d_v]` -> `[s, b, heads * d_v]`.

        Packed sequences (`qkv_format="thd"`) have no batch dimension. Each attends to itself, causally.

        Args:
            attention_mask: ignored, as in Transformer Engine for "causal" and "no_mask".
            cu_seqlens_q: first token of each packed sequence and the number of all tokens, `[sequences + 1]`; equal to
                `cu_seqlens_kv`.
            max_seqlen_q, max_seqlen_kv: ignored.

        Raises:
            NotImplementedError: for other masks and layouts, attention bias and unknown options.
        """
        if qkv_format == "thd":
            refuse_options("attention over packed sequences", options)
            return self._packed(query, key, value, attn_mask_type, cu_seqlens_q, cu_seqlens_kv)
        if qkv_format != "sbhd":
            refuse(f"attention in the layout {qkv_format!r}", "use 'sbhd' or 'thd'")
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type not in _MASKS:
            refuse(f"attention mask of type {mask_type!r}", f"use one of {_MASKS}")
        if core_attention_bias_type != "no_bias":
            refuse(f"attention bias ({core_attention_bias_type})", "leave it out")
        refuse_options("attention", {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv, **options})

        causal, mask = mask_type == "causal", None
        if self.cp_group is not None and dist.get_world_size(self.cp_group) > 1:
            if self.window is not None:
                refuse("sliding-window attention under context parallelism", "set context_parallel_size=1")
            key, value = _gather_keys_and_values(key, value, self.cp_group)
            mask = _rank_mask(query.shape[0], self.cp_group) if causal else None
            causal = False
        elif self.window is not None and key.shape[0] > self.window + 1:
            mask, causal = _windowed_rows(query.shape[0], key.shape[0], self.window), False
        dropout = self.attention_dropout if self.training else 0.0
        short = query.shape[0] == key.shape[0] <= _SHORT
        if causal and short and dropout == 0.0 and query.dtype is torch.float32:
            return _plain_causal(query, key, value, self.softmax_scale)
        with self._dropout_state(dropout):
            context = F.scaled_dot_product_attention(
                *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, mask_type: str | None, ends: Tensor | None, kv: Tensor | None
    ) -> Tensor:
        """`[t, heads, d]`, `[t, groups, d]`, `[t, groups, d_v]` -> `[t, heads * d_v]`."""
        if ends is None or kv is None or not torch.equal(ends, kv) or mask_type != "padding_causal":
            refuse(f"packed sequences with the mask {mask_type!r} or other keys", "use causal self-attention")
        if self.cp_group is not None and dist.get_world_size(self.cp_group) > 1:
            refuse("packed sequences under context parallelism", "set context_parallel_size=1")
        # Not `self.forward`, which is Megatron's.
        parts = [
            DotProductAttention.forward(self, *(t[start:end, None] for t in (query, key, value)), None, "causal")
            for start, end in itertools.pairwise(ends.tolist())
        ]
        return torch.cat(parts).squeeze(1)

    def _dropout_state(self, dropout: float) -> AbstractContextManager[Any]:
        if dropout == 0.0 or self.get_rng_state_tracker is None:
            return nullcontext()
        return self.get_rng_state_tracker().fork()


def _plain_causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute causal attention with two matmuls and a softmax: `[s, b, heads, d]`, groups -> `[s, b, heads * d_v]`.

    Faster than torch's blocked kernel on short sequences, especially if fp32 matmuls use bf16. Forward and
    backward of 1024 tokens, 4 heads of 64, CPU ms, blocked and plain: 35 and 16 at sequence length 256, 42 and 29
    at 512, 45 and 56 at 1024.
    """
    length, batch, heads, _ = query.shape
    groups = key.shape[2]
    # Concatenate a group's heads along the rows, so that keys and values are not copied for each head.
    rows = query.unflatten(2, (groups, -1)).permute(1, 2, 3, 0, 4).flatten(2, 3).flatten(0, 1)
    keys = key.permute(1, 2, 3, 0).flatten(0, 1)
    values = value.permute(1, 2, 0, 3).flatten(0, 1)
    mask = _causal_bias(length, heads // groups)
    context = torch.baddbmm(mask, rows, keys, alpha=scale).softmax(-1) @ values
    return context.reshape(batch, heads, length, -1).permute(2, 0, 1, 3).flatten(2)


@lru_cache(maxsize=4)
def _causal_bias(length: int, repeats: int) -> Tensor:
    """Return `[1, repeats * s, s]`: 0 for the keys that a row attends to, minus infinity elsewhere."""
    with torch.inference_mode(False):  # the cached tensor is also used in training
        return torch.full((length, length), -math.inf).triu(1).repeat(repeats, 1)[None]


def _gather_keys_and_values(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather keys and values in one collective: this rank's chunks -> the whole sequence in its natural order."""
    ranks = dist.get_world_size(group)
    gathered = gather_sequence(torch.cat((key, value), dim=-1), group)
    chunks = gathered.unflatten(0, (ranks, 2, -1))
    natural = torch.cat((chunks[:, 0].flatten(0, 1), chunks[:, 1].flip(0).flatten(0, 1)))
    keys, values = natural.split((key.shape[-1], value.shape[-1]), dim=-1)
    return keys, values


def _rank_mask(length: int, group: ProcessGroup) -> Tensor:
    return _causal_rows(length, dist.get_world_size(group), dist.get_rank(group))


@lru_cache(maxsize=4)
def _windowed_rows(queries: int, keys: int, left: int) -> Tensor:
    """Return `[s, s_kv]`: True if a query (one of the last) attends to a key: its own and the `left` before it."""
    own = keys - queries
    with torch.inference_mode(False):
        return torch.ones(queries, keys, dtype=torch.bool).tril(own).triu(own - left)


@lru_cache(maxsize=4)
def _causal_rows(length: int, ranks: int, rank: int) -> Tensor:
    """Return the rows `[length, length * ranks]` of the causal mask for a rank's two chunks; True: attended to."""
    half = length // 2
    front = torch.arange(rank * half, (rank + 1) * half)
    back = torch.arange((2 * ranks - 1 - rank) * half, (2 * ranks - rank) * half)
    return torch.cat((front, back))[:, None] >= torch.arange(length * ranks)
