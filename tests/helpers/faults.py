"""The faults of configs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launch.planning.automatic import compose
from prune_distill.errors import ConfigError, Fault


def find_faults(overrides: Sequence[str], check_files: bool = False) -> list[Fault]:
    """All faults of a config that has some."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides, check_files)
    return caught.value.faults


def check_fault(overrides: Sequence[str], rule: str, key: str, fix: str, check_files: bool = False) -> None:
    """Check that a config has exactly one fault: the rule, the key to change, and a part of the fix."""
    (fault,) = find_faults(overrides, check_files)
    assert (fault.rule, fault.keys[0]) == (rule, key)
    assert str(fault).startswith(key)
    assert fix in str(fault).partition(": ")[2].partition("; ")[2]
