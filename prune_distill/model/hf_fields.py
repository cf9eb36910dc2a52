"""The keys of a `config.json`: which a model needs, and the type and range of each. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prune_distill.schema.families import Family, Traits

# Longest excerpt of a value in a message.
_SHOWN = 60


@dataclass(frozen=True)
class Field:
    """Allowed values of a key.

    Attributes:
        kind: the exact JSON type; float includes integers.
        least, most: the range of a number, inclusive.
        null: whether null is allowed.
    """

    kind: type
    least: float = -math.inf
    most: float = math.inf
    null: bool = False

    def fault(self, value: Any) -> str | None:
        """Return what is wrong with a value; None if it is valid."""
        if value is None and self.null:
            return None
        kinds = (int, float) if self.kind is float else (self.kind,)
        if type(value) not in kinds:  # bool is an int to isinstance
            return f"must be {_WORDS[self.kind]}{' or null' if self.null else ''}"
        if self.kind in (int, float) and not self.least <= value <= self.most:  # NaN is in no range
            least = "above 0" if self.least == _SMALLEST else f"at least {self.least}"
            return f"must be {least} and at most {self.most}"
        return None


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}
# At least three times the largest of any published model. Larger values are errors, and planning would loop or
# allocate for it.
_LAYERS, _WIDTH, _HEADS, _EXPERTS, _IDS = 1_000, 1 << 16, 1 << 10, 1 << 12, 1 << 24
_SMALLEST = 1e-30  # for values that must be above 0

# Keys that every model needs.
_REQUIRED = {
    "num_hidden_layers": Field(int, 1, _LAYERS),
    "hidden_size": Field(int, 1, _WIDTH),
    "intermediate_size": Field(int, 1, _WIDTH * 8),
    "num_attention_heads": Field(int, 1, _HEADS),
    "vocab_size": Field(int, 1, _IDS),
    "max_position_embeddings": Field(int, 1, 2**31 - 1),
}
_REQUIRED_OF_MIXTURES = {
    "num_experts": Field(int, 1, _EXPERTS),
    "num_experts_per_tok": Field(int, 1, _EXPERTS),
    "moe_intermediate_size": Field(int, 1, _WIDTH),
}
# Keys that are optional.
_OPTIONAL = {
    "num_key_value_heads": Field(int, 1, _HEADS, null=True),
    "head_dim": Field(int, 2, _WIDTH, null=True),
    "tie_word_embeddings": Field(bool),
    "rms_norm_eps": Field(float, 0, 1),
    "norm_eps": Field(float, 0, 1),
    "initializer_range": Field(float, 0, 1),
    "rope_theta": Field(float, _SMALLEST, 1e30),
    "rope_scaling": Field(dict, null=True),
    "rope_parameters": Field(dict, null=True),
    "partial_rotary_factor": Field(float, _SMALLEST, 1, null=True),
    "original_max_position_embeddings": Field(int, 1, 2**31 - 1, null=True),
    "torch_dtype": Field(str, null=True),
    "dtype": Field(str, null=True),
    "hidden_act": Field(str, null=True),
    "attention_bias": Field(bool, null=True),
    "mlp_bias": Field(bool, null=True),
    "attention_dropout": Field(float, 0, 1, null=True),
    "use_sliding_window": Field(bool, null=True),
    "sliding_window": Field(int, 0, 2**31 - 1, null=True),
    "max_window_layers": Field(int, 0, _LAYERS, null=True),
    "layer_types": Field(list, null=True),
    "decoder_sparse_step": Field(int, 0, _LAYERS, null=True),
    "mlp_only_layers": Field(list, null=True),
    "norm_topk_prob": Field(bool),
    "pad_token_id": Field(int, -_IDS, _IDS, null=True),
}
# Keys of the rope's description besides its type.
_ROPE_FIELDS = {
    "rope_theta": _OPTIONAL["rope_theta"],
    "partial_rotary_factor": _OPTIONAL["partial_rotary_factor"],
    "rope_type": Field(str),
    "type": Field(str),
    "factor": Field(float, _SMALLEST, 1e9),
    "low_freq_factor": Field(float, _SMALLEST, 1e9),
    "high_freq_factor": Field(float, _SMALLEST, 1e9),
    "original_max_position_embeddings": Field(int, 1, 2**31 - 1),
}
_DTYPES = ("float32", "bfloat16", "float16")


def content_faults(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield faults: unknown families, missing keys, wrong types and values out of range."""
    if "auto_map" in content:
        yield (
            "auto_map: needs custom code, which is never run; use a model whose class is part of"
            " transformers, or remove auto_map if the model needs none of that code"
        )
    found = content.get("model_type")
    if found not in [family.value for family in Family]:
        known = ", ".join(family.value for family in Family)
        yield f"model_type={show(found)}: not a supported family; use a model of one of {known}"
        return
    traits = Family(found).traits
    required = {**_REQUIRED, **(_REQUIRED_OF_MIXTURES if traits.experts else {})}
    fields = {**_OPTIONAL, **required, **dict(_family_fields(traits))}
    older = older_names(traits)
    read = {older.get(key, key) for key in content}
    yield from (f"{key}: missing; fetch the file again" for key in required if key not in read)
    fields |= {name: fields[older_name] for name, older_name in older.items()}
    for key, value in content.items():
        if key in fields and (wrong := fields[key].fault(value)):
            yield f"{key}={show(value)}: {wrong}; correct it, or fetch the file again"
    for key in ("rope_scaling", "rope_parameters"):
        rope = content.get(key)
        for name, value in rope.items() if isinstance(rope, dict) else ():
            if name in _ROPE_FIELDS and (wrong := _ROPE_FIELDS[name].fault(value)):
                yield f"{key}.{name}={show(value)}: {wrong}; correct it, or fetch the file again"
            elif isinstance(value, dict):
                yield f"{key}.{name}: ropes of their own for some layers are not supported; use another model"
    for key in ("torch_dtype", "dtype"):
        if isinstance(content.get(key), str) and content[key] not in _DTYPES:
            yield f"{key}={show(content[key])}: must be one of {', '.join(_DTYPES)}; save the model in one of them"


def _family_fields(traits: Traits) -> Iterator[tuple[str, Field]]:
    """Yield keys with additional restrictions in a family's transformers class."""
    if "head_dim" in traits.defaults:
        yield "head_dim", Field(int, 2, _WIDTH)
    if traits.window:
        yield "sliding_window", Field(int, 1, 2**31 - 1, null=True)
    if traits.partial_rope:
        yield "partial_rotary_factor", Field(float, _SMALLEST, 1)


def older_names(traits: Traits) -> dict[str, str]:
    """Return the names of settings in transformers 4 by those of transformers 5."""
    experts = {"num_local_experts": "num_experts"} if traits.experts else {}
    return {"dtype": "torch_dtype", **experts}


def show(value: Any) -> str:
    """Format a value as JSON, truncated for a message."""
    try:
        text = json.dumps(value)
    except RecursionError:  # it was read from a shallower stack
        text = str(type(value).__name__)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
