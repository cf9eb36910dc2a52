"""What a teacher's Hugging Face `config.json` says of its family and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.schema import Family, ModelConfig, Shape

# Megatron's term by the term of Hugging Face; `shape_from` fills in those that a config.json may leave out.
_TERMS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}
_MOE_TERMS = {
    "num_moe_experts": "num_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
}


def read_shape(model: ModelConfig) -> tuple[Shape | None, list[str]]:
    """The teacher's shape, from the config or from `config.json`, and the faults found on the way.

    A `config.json` that is at hand (a local folder, or a Hub id in the local cache) has to agree with what is set.
    """
    if model.hf_path is None:
        return model.shape, []
    path = _config_json(model.hf_path, model.revision)
    if path is None:
        return model.shape, [] if model.shape is not None else [_nowhere(model.hf_path)]
    try:
        config = json.loads(path.read_text())
        found = shape_from(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        return model.shape, [f"{path} does not describe a model ({reason}); set model.hf_path to a whole folder"]
    faults = _family_faults(model, config, path)
    faults += [f"{path} asks for {fault}" for fault in unsupported(config)]
    if model.shape is None:
        return found, faults
    return model.shape, faults + _shape_faults(model.shape, found, path)


def read_family(hf_path: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The family that a model's `config.json` names, and the faults where it names none that is known."""
    known = ", ".join(family.value for family in Family)
    path = _config_json(hf_path, revision)
    if path is None:
        return None, [
            f"model.family is not set, and there is no config.json to read it from (model.hf_path={hf_path} is no "
            "folder here and not in the local Hub cache); set model.hf_path to a local folder, download the model "
            f"first, or set model.family to one of {known}"
        ]
    try:
        found = json.loads(path.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        return None, [f"{path} does not describe a model ({reason}); set model.hf_path to a complete folder"]
    if found not in {family.value for family in Family}:
        return None, [f"{path} says model_type {found}; models of the families {known} can be pruned and distilled"]
    return found, []


# What transformers takes for what a `config.json` leaves out, by `model_type`
# (transformers/models/*/configuration_*.py).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "rms_norm_eps": 1e-6},
    "qwen2": {"num_key_value_heads": 32, "rms_norm_eps": 1e-6},
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    "nemotron": {"norm_eps": 1e-5, "initializer_range": 0.0134, "partial_rotary_factor": 0.5},
    "qwen3_moe": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
}


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json`'s content with transformers' own values for what it leaves out."""
    return {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}


def shape_from(config: dict[str, Any]) -> Shape:
    """A shape from the content of a `config.json`.

    Raises:
        KeyError: a term that is needed is absent.
    """
    config = with_defaults(config)
    heads = config["num_attention_heads"]
    values = dict(config)
    values["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    # The head size is a setting of its own in Qwen3; Llama leaves it out where it is the quotient.
    values["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    values.setdefault("tie_word_embeddings", False)
    terms = _TERMS | (_MOE_TERMS if config.get("model_type") == "qwen3_moe" else {})
    return Shape(**{ours: values[theirs] for ours, theirs in terms.items()})


def may_be_hub_id(hf_path: str) -> bool:
    """Whether a string can be `owner/name` of the Hub: not an absolute path, nor one that says it is relative."""
    owner, _, name = hf_path.partition("/")
    return bool(owner and name) and "/" not in name and "*" not in hf_path and owner[0] not in ".~"


def _config_json(hf_path: str, revision: str | None) -> Path | None:
    folder = Path(hf_path).expanduser()
    if folder.exists():
        return folder / "config.json"
    if not may_be_hub_id(hf_path):
        return None
    # Costs half a second, so only where it is needed.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(hf_path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _nowhere(hf_path: str) -> str:
    return (
        f"model.shape is null and there is no config.json to read it from (model.hf_path={hf_path} is no folder here "
        "and not in the local Hub cache); set model.hf_path to a local folder, download the model first, or set "
        "model.shape"
    )


def _family_faults(model: ModelConfig, config: dict[str, Any], path: Path) -> list[str]:
    found = config.get("model_type")
    if found == model.family.value:
        return []
    if found not in {family.value for family in Family}:
        known = ", ".join(family.value for family in Family)
        return [f"{path} says model_type {found}; models of the families {known} can be pruned and distilled"]
    return [f"model.family={model.family.name}, but {path} says model_type {found}; set model.family={found}"]


def unsupported(config: dict[str, Any]) -> list[str]:
    """What a `config.json` asks for and the NeMo class of its family cannot have, each with the reason."""
    refused = dict(_REFUSED)
    if config.get("model_type") == "nemotron":
        refused |= _OF_NEMOTRON
        del refused["partial_rotary_factor"]  # it has one
    faults = [
        f"{key}={config[key]!r}: {reason}"
        for key, (harmless, reason) in refused.items()
        if key in config and config[key] not in harmless
    ]
    if config.get("quantization_config"):
        faults.append("quantization_config: its weights are quantised; take the model in bf16")
    heads = config["num_attention_heads"]
    if not config.get("head_dim") and config["hidden_size"] % heads:
        faults.append("hidden_size is no multiple of num_attention_heads, and there is no head_dim")
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        faults.append(f"num_attention_heads is no multiple of num_key_value_heads={groups}")
    return faults + _rope_faults(config)


def _rope_faults(config: dict[str, Any]) -> list[str]:
    rope = rope_scaling(config)
    if not isinstance(rope, dict):
        return [f"rope_scaling={rope!r} is no description of a rope"]
    kind = rope_type(config)
    if kind not in _ROPES or (kind == "llama3" and config.get("model_type") != "llama"):
        return [f"rope scaling of type {kind!r} can't be represented in NeMo's class of this family"]
    return [f"rope scaling of type {kind!r} lacks {key}" for key in _ROPES[kind] if key not in rope]


# What a kind of rope scaling is made of.
_ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# By key: harmless values, and why others cannot be had.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False, None), "NeMo's class of this family has no such biases"),
    "mlp_bias": ((False, None), "NeMo's class of this family has no such biases"),
    "use_sliding_window": ((False, None), "only some of the layers would have windows"),
    "hidden_act": (("silu", None), "NeMo's class of this family has SiLU"),
    "partial_rotary_factor": ((1, None), "NeMo's class of this family turns whole heads"),
    "decoder_sparse_step": ((1, None), "some layers would have no experts"),
    "mlp_only_layers": (([], None), "some layers would have no experts"),
}
_OF_NEMOTRON = {"hidden_act": (("relu2", None), "NeMo's class of this family has the squared ReLU")}


def rope_scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's scaling; transformers 5 calls it `rope_parameters` and has `rope_theta` in it."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_type(config: dict[str, Any]) -> str:
    """How the rotary embedding is scaled, in transformers' terms."""
    scaling = rope_scaling(config)
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _shape_faults(given: Shape, found: Shape, path: Path) -> list[str]:
    return [
        f"model.shape.{ours}={getattr(given, ours)}, but {path} says {theirs} {getattr(found, ours)}; "
        f"set model.shape.{ours}={getattr(found, ours)}, or model.shape=null to read it from there"
        for ours, theirs in (_TERMS | _MOE_TERMS).items()
        if getattr(given, ours) != getattr(found, ours)
    ]
