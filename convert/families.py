"""Model families: the mapping between NeMo's and Hugging Face's tensors and configs.

A family is an entry here (`FAMILIES`) and one in `prune_distill.schema.families`. All of them have Hugging Face's
Llama-style names (transformers/models/llama/modeling_llama.py). In a NeMo checkpoint the layers are stacked along a
first dimension, the experts along a second one, and queries, keys and values are interleaved by group in one
matrix (megatron/core/transformer/attention.py, get_query_key_value_tensors).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from convert.nemo_context import Call, Reference
from convert.stored import StoredTensor, stack
from convert.torch_dist import TorchDistReader
from prune_distill.errors import InputError
from prune_distill.model import hf_config
from prune_distill.model.hf_config import HfConfig, rope_kind, traits_of
from prune_distill.model.hf_weights import expected_shapes

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Heads:
    """Numbers and size of the attention heads, which determine how queries, keys and values share a matrix."""

    num_attention_heads: int
    num_query_groups: int
    kv_channels: int


class Layout(Protocol):
    """Mapping between the rows of one NeMo matrix and those of Hugging Face matrices."""

    def to_nemo(self, parts: list[StoredTensor], heads: Heads, key: str) -> list[StoredTensor]:
        """Return the NeMo matrix as the chunks that Megatron saves, top to bottom."""

    def to_hf(self, matrix: StoredTensor, heads: Heads, names: list[str]) -> list[StoredTensor]:
        """Split the NeMo matrix into Hugging Face matrices."""


class Same:
    """The same matrix in both formats."""

    def to_nemo(self, parts: list[StoredTensor], heads: Heads, key: str) -> list[StoredTensor]:
        return parts

    def to_hf(self, matrix: StoredTensor, heads: Heads, names: list[str]) -> list[StoredTensor]:
        return [matrix]


class GateUp:
    """Gate above up projection, each a chunk (megatron/core/transformer/mlp.py, apply_swiglu_sharded_factory)."""

    def to_nemo(self, parts: list[StoredTensor], heads: Heads, key: str) -> list[StoredTensor]:
        return parts

    def to_hf(self, matrix: StoredTensor, heads: Heads, names: list[str]) -> list[StoredTensor]:
        half = matrix.shape[0] // 2
        return [matrix.take(0, half), matrix.take(half, half)]


class Qkv:
    """For each group: its queries, its key, its value."""

    def to_nemo(self, parts: list[StoredTensor], heads: Heads, key: str) -> list[StoredTensor]:
        queries, size = heads.num_attention_heads // heads.num_query_groups, heads.kv_channels
        blocks = [
            part.take(group * rows, rows)
            for group in range(heads.num_query_groups)
            for part, rows in zip(parts, (queries * size, size, size), strict=True)
        ]
        return [stack(blocks, key)]

    def to_hf(self, matrix: StoredTensor, heads: Heads, names: list[str]) -> list[StoredTensor]:
        queries, size = heads.num_attention_heads // heads.num_query_groups, heads.kv_channels
        starts = [group * (queries + 2) * size for group in range(heads.num_query_groups)]
        parts = ((0, queries * size), (queries * size, size), ((queries + 1) * size, size))
        return [
            stack((matrix.take(start + first, rows) for start in starts), name)
            for name, (first, rows) in zip(names, parts, strict=True)
        ]


@dataclass(frozen=True)
class Rule:
    """One NeMo tensor and the Hugging Face tensors that it consists of.

    Attributes:
        nemo: its key after `module.`; keys under `decoder.layers.` hold all layers.
        hf: names, with placeholders `{layer}` and `{expert}`.
        fused: whether it belongs to a Transformer Engine linear layer, which also has an `_extra_state`.
    """

    nemo: str
    hf: tuple[str, ...]
    layout: Layout = Same()  # noqa: RUF009  (it has no state)
    fused: bool = False

    @property
    def layers(self) -> bool:
        return self.nemo.startswith(LAYERS)

    @property
    def experts(self) -> bool:
        return "{expert}" in self.hf[0]


def _layer(nemo: str, *hf: str, layout: Layout | None = None, fused: bool = False) -> Rule:
    names = tuple(f"model.layers.{{layer}}.{name}" for name in hf)
    return Rule(LAYERS + nemo, names, layout or Same(), fused)


EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
OUTPUT = Rule("output_layer.weight", ("lm_head.weight",))
VOCABULARY = (EMBEDDING, OUTPUT)
_QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
ATTENTION = (
    EMBEDDING,
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    _layer(
        "self_attention.linear_qkv.weight",
        *(f"{name}.weight" for name in _QKV),
        layout=Qkv(),
        fused=True,
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", fused=True),
)
QKV_BIAS = (_layer("self_attention.linear_qkv.bias", *(f"{name}.bias" for name in _QKV), layout=Qkv()),)
QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
)
MLP_NORM = _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight")
DOWN = _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", fused=True)
GATED_MLP = (
    MLP_NORM,
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", layout=GateUp(), fused=True),
    DOWN,
)
PLAIN_MLP = (MLP_NORM, _layer("mlp.linear_fc1.weight", "mlp.up_proj.weight", fused=True), DOWN)
NORM_BIAS = (
    Rule("decoder.final_layernorm.bias", ("model.norm.bias",)),
    _layer("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias"),
    _layer("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias"),
)
_EXPERT = "mlp.experts.{expert}."
ROUTER = _layer("mlp.router.weight", "mlp.gate.weight")
EXPERTS = (
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    ROUTER,
    _layer(
        "mlp.experts.experts.linear_fc1.weight",
        f"{_EXPERT}gate_proj.weight",
        f"{_EXPERT}up_proj.weight",
        layout=GateUp(),
        fused=True,
    ),
    _layer("mlp.experts.experts.linear_fc2.weight", f"{_EXPERT}down_proj.weight", fused=True),
)


@dataclass(frozen=True)
class NemoClasses:
    """NeMo's classes for a family.

    Attributes:
        model: the model class.
        config: returns the config class for a `config.json`.
        settings: returns arguments of that class, in addition to those that all families share.
    """

    model: Reference
    config: Callable[[HfConfig], Reference]
    settings: Callable[[HfConfig], dict[str, object]]


def rules(config: HfConfig) -> tuple[Rule, ...]:
    """Return the rules for all tensors of a model with this `config.json`."""
    traits = traits_of(config)
    parts = (
        (True, ATTENTION),
        (traits.qk_norm, QK_NORM),
        (traits.qkv_bias, QKV_BIAS),
        (traits.norm_bias, NORM_BIAS),
        (True, EXPERTS if traits.experts else GATED_MLP if traits.gated_mlp else PLAIN_MLP),
        (not config.get("tie_word_embeddings", False), (OUTPUT,)),
    )
    return tuple(rule for present, group in parts if present for rule in group)


def _module(name: str) -> str:
    return f"nemo.collections.llm.gpt.model.{name}"


def _always(module: str, name: str) -> Callable[[HfConfig], Reference]:
    return lambda _: Reference(_module(module), name)


def _llama_config(config: HfConfig) -> Reference:
    return Reference(_module("llama"), "Llama31Config" if rope_kind(config) == "llama3" else "LlamaConfig")


def _llama_settings(config: HfConfig) -> dict[str, object]:
    settings: dict[str, object] = {"seq_length": config["max_position_embeddings"]}
    if rope_kind(config) == "llama3":
        # NeMo's importer only uses the factor (nemo/collections/llm/gpt/model/llama.py:717).
        rope = config["rope_scaling"]
        settings |= {
            "scale_factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "old_context_len": rope["original_max_position_embeddings"],
        }
    return settings


def _qwen2_settings(config: HfConfig) -> dict[str, object]:
    return {"seq_length": config["max_position_embeddings"]}


def _qwen3_settings(config: HfConfig) -> dict[str, object]:
    return {"max_position_embeddings": config["max_position_embeddings"]}


def _moe_settings(config: HfConfig) -> dict[str, object]:
    return _qwen3_settings(config) | {
        "num_moe_experts": config["num_experts"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        # Softmax over the selected experts equals softmax over all experts, normalized to a sum of 1.
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        # Requires Transformer Engine 2.1 on construction (megatron/core/transformer/transformer_config.py:1439);
        # training on GPUs may enable it.
        "moe_permute_fusion": False,
    }


def _mistral_settings(config: HfConfig) -> dict[str, object]:
    window = config["sliding_window"]
    return {
        "seq_length": config["max_position_embeddings"],
        # The window includes the token itself in transformers, but not in Transformer Engine; NeMo's importer ignores
        # the difference (nemo/collections/llm/gpt/model/mistral.py).
        "window_size": [window - 1, 0] if window else None,
        "cp_comm_type": "a2a" if window else None,
    }


def _nemotron_settings(config: HfConfig) -> dict[str, object]:
    return {"seq_length": config["max_position_embeddings"], "rotary_percent": config["partial_rotary_factor"]}


FAMILIES: dict[str, NemoClasses] = {
    "qwen3": NemoClasses(Reference(_module("qwen3"), "Qwen3Model"), _always("qwen3", "Qwen3Config"), _qwen3_settings),
    "qwen2": NemoClasses(Reference(_module("qwen2"), "Qwen2Model"), _always("qwen2", "Qwen2Config"), _qwen2_settings),
    "llama": NemoClasses(Reference(_module("llama"), "LlamaModel"), _llama_config, _llama_settings),
    "mistral": NemoClasses(
        Reference(_module("mistral"), "MistralModel"), _always("mistral", "MistralConfig7B"), _mistral_settings
    ),
    "nemotron": NemoClasses(
        Reference(_module("nemotron"), "NemotronModel"), _always("nemotron", "NemotronConfig"), _nemotron_settings
    ),
    "qwen3_moe": NemoClasses(
        Reference(_module("qwen3"), "Qwen3Model"), _always("qwen3", "Qwen3MoEConfig"), _moe_settings
    ),
}

# Arguments of a NeMo config by `dtype` of a config.json.
PRECISIONS = {
    "bfloat16": {"bf16": True, "fp16": False},
    "float16": {"bf16": False, "fp16": True},
    "float32": {"bf16": False, "fp16": False},
}


def read_config(folder: Path) -> HfConfig:
    """Read and normalize a folder's `config.json`.

    Raises:
        InputError: it cannot be read, or has settings that its family does not support in NeMo; lists all of them.
    """
    return hf_config.read_config(folder / "config.json")


def nemo_config(config: HfConfig, dtype: str) -> Call:
    """Return the NeMo config for a `config.json`, including settings that NeMo's importers ignore.

    The importer of Qwen3 assumes heads of 128 regardless of `head_dim` (nemo/collections/llm/gpt/model/qwen3.py:308);
    those of Qwen2 and Mistral untie tied embeddings.

    It has no generation config. NeMo only stores one, and saves it with transformers, which rejects some that models
    come with, such as `do_sample: false` with a temperature; NeMo then records a file that does not exist
    (nemo/lightning/io/mixin.py, _artifact_transform_save). `generation_config.json` is copied as a file.

    Args:
        dtype: torch's name of the weights' type, such as bfloat16.
    """
    family = FAMILIES[config["model_type"]]
    heads = read_heads(config)
    arguments = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads.num_attention_heads,
        "num_query_groups": heads.num_query_groups,
        "kv_channels": heads.kv_channels,
        "vocab_size": config["vocab_size"],
        "make_vocab_size_divisible_by": 1,
        "init_method_std": config["initializer_range"],
        "layernorm_epsilon": config.get("rms_norm_eps", config.get("norm_eps")),
        "rotary_base": config["rope_theta"],
        "seq_len_interpolation_factor": config["rope_scaling"]["factor"] if rope_kind(config) == "linear" else None,
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        **PRECISIONS[dtype],
        "params_dtype": Reference("torch", dtype),
        **family.settings(config),
    }
    return Call(family.config(config), arguments)


def read_heads(config: HfConfig) -> Heads:
    """Read the attention heads of a `config.json`."""
    return Heads(config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"])


def parts(config: HfConfig) -> Iterator[tuple[Rule, tuple[int, ...], list[str]]]:
    """Yield the parts of a model in Hugging Face's order, layer by layer.

    Yields:
        A rule, the index in its NeMo tensor ((), (layer,) or (layer, expert)), and the Hugging Face names.
    """
    tensors = rules(config)
    yield EMBEDDING, (), list(EMBEDDING.hf)
    for layer in range(config["num_hidden_layers"]):
        for rule in tensors:
            if not rule.layers:
                continue
            for expert in range(config["num_experts"] if rule.experts else 1):
                names = [name.format(layer=layer, expert=expert) for name in rule.hf]
                yield rule, (layer, expert) if rule.experts else (layer,), names
    yield from ((rule, (), list(rule.hf)) for rule in tensors if not rule.layers and rule is not EMBEDDING)


def hf_tensors(reader: TorchDistReader, config: HfConfig) -> Iterator[StoredTensor]:
    """Yield a NeMo checkpoint's tensors in Hugging Face's format, layer by layer.

    Args:
        config: the `config.json` of the result, with the checkpoint's sizes.

    Raises:
        InputError: a tensor is missing, or has another shape than the config requires.
    """
    heads = read_heads(config)
    expected = expected_shapes(config)
    for rule, index, names in parts(config):
        matrix = nemo_tensor(reader, rule, index)
        if rule in VOCABULARY:
            matrix = matrix.take(0, min(config["vocab_size"], matrix.shape[0]))  # without its padding
        for name, tensor in zip(names, rule.layout.to_hf(matrix, heads, names), strict=True):
            if tensor.shape != expected[name]:
                raise InputError(
                    f"{reader.folder}: {matrix.name} gives {name} the shape {list(tensor.shape)}, not"
                    f" {list(expected[name])} as in config.json"
                )
            yield StoredTensor(name, tensor.dtype, tensor.shape, tensor.rows)


def nemo_tensor(reader: TorchDistReader, rule: Rule, index: tuple[int, ...]) -> StoredTensor:
    """Return one layer's matrix from a checkpoint with stacked or with separate layers."""
    key = f"module.{rule.nemo}"
    if key not in reader.tensors and rule.layers:
        single = f"module.{LAYERS}{index[0]}.{rule.nemo.removeprefix(LAYERS)}"
        if single in reader.tensors:
            return reader.tensor(single, *index[1:])
    return reader.tensor(key, *index)


def count_layers(reader: TorchDistReader) -> int:
    """Count the layers of a checkpoint, stacked or separate.

    Raises:
        InputError: it has no layers.
    """
    norm = "self_attention.linear_qkv.weight"
    stacked = reader.tensors.get(f"module.{LAYERS}{norm}")
    named = sum(key.startswith(f"module.{LAYERS}") and key.endswith(f".{norm}") for key in reader.tensors)
    if not named:
        raise InputError(f"{reader.folder} has no tensor module.{LAYERS}{norm}")
    return stacked.shape[0] if stacked else named
