"""The supported model families, and how the transformers class of each differs from the others.

All of them are decoders with grouped-query attention and Hugging Face's Llama-style tensor names. A new family takes an
entry here and one in `convert/families.py`, which says what NeMo makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Family(Enum):
    """The supported model families, by their `model_type` in a Hugging Face `config.json`."""

    qwen3 = "qwen3"
    qwen2 = "qwen2"
    llama = "llama"
    mistral = "mistral"
    nemotron = "nemotron"
    qwen3_moe = "qwen3_moe"

    @property
    def traits(self) -> Traits:
        return _TRAITS[self]


@dataclass(frozen=True)
class Traits:
    """What families differ in; line numbers are those of nemo/collections/llm/gpt/model.

    Attributes:
        defaults: defaults of transformers for keys that are missing in a `config.json`
            (transformers/models/*/configuration_*.py).
        qk_norm: each head's queries and keys are normed (qwen3.py:45).
        qkv_bias: queries, keys and values have biases (qwen2.py:48).
        gated_mlp: the MLP has a gate next to its up projection; otherwise a plain activation (nemotron.py:48).
        norm_bias: norms have biases: LayerNorm instead of RMSNorm (nemotron.py:47).
        experts: every layer has a router and experts instead of an MLP.
        activation: `hidden_act`.
        partial_rope: only a part of each head is rotated (`partial_rotary_factor`).
        window: attention has a sliding window in every layer where `sliding_window` is set.
        heads_divide_hidden: transformers 5 wants `hidden_size` to be a multiple of the heads, whatever `head_dim` says
            (transformers/models/llama/configuration_llama.py, validate_architecture).
        rope_kinds: scalings of the rotary embedding besides the default one that NeMo and transformers both apply, and
            apply alike. Line numbers of transformers 4.57.6, models/FAMILY/modeling_FAMILY.py, FamilyRotaryEmbedding:
            - llama :78, qwen2 :278, qwen3 :304, mistral :275 and qwen3_moe :373 look the kind of `config.rope_scaling`
              up in modeling_rope_utils.py, ROPE_INIT_FUNCTIONS; so they do in 5.24 with `config.rope_parameters`;
            - nemotron :102 ignores it, and 5.24 (:92) applies it: the same file describes two models;
            - NeMo passes `seq_len_interpolation_factor` on in every family (base.py), and Megatron-Core divides
              positions by it (megatron/core/models/common/embeddings/rotary_pos_embedding.py): kind linear. The kind
              llama3 is only in NeMo's Llama31Config (llama.py).
    """

    defaults: Mapping[str, object] = field(default_factory=dict)
    qk_norm: bool = False
    qkv_bias: bool = False
    gated_mlp: bool = True
    norm_bias: bool = False
    experts: bool = False
    activation: str = "silu"
    partial_rope: bool = False
    window: bool = False
    heads_divide_hidden: bool = False
    rope_kinds: tuple[str, ...] = ("linear",)


_TRAITS = {
    Family.qwen3: Traits({"num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6}, qk_norm=True),
    Family.qwen2: Traits({"num_key_value_heads": 32, "rms_norm_eps": 1e-6}, qkv_bias=True),
    Family.llama: Traits({"rms_norm_eps": 1e-6}, heads_divide_hidden=True, rope_kinds=("linear", "llama3")),
    Family.mistral: Traits({"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096}, window=True),
    Family.nemotron: Traits(
        {"norm_eps": 1e-5, "initializer_range": 0.0134, "partial_rotary_factor": 0.5},
        gated_mlp=False,
        norm_bias=True,
        activation="relu2",
        partial_rope=True,
        rope_kinds=(),
    ),
    Family.qwen3_moe: Traits(
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "norm_topk_prob": False}, qk_norm=True, experts=True
    ),
}
