"""Config keys that were renamed, and what the error says about an old one. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """The new name of a key, and the new names of its values where they changed too."""

    key: str
    values: Mapping[str, str] = field(default_factory=dict)


RENAMED_KEYS: Mapping[str, Renamed] = {
    "cluster.gpu.utilisation": Renamed("cluster.gpu.mfu"),
    "data.mask_prompts": Renamed("data.learn", {"True": "assistant", "False": "all"}),
    "data.max_bad_share": Renamed("data.max_invalid_fraction"),
    "distill.correct_teacher": Renamed("distill.teacher_correction"),
    "distill.signal": Renamed("distill.teacher_logits", {"stored": "cached"}),
    "distill.signal_shard_sequences": Renamed("distill.cached_logits_shard_sequences"),
    "distill.signal_top_k": Renamed("distill.cached_logits_top_k"),
    "prune.budget.latency": Renamed("prune.budget.latency_ms"),
    "prune.budget.latency_share": Renamed("prune.budget.latency_fraction"),
    "prune.budget.max_depth_cut": Renamed("prune.budget.max_depth_pruning"),
    "prune.budget.max_width_cut": Renamed("prune.budget.max_width_pruning"),
    "prune.budget.memory_share": Renamed("prune.budget.memory_fraction"),
    "prune.budget.params_share": Renamed("prune.budget.params_fraction"),
    "prune.depth": Renamed("prune.layer_selection"),
    "prune.tournament": Renamed("prune.successive_halving"),
}


def describe_rename(key: str, value: Any) -> str | None:
    """Return the error for an old key; None for a key that was not renamed.

    Args:
        key: a dotted key that the schema does not have.
        value: its value in the tree; a mapping for a group.
    """
    renamed = RENAMED_KEYS.get(key)
    if renamed is None:
        return None
    if isinstance(value, Mapping):
        return f"{key}: this group was renamed; set the keys of {renamed.key} instead"
    text = "null" if value is None else str(value)
    return f"{key}={text}: this key was renamed; set {renamed.key}={renamed.values.get(text, text)}"
