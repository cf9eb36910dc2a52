"""Count the parameters of a model, in total and on one rank.

Decoders of `prune_distill.schema.Family`: grouped-query attention, with or without biases, query and key norms and a
gate; an MLP in each layer, or a router and experts.
"""

from __future__ import annotations

from typing import TypedDict

from prune_distill.schema import Family, Shape

# Fields of `Shape` that only MoE models have.
EXPERT_SIZES = ("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk")


class ModelSizes(TypedDict, total=False):
    """A model's sizes, by their names in reports."""

    params: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int


def parameters(shape: Shape, family: Family) -> int:
    """Count all parameters, a tied embedding once, like transformers' `num_parameters()`."""
    return rank_parameters(shape, family)


def active_parameters(shape: Shape, family: Family) -> int:
    """Count the active parameters of a token: of the experts only those to which it is routed."""
    idle = expert_weights(shape, family) * ((shape.num_moe_experts or 0) - (shape.moe_router_topk or 0))
    return parameters(shape, family) - shape.num_layers * idle


def rank_parameters(
    shape: Shape,
    family: Family,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    stage: int = 0,
    expert_parallel: int = 1,
) -> int:
    """Count the parameters on one rank.

    Weights are sharded over tensor-parallel ranks. Norms, the router and the experts are on each of them; experts
    are distributed over expert-parallel ranks. The first pipeline stage has the embedding, the last one the
    final norm and the output layer, or a second copy of a tied embedding.

    Args:
        tensor_parallel: number of tensor-parallel ranks; divides heads, groups, FFN and vocabulary.
        pipeline_parallel: number of pipeline stages; divides the layers.
        stage: the rank's stage, from 0.
        expert_parallel: number of expert-parallel ranks; divides the experts.
    """
    traits, head = family.traits, shape.kv_channels
    vocabulary = shape.vocab_size * shape.hidden_size // tensor_parallel
    norm = shape.hidden_size * (2 if traits.norm_bias else 1)
    norms = 2 * norm + (2 * head if traits.qk_norm else 0)
    biases = (shape.num_attention_heads + 2 * shape.num_query_groups) * head if traits.qkv_bias else 0
    router = shape.hidden_size * (shape.num_moe_experts or 0)
    mlp = 0 if shape.num_moe_experts else _mlp_weights(shape.ffn_hidden_size, shape, family)
    layer = (_attention_weights(shape) + mlp + biases) // tensor_parallel + norms + router
    total = shape.num_layers // pipeline_parallel * layer
    total += rank_experts(shape, family, pipeline_parallel, expert_parallel)
    if stage == 0:
        total += vocabulary
    if stage == pipeline_parallel - 1:
        total += norm + (0 if shape.tie_word_embeddings and pipeline_parallel == 1 else vocabulary)
    return total


def rank_experts(shape: Shape, family: Family, pipeline_parallel: int = 1, expert_parallel: int = 1) -> int:
    """Count the parameters of experts on one rank; 0 for a dense model."""
    layer_params = (shape.num_moe_experts or 0) // expert_parallel * expert_weights(shape, family)
    return shape.num_layers // pipeline_parallel * layer_params


def rank_product_weights(
    shape: Shape, family: Family, tensor_parallel: int = 1, pipeline_parallel: int = 1, expert_parallel: int = 1
) -> int:
    """Count the parameters of the layers' matmuls on one rank, the router left out."""
    mlp = 0 if shape.num_moe_experts else _mlp_weights(shape.ffn_hidden_size, shape, family)
    layer = (_attention_weights(shape) + mlp) // tensor_parallel
    return shape.num_layers // pipeline_parallel * layer + rank_experts(
        shape, family, pipeline_parallel, expert_parallel
    )


def expert_weights(shape: Shape, family: Family) -> int:
    """Count the parameters of one expert of one layer; 0 for a dense model."""
    return _mlp_weights(shape.moe_ffn_hidden_size or 0, shape, family)


def layer_weights(shape: Shape, family: Family) -> int:
    """Count the parameters of one layer's matmuls for a token: queries, keys, values, projection; gate (if any), up,
    down, or the router and the selected experts."""
    if not shape.num_moe_experts:
        return _attention_weights(shape) + _mlp_weights(shape.ffn_hidden_size, shape, family)
    router, chosen = shape.hidden_size * shape.num_moe_experts, shape.moe_router_topk or 0
    return _attention_weights(shape) + router + chosen * expert_weights(shape, family)


def _attention_weights(shape: Shape) -> int:
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    return shape.hidden_size * heads * shape.kv_channels


def _mlp_weights(channels: int, shape: Shape, family: Family) -> int:
    return shape.hidden_size * channels * (3 if family.traits.gated_mlp else 2)


def product_weights(shape: Shape, family: Family) -> int:
    """Count the parameters of all matmuls of a token: all layers and the output layer, tied or not; no look-ups."""
    return shape.num_layers * layer_weights(shape, family) + shape.vocab_size * shape.hidden_size
