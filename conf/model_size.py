"""How many parameters a model has, in all and on one rank.

Decoders of `conf.schema.Family`: grouped-query attention, with or without biases, norms of queries and keys, a gate.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Family, Shape


@dataclass(frozen=True)
class Traits:
    """What families differ in.

    Attributes:
        qk_norm: each head's queries and keys are normed (nemo/collections/llm/gpt/model/qwen3.py:45).
        qkv_bias: queries, keys and values have biases (qwen2.py:48).
        gated_mlp: the MLP has a gate beside its up projection; otherwise a plain activation (nemotron.py:48).
        norm_bias: norms have biases: LayerNorm instead of RMSNorm (nemotron.py:47).
    """

    qk_norm: bool = False
    qkv_bias: bool = False
    gated_mlp: bool = True
    norm_bias: bool = False


TRAITS = {
    Family.qwen3: Traits(qk_norm=True),
    Family.qwen2: Traits(qkv_bias=True),
    Family.llama: Traits(),
    Family.mistral: Traits(),
    Family.nemotron: Traits(gated_mlp=False, norm_bias=True),
}


def parameters(shape: Shape, family: Family) -> int:
    """All parameters, a tied embedding counted once: transformers' `num_parameters()`."""
    return rank_parameters(shape, family)


def rank_parameters(
    shape: Shape, family: Family, tensor_parallel: int = 1, pipeline_parallel: int = 1, stage: int = 0
) -> int:
    """Parameters that one rank holds.

    Weights are cut over the tensor-parallel ranks, norms are on each. The first pipeline stage has the embedding, the
    last one the final norm and the output layer: of its own, or a second copy of a tied embedding.

    Args:
        tensor_parallel: number of tensor-parallel ranks; divides heads, groups, FFN and vocabulary.
        pipeline_parallel: number of pipeline stages; divides the layers.
        stage: the rank's stage, from 0.
    """
    traits, head = TRAITS[family], shape.kv_channels
    vocabulary = shape.vocab_size * shape.hidden_size // tensor_parallel
    norm = shape.hidden_size * (2 if traits.norm_bias else 1)
    norms = 2 * norm + (2 * head if traits.qk_norm else 0)
    biases = (shape.num_attention_heads + 2 * shape.num_query_groups) * head if traits.qkv_bias else 0
    layer = (layer_weights(shape, family) + biases) // tensor_parallel + norms
    total = shape.num_layers // pipeline_parallel * layer
    if stage == 0:
        total += vocabulary
    if stage == pipeline_parallel - 1:
        total += norm + (0 if shape.tie_word_embeddings and pipeline_parallel == 1 else vocabulary)
    return total


def layer_weights(shape: Shape, family: Family) -> int:
    """Parameters of one layer's matrix products: queries, keys, values, projection; gate (if any), up, down."""
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    matrices = 3 if TRAITS[family].gated_mlp else 2
    return shape.hidden_size * (heads * shape.kv_channels + matrices * shape.ffn_hidden_size)


def product_weights(shape: Shape, family: Family) -> int:
    """Parameters that each token is multiplied with: all layers and the output layer, tied or not; no look-ups."""
    return shape.num_layers * layer_weights(shape, family) + shape.vocab_size * shape.hidden_size
