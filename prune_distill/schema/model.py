"""The model that is pruned: its folder, or its sizes where the demo trains one; and a teacher of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from prune_distill.schema.families import Family
from prune_distill.schema.fields import PositiveInt, placement
from prune_distill.schema.training import Parallel, Training


@dataclass
class Shape:
    """Sizes of a model as in its `config.json`, under Megatron's names."""

    # Number of layers.
    num_layers: PositiveInt = MISSING
    # Width of the hidden states.
    hidden_size: PositiveInt = MISSING
    # Width of the FFN of a dense layer.
    ffn_hidden_size: PositiveInt = MISSING
    # Attention heads per layer.
    num_attention_heads: PositiveInt = MISSING
    # Key-value heads per layer (grouped-query attention).
    num_query_groups: PositiveInt = MISSING
    # Width of an attention head.
    kv_channels: PositiveInt = MISSING
    # Entries of the vocabulary.
    vocab_size: PositiveInt = MISSING
    # Longest sequence in tokens.
    max_position_embeddings: PositiveInt = MISSING
    # Whether the output layer uses the weights of the input embedding.
    tie_word_embeddings: bool = False
    # Experts per layer of a mixture of experts, all of whose layers then have experts; null: a dense model.
    num_moe_experts: PositiveInt | None = None
    # Width of the FFN of an expert; null: a dense model.
    moe_ffn_hidden_size: PositiveInt | None = None
    # Experts that process each token; null: a dense model.
    moe_router_topk: PositiveInt | None = None


@dataclass
class DemoModel:
    """The teacher that stage `demo_model` trains, in the shape `model.shape`."""

    # Settings of its training.
    training: Training = field(default_factory=Training)


@dataclass
class ModelConfig:
    """The teacher: a Hugging Face folder or Hub id, or (`demo`) a model that the run trains first."""

    # Name of the teacher in reports and model cards.
    name: str = MISSING
    # Family of the model; with `hf_path` it may be left out, and is then read from config.json.
    family: Family = MISSING
    # A Hugging Face folder, or a Hub id such as Qwen/Qwen3-8B; null: `demo` trains the model.
    hf_path: str | None = None
    # Revision on the Hub: a commit, branch or tag; null: the default branch.
    revision: str | None = None
    # Sizes of the teacher; null: they are read from config.json, which must be available when the run is composed.
    shape: Shape | None = None
    # Trains a teacher instead of reading one; null: the teacher is at `hf_path`.
    demo: DemoModel | None = None


@dataclass
class TeacherConfig:
    """A teacher of its own, of any supported family and size, with the tokenizer of the model that is pruned."""

    # A Hugging Face folder, or a Hub id such as Qwen/Qwen3-32B; null: the model that is pruned is the teacher.
    hf_path: str | None = None
    # Revision on the Hub: a commit, branch or tag; null: the default branch.
    revision: str | None = None
    # Family of the teacher; null: it is read from config.json.
    family: Family | None = None
    # Sizes of the teacher; null: they are read from config.json, which must be available when the run is composed.
    shape: Shape | None = None
    # Layout in which stage cache_logits runs the teacher, for distill.teacher_logits=cached; null: distill.parallel. It
    # divides the model alone: context_parallel_size and expert_model_parallel_size must be 1.
    parallel: Parallel | None = placement(None)
    # Sequences per forward pass on a rank of cache_logits; null: distill.micro_batch_size.
    micro_batch_size: PositiveInt | None = placement(None)
