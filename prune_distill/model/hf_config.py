"""A Hugging Face model's `config.json`: read, type-checked and normalized in one place. No torch.

transformers 4 and 5 write the same settings under different names, and each silently ignores some of the other's
names. A normalized config has every such setting once, under the name that transformers 4 reads:

| transformers 4, and normalized     | transformers 5                          |
|------------------------------------|-----------------------------------------|
| `rope_theta`, `rope_scaling`       | `rope_parameters`                       |
| `partial_rotary_factor` (Nemotron) | `rope_parameters.partial_rotary_factor` |
| `num_experts`                      | `num_local_experts`                     |
| `torch_dtype`                      | `dtype` (from 4.56 on)                  |

`make_compatible` adds the newer names again, for files and loaders of either version.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prune_distill.errors import InputError
from prune_distill.model.hf_fields import content_faults, older_names, show
from prune_distill.schema.families import Family, Traits

# The content of a `config.json`: an open set of keys, of which `read_config` checks and completes those that count.
HfConfig = dict[str, Any]

# Maximum size of a config.json; real ones have a few KB.
MAX_BYTES = 4 << 20
# Maximum number of experts of all layers together; more is an error.
_ALL_EXPERTS = 1 << 18


def read_config(path: Path) -> HfConfig:
    """Read and normalize a `config.json`.

    Raises:
        InputError: the file cannot be read, or describes a model that cannot be converted; one fault per line.
    """
    config, faults = examine(path)
    if config is None or faults:
        raise InputError("\n".join(faults))
    return config


def read_unchecked(path: Path) -> HfConfig:
    """Read and normalize a `config.json` of a model that is not to be converted: a quantized one, for example.

    Raises:
        InputError: the file cannot be read.
        ValueError: see `normalize`.
    """
    return normalize(parse(path))


def examine(path: Path) -> tuple[HfConfig | None, list[str]]:
    """Read the valid parts of a `config.json`.

    Returns:
        The normalized config, or None if types or values are wrong; and all faults, one line each. A config may
        come with faults: those are settings that NeMo or a family's reference implementation cannot represent.
    """
    try:
        content = parse(path)
    except InputError as error:
        return None, [str(error)]
    if faults := [f"{path}: {fault}" for fault in content_faults(content)]:
        return None, faults
    try:
        config = normalize(content)
    except _ContradictionError as error:
        return None, [f"{path}: {error}"]
    if faults := [f"{path}: {fault}" for fault in _relation_faults(config)]:
        return None, faults
    return config, [f"{path}: {fault}" for fault in unsupported(config)]


def parse(path: Path) -> HfConfig:
    """Parse a JSON file that contains an object.

    Raises:
        InputError: the file does not exist, is too large, or is not UTF-8, JSON or an object.
    """
    try:
        # Opening a FIFO would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not a regular file; fetch the file again")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(
                f"{path}: larger than {MAX_BYTES >> 20} MiB, which no config.json is; fetch the file again"
            )
        # json rejects a byte order mark with a hint at another codec, and so does transformers.
        if data.startswith(b"\xef\xbb\xbf"):
            raise InputError(f"{path}: starts with a byte order mark; save the file as UTF-8 without one")
        content = json.loads(data.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: does not exist; set model.hf_path to the whole folder of a model") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable, or fetch it again") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply for a config.json; fetch the file again") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).partition("; use sys.set_int_max_str_digits")[0]  # advice for programmers
        raise InputError(f"{path}: not JSON in UTF-8 ({reason}); fetch the file again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {show(content)} instead of an object; fetch the file again")
    return content


# One name for each setting.


# Defaults of transformers for missing keys, in addition to those of a family.
_COMMON_DEFAULTS: HfConfig = {"initializer_range": 0.02, "rope_theta": 10000.0, "tie_word_embeddings": False}


class _ContradictionError(ValueError):
    """Two settings, or two names of one setting, contradict each other."""


def normalize(content: HfConfig) -> HfConfig:
    """Return a type-checked config with one name for each setting and a value for each key that is read.

    Raises:
        ValueError: two names of one setting have different values, or the head size cannot be computed.
    """
    traits = traits_of(content)
    names = older_names(traits)
    config = {key: value for key, value in content.items() if key not in (*names, "rope_parameters")}
    for newer, older in names.items():
        if (value := _agreed(content, (older, newer))) is not None:
            config[older] = value
    defaults = _COMMON_DEFAULTS | dict(traits.defaults)
    config |= _normalized_rope(content, defaults)
    config = config | defaults | config  # in the file's order
    # In every family, null means the quotient, or one group per head.
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    if not config.get("head_dim") and hidden % heads:
        raise _ContradictionError(
            f"hidden_size={hidden}: not a multiple of num_attention_heads={heads}, and there is no head_dim; correct"
            " either, or set head_dim"
        )
    config["head_dim"] = config.get("head_dim") or hidden // heads
    return config


def _normalized_rope(content: HfConfig, defaults: HfConfig) -> HfConfig:
    """Return `rope_theta`, `rope_scaling` (null for the default type) and `partial_rotary_factor`, if there is one."""
    older, newer = (content.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    for key, rope in (("rope_scaling", older), ("rope_parameters", newer)):
        _agreed({f"{key}.{name}": rope.get(name) for name in ("rope_type", "type")})
        if "rope_type" not in rope and "type" not in rope and rope.keys() & _SCALING_KEYS:
            raise _ContradictionError(f"{key}={show(rope)}: names no rope_type; add it, or set {key} to null")
    ropes = {key: _scaling(content[key] or {}) for key in ("rope_scaling", "rope_parameters") if key in content}
    if len(ropes) == 2 and ropes["rope_scaling"] != ropes["rope_parameters"]:
        raise _ContradictionError(
            f"rope_scaling={show(content['rope_scaling'])} and rope_parameters={show(content['rope_parameters'])}"
            " disagree, and each is read by one version of transformers; keep the one that the model was trained with"
        )
    rope = next((found for found in ropes.values() if found is not None), None)
    places = [content, older, newer]
    prefixes = ["", "rope_scaling.", "rope_parameters."]

    def everywhere(key: str) -> Any:
        return _agreed({f"{prefix}{key}": place.get(key) for prefix, place in zip(prefixes, places, strict=True)})

    everywhere("original_max_position_embeddings")
    theta, share = everywhere("rope_theta"), everywhere("partial_rotary_factor")
    config: HfConfig = {"rope_theta": float(defaults["rope_theta"] if theta is None else theta), "rope_scaling": rope}
    if share is not None:
        config["partial_rotary_factor"] = share
    return config


def _scaling(rope: HfConfig) -> HfConfig | None:
    """Return the rope scaling with the names of transformers 4; None for the default type."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    values = {key: rope[key] for key in _ROPES.get(str(kind), _SCALING_KEYS) if key in rope}
    # transformers warns about integers.
    return {"rope_type": kind} | {
        key: float(value) if key.endswith("factor") else value for key, value in values.items()
    }


def _agreed(content: HfConfig, keys: tuple[str, ...] | None = None) -> Any:
    """Return the common value of keys, ignoring missing and null ones; None if there is none.

    Raises:
        _ContradictionError: they have different values.
    """
    found = {key: content[key] for key in keys or content if content.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values):
        said = " and ".join(f"{key}={show(value)}" for key, value in found.items())
        raise _ContradictionError(
            f"{said} disagree, and each is read by one version of transformers; keep the one that the model was trained"
            " with"
        )
    return values[0] if values else None


def make_compatible(config: HfConfig) -> HfConfig:
    """Return a normalized config with both the older and the newer names, for transformers 4 and 5."""
    rope = {"rope_type": "default", **(config["rope_scaling"] or {}), "rope_theta": config["rope_theta"]}
    if config.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    return {**config, "rope_parameters": rope}


# Checks of a normalized config.


def _relation_faults(config: HfConfig) -> Iterator[str]:
    """Yield faults of values that contradict each other."""
    heads, groups, size = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % groups:
        yield f"num_key_value_heads={groups}: must divide num_attention_heads={heads}; correct either"
    rotary = int(size * (config.get("partial_rotary_factor") or 1))
    if rotary < 2 or rotary % 2:
        yield f"head_dim={size}: {rotary} of it are rotated, which must be an even number; correct head_dim"
    padding = config.get("pad_token_id")
    if padding is not None and not -config["vocab_size"] <= padding < config["vocab_size"]:
        yield f"pad_token_id={padding}: outside of vocab_size={config['vocab_size']}; set it to null or to a token's id"
    types = config.get("layer_types")
    if types is not None and len(types) != config["num_hidden_layers"]:
        yield f"layer_types: {len(types)} entries for num_hidden_layers={config['num_hidden_layers']}; correct either"
    if not traits_of(config).experts:
        return
    experts, chosen, layers = (config[key] for key in ("num_experts", "num_experts_per_tok", "num_hidden_layers"))
    if chosen > experts:
        yield f"num_experts_per_tok={chosen}: must not exceed num_experts={experts}; correct either"
    if layers * experts > _ALL_EXPERTS:
        yield (
            f"num_experts={experts}: more than {_ALL_EXPERTS} in all of num_hidden_layers={layers}; correct either, or"
            " fetch the file again"
        )


def unsupported(config: HfConfig) -> list[str]:
    """Return settings that NeMo's class of the family does not support, one fault each."""
    traits = traits_of(config)
    refused = {
        **_REFUSED,
        "hidden_act": ((traits.activation, None), f"NeMo's class of this family has {traits.activation}"),
    }
    if traits.partial_rope:
        del refused["partial_rotary_factor"]
    faults = [
        f"{key}={show(config[key])}: {reason}; use another model"
        for key, (harmless, reason) in refused.items()
        if key in config and config[key] not in harmless
    ]
    if config.get("quantization_config"):
        faults.append("quantization_config: the weights are quantized; use the model in bf16")
    full = "sliding_attention" if config.get("sliding_window") and traits.window else "full_attention"
    if any(kind != full for kind in config.get("layer_types") or ()):
        faults.append(f"layer_types: only layers of the type {full} are supported; use another model")
    if traits.experts and config["num_experts_per_tok"] == 1 and config["norm_topk_prob"]:
        # Its router would get no gradient: megatron/core/transformer/transformer_config.py:1336.
        faults.append(
            "num_experts_per_tok=1: with norm_topk_prob=true its weight is always 1, which Megatron-Core refuses; use a"
            " model with two experts per token or more"
        )
    return faults + _rope_faults(config)


# By key: accepted values, and why others are not supported.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention_bias": ((False, None), "NeMo's class of this family has no such biases"),
    "mlp_bias": ((False, None), "NeMo's class of this family has no such biases"),
    "use_sliding_window": ((False, None), "only some of the layers would have windows"),
    "partial_rotary_factor": ((1, None), "NeMo's class of this family rotates whole heads"),
    "decoder_sparse_step": ((1, None), "some layers would have no experts"),
    "mlp_only_layers": (([], None), "some layers would have no experts"),
}

_SCALING_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Keys that a type of rope scaling needs.
_ROPES: dict[str, tuple[str, ...]] = {"linear": ("factor",), "llama3": _SCALING_KEYS}


def traits_of(config: Mapping[str, Any]) -> Traits:
    """Return the traits of a config's family."""
    return Family(config["model_type"]).traits


def rope_kind(config: HfConfig) -> str:
    """Return the type of rope scaling of a normalized config, by transformers' name."""
    return str((config["rope_scaling"] or {}).get("rope_type", "default"))


def _rope_faults(config: HfConfig) -> list[str]:
    kind, supported = rope_kind(config), traits_of(config).rope_kinds
    if kind == "default":
        return []
    if kind not in supported:
        allowed = ", ".join(("default", *supported))
        why = (
            "NeMo's class of this family cannot represent it"
            if supported
            else "transformers 4 ignores it in this family and transformers 5 does not"
        )
        return [f"rope_scaling.rope_type={show(kind)}: {why}; use a model whose rope is one of {allowed}"]
    rope = config["rope_scaling"]
    faults = [
        f"rope_scaling.{key}: missing, and rope_type={kind} needs it; add it" for key in _ROPES[kind] if key not in rope
    ]
    if kind == "llama3" and not faults and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        faults.append(
            f"rope_scaling.low_freq_factor={rope['low_freq_factor']:g}: must be below"
            f" high_freq_factor={rope['high_freq_factor']:g}; correct either"
        )
    return faults
