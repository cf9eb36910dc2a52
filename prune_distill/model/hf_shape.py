"""Read a model's family and shape from its Hugging Face `config.json`."""

from __future__ import annotations

import os.path
from pathlib import Path

from prune_distill.model.hf_config import HfConfig, examine, traits_of
from prune_distill.schema import Family, ModelConfig, Shape, TeacherConfig

# Hugging Face's name of each size, by Megatron's.
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


def read_shape(model: ModelConfig | TeacherConfig, group: str = "model") -> tuple[Shape | None, list[str]]:
    """Return a model's shape, from the config or from `config.json`, and faults.

    If `config.json` is available (a local folder, or a Hub id in the local cache), it must agree with the config.

    Args:
        group: the config group of the model, for messages.
    """
    if model.hf_path is None:
        return model.shape, []
    folder = local_folder(model.hf_path, model.revision)
    if folder is None:
        return model.shape, [] if model.shape is not None else [_nowhere(model.hf_path, group)]
    path = folder / "config.json"
    config, faults = examine(path)
    if config is None:
        return model.shape, faults
    found = parse_shape(config)
    if model.family is not None and config["model_type"] != model.family.value:
        says = config["model_type"]
        faults = [
            f"{group}.family={model.family.name}: {path} has model_type={says}; set {group}.family={says}",
            *faults,
        ]
    if model.shape is None:
        return found, faults
    return model.shape, faults + _shape_faults(model.shape, found, path, group)


def read_family(hf_path: str, revision: str | None, group: str = "model") -> tuple[str | None, list[str]]:
    """Return the family in a model's `config.json`, and faults if it is missing or unknown."""
    folder = local_folder(hf_path, revision)
    if folder is None:
        return None, [
            f"{group}.hf_path={hf_path}: no config.json to read {group}.family from (not a folder on this machine, and "
            f"not in the local Hub cache); set {group}.hf_path to a local folder, download the model first, or set "
            f"{group}.family to one of {', '.join(family.value for family in Family)}"
        ]
    config, faults = examine(folder / "config.json")
    return (None, faults) if config is None else (config["model_type"], [])


def parse_shape(config: HfConfig) -> Shape:
    """Return the shape that a normalized `config.json` describes."""
    terms = _TERMS | (_MOE_TERMS if traits_of(config).experts else {})
    return Shape(**{ours: config[theirs] for ours, theirs in terms.items()})


def may_be_hub_id(hf_path: str) -> bool:
    """Return whether a string can be a Hub id `owner/name`: not an absolute or explicitly relative path."""
    owner, _, name = hf_path.partition("/")
    return bool(owner and name) and "/" not in name and "*" not in hf_path and owner[0] not in ".~"


def local_folder(hf_path: str, revision: str | None) -> Path | None:
    """Return a model's folder on this machine, possibly in the local Hub cache; None if there is none.

    A folder in the Hub's cache may only contain `config.json`; the rest is downloaded when it is needed.
    """
    path = os.path.expanduser(hf_path)
    if os.path.exists(path):  # pathlib raises for paths that no file system takes
        return Path(path)
    if not may_be_hub_id(hf_path):
        return None
    # Takes half a second, so it is imported on demand.
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(hf_path, "config.json", revision=revision)
    except errors.HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _nowhere(hf_path: str, group: str) -> str:
    return (
        f"{group}.hf_path={hf_path}: no config.json to read {group}.shape from (not a folder on this machine, and not "
        f"in the local Hub cache); set {group}.hf_path to a local folder, download the model first, or set "
        f"{group}.shape"
    )


def _shape_faults(given: Shape, found: Shape, path: Path, group: str) -> list[str]:
    return [
        f"{group}.shape.{ours}={getattr(given, ours)}: {path} has {theirs}={getattr(found, ours)}; "
        f"set {group}.shape.{ours}={getattr(found, ours)}, or {group}.shape=null to read it from there"
        for ours, theirs in (_TERMS | _MOE_TERMS).items()
        if getattr(given, ours) != getattr(found, ours)
    ]
