"""Values of a config by dotted key, and values that follow from several keys. No torch."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from prune_distill.schema import RunConfig


def get_value(cfg: RunConfig, key: str, unreadable: Collection[str] = ()) -> Any:
    """The value of a dotted key such as `distill.phases[0].lr`.

    None where the value, or a group above it, is null or one of the `unreadable` keys.
    """
    value: Any = cfg
    path = ""
    for part in key.split("."):
        path = f"{path}.{part}".lstrip(".")
        if value is None or path in unreadable:
            return None
        name, _, item = part.partition("[")
        value = getattr(value, name)
        value = value[int(item.rstrip("]"))] if item else value
    return value


def replace_values(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A deep copy of a config with other values, given by dotted key."""
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        setattr(get_value(cfg, group) if group else cfg, name, value)
    return cfg


def count_ranks(cfg: RunConfig) -> int:
    """Ranks of a distributed stage: one per device of the cluster section."""
    return cfg.cluster.nodes * cfg.cluster.devices_per_node
