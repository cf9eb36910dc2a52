"""Values of a config by dotted key."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prune_distill.config.values import count_ranks, get_value, replace_values
from prune_distill.config.wording import ranges
from prune_distill.schema import RunConfig


def test_a_value_is_read_by_its_key(demo: Callable[..., RunConfig]) -> None:
    cfg = demo("distill.skip_steps=[[2,3]]")
    assert get_value(cfg, "distill.kd.temperature") == cfg.distill.kd.temperature
    assert get_value(cfg, "distill.skip_steps[0]") == [2, 3]
    assert get_value(cfg, "distill.teacher_correction.lr") is None  # of a group that is null
    assert get_value(cfg, "distill.lr", {"distill"}) is None
    with pytest.raises(AttributeError):
        get_value(cfg, "distill.no_such_key")


def test_a_copy_has_the_other_values(demo: Callable[..., RunConfig]) -> None:
    cfg = demo("cluster.devices_per_node=2", "distill.global_batch_size=8")
    other = replace_values(cfg, {"cluster.nodes": 3, "seed": 7})
    assert (count_ranks(other), other.seed) == (6, 7)
    assert (count_ranks(cfg), cfg.seed) == (2, cfg.seed)
    assert cfg.seed != 7


def test_numbers_as_ranges() -> None:
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
    assert ranges([]) == ""
