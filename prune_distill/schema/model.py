"""The teacher: its folder, or its sizes where the demo trains one."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from prune_distill.schema.training import Training


class Family(Enum):
    """Model families, named as `model_type` in a Hugging Face `config.json`."""

    qwen3 = "qwen3"
    qwen2 = "qwen2"
    llama = "llama"
    mistral = "mistral"
    nemotron = "nemotron"
    qwen3_moe = "qwen3_moe"


@dataclass
class Shape:
    """What a Hugging Face `config.json` says of the model's size, in Megatron's terms."""

    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    kv_channels: int = MISSING
    vocab_size: int = MISSING
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = False
    # Of a mixture of experts: how many a layer has, the FFN of each, and how many a token goes through; null: a dense
    # model. All layers of a mixture are of experts, and none has an FFN of `ffn_hidden_size`.
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None


@dataclass
class DemoModel:
    """The teacher that stage `demo_model` makes, its shape being `model.shape`."""

    training: Training = field(default_factory=Training)


@dataclass
class ModelConfig:
    """The teacher: a Hugging Face folder or Hub id, or (`demo`) one made on the spot."""

    name: str = MISSING
    family: Family = MISSING
    # A folder, or a Hub id such as Qwen/Qwen3-8B; null where `demo` makes the model.
    hf_path: str | None = None
    # Hub revision (commit, branch or tag); null: the default branch.
    revision: str | None = None
    # Null: read from config.json, which then has to be at hand when the run is composed.
    shape: Shape | None = None
    demo: DemoModel | None = None
