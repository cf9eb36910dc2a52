"""What a teacher's Hugging Face `config.json` says of its family and size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, Shape

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
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        return model.shape, [f"{path} does not describe a model ({reason}); set model.hf_path to a whole folder"]
    faults = _family_faults(model, config, path) + _bias_faults(config, path)
    if model.shape is None:
        return found, faults
    return model.shape, faults + _shape_faults(model.shape, found, path)


def shape_from(config: dict[str, Any]) -> Shape:
    """A shape from the content of a `config.json`.

    Raises:
        KeyError: a term that is needed is absent.
    """
    heads = config["num_attention_heads"]
    values = dict(config)
    values["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    # The head size is a setting of its own in Qwen3; Llama leaves it out where it is the quotient.
    values["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    values.setdefault("tie_word_embeddings", False)
    return Shape(**{ours: values[theirs] for ours, theirs in _TERMS.items()})


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
    return [f"model.family={model.family.name}, but {path} says model_type {found}; set model.family={found}"]


def _bias_faults(config: dict[str, Any], path: Path) -> list[str]:
    """NeMo's importers of both families know no biases, and would leave them out without a word."""
    asked = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    return [f"{path} says {name} true, but models with biases cannot be run; take one without" for name in asked]


def _shape_faults(given: Shape, found: Shape, path: Path) -> list[str]:
    return [
        f"model.shape.{ours}={getattr(given, ours)}, but {path} says {theirs} {getattr(found, ours)}; "
        f"set model.shape.{ours}={getattr(found, ours)}, or model.shape=null to read it from there"
        for ours, theirs in _TERMS.items()
        if getattr(given, ours) != getattr(found, ours)
    ]
