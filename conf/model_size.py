"""How many parameters a model has, in all and on one rank.

Decoders of `conf.schema.Family`: grouped-query attention, gated MLP, RMSNorm, and no biases
(nemo/collections/llm/gpt/model/llama.py:71 and qwen3.py:44; a `config.json` that asks for them is refused).
"""

from __future__ import annotations

from conf.schema import Family, Shape

# Families that norm each head's queries and keys (nemo/collections/llm/gpt/model/qwen3.py:45).
QK_NORM = (Family.qwen3,)


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
    hidden, head = shape.hidden_size, shape.kv_channels
    vocabulary = shape.vocab_size * hidden // tensor_parallel
    norms = 2 * hidden + (2 * head if family in QK_NORM else 0)
    total = shape.num_layers // pipeline_parallel * (layer_weights(shape) // tensor_parallel + norms)
    if stage == 0:
        total += vocabulary
    if stage == pipeline_parallel - 1:
        total += hidden + (0 if shape.tie_word_embeddings and pipeline_parallel == 1 else vocabulary)
    return total


def layer_weights(shape: Shape) -> int:
    """Parameters of one layer's matrix products: queries, keys, values, projection; gate, up, down."""
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    return shape.hidden_size * (heads * shape.kv_channels + 3 * shape.ffn_hidden_size)


def product_weights(shape: Shape) -> int:
    """Parameters that each token is multiplied with: all layers and the output layer, tied or not; no look-ups."""
    return shape.num_layers * layer_weights(shape) + shape.vocab_size * shape.hidden_size
