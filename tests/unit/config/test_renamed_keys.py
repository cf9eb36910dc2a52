"""Old names of keys are rejected with the new name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prune_distill.config.renamed_keys import RENAMED_KEYS
from prune_distill.config.typed import schema_keys
from prune_distill.errors import ConfigError
from prune_distill.schema import RunConfig


def test_every_new_name_is_a_key_and_no_old_one_is() -> None:
    known = set(schema_keys(RunConfig))
    assert {renamed.key for renamed in RENAMED_KEYS.values()} <= known
    assert not RENAMED_KEYS.keys() & known


@pytest.mark.parametrize(
    ("override", "new"),
    [
        ("distill.signal=stored", "distill.teacher_logits=cached"),
        ("distill.signal=live", "distill.teacher_logits=live"),
        ("prune.tournament.round_tokens=1000", "prune.successive_halving"),
        ("prune.budget.params_share=0.5", "prune.budget.params_fraction=0.5"),
        ("cluster.gpu.utilisation=0.3", "cluster.gpu.mfu=0.3"),
        ("distill.correct_teacher=null", "distill.teacher_correction=null"),
    ],
)
def test_an_old_key_is_rejected_with_its_new_name(demo: Callable[..., RunConfig], override: str, new: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError) as caught:
        demo(override)
    assert any(
        fault.startswith(key.rpartition(".round")[0] or key) and new in fault for fault in map(str, caught.value.faults)
    )
