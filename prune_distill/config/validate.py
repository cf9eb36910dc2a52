"""Checks a config against all bounds and rules.

Where upstream would refuse (or silently ignore) something hours later, the rule names the line that does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from types import ModuleType

from prune_distill.config.bounds import out_of_bounds
from prune_distill.config.rule import Rule
from prune_distill.config.rules import (
    budget,
    cluster,
    data,
    distill,
    evaluation,
    fp8,
    model,
    on_policy,
    prune,
    quantize,
    slurm,
    source_teachers,
    training,
)
from prune_distill.errors import Fault
from prune_distill.schema import RunConfig


def _rules_in(module: ModuleType) -> Iterator[Rule]:
    for value in vars(module).values():
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Rule))


# In the order in which their faults are printed.
MODULES = (
    cluster,
    model,
    data,
    prune,
    budget,
    evaluation,
    quantize,
    distill,
    on_policy,
    training,
    fp8,
    source_teachers,
    slurm,
)
ALL_RULES = [rule for module in MODULES for rule in _rules_in(module)]
RULES = [rule for rule in ALL_RULES if not rule.on_machine]


def validate(cfg: RunConfig, unreadable: Collection[str] = ()) -> list[Fault]:
    """List all faults that the config alone reveals.

    Args:
        cfg: the config.
        unreadable: dotted keys without a usable value; rules that read one of them are skipped.
    """
    faults = list(out_of_bounds(cfg, unreadable))
    bad = {*unreadable, *(key for fault in faults for key in fault.keys)}
    return faults + [fault for rule in RULES for fault in rule.faults(cfg, bad)]


def missing_files(cfg: RunConfig, unreadable: Collection[str] = ()) -> list[Fault]:
    """List what this machine lacks: the user's files and folders, variables, and packages."""
    return [fault for rule in ALL_RULES if rule.on_machine for fault in rule.faults(cfg, unreadable)]


def layout_faults(cfg: RunConfig, key: str = "distill") -> list[Fault]:
    """List what is wrong with the parallel layout of the training at `key`."""
    return [fault for rule in _layout_rules(key) for fault in rule.faults(cfg)]


@cache
def _layout_rules(key: str) -> list[Rule]:
    parallel = f"{key}.parallel."
    return [
        rule
        for rule in RULES
        if rule.id.startswith("training.") and any(read.startswith(parallel) for read in rule.reads)
    ]
