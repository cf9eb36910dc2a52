"""The hashes of stages contain the settings that affect their results, and no others."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.config.rules.evaluation import OWN_TASK
from prune_distill.config.values import replace_values
from prune_distill.pipeline.artifact import locate
from prune_distill.schema import ExportDtype, MatmulPrecision, Parallel, Precision, RunConfig

STORED = ("distill.teacher_logits=cached", "distill.controls=[]")
SEARCHED = (
    "prune.num_layers=null",
    "prune.ffn_hidden_size=null",
    "prune.budget.params_fraction=0.8",
    "prune.successive_halving.candidates=2",
    "prune.successive_halving.round_tokens=20480",
)
SCORED = (*SEARCHED, f"prune.successive_halving.score.task={OWN_TASK}", "prune.successive_halving.score.metric=acc")


@cache
def base(*overrides: str) -> RunConfig:
    return compose(["experiment=demo", "run_dir=runs/none", *overrides])


@cache
def folders(*overrides: str) -> dict[str, str]:
    return {name: stage.folder.name for name, stage in locate(base(*overrides)).items()}


def changed(overrides: tuple[str, ...], key: str, value: Any) -> set[str]:
    """Return the stages whose folder depends on a setting."""
    before = folders(*overrides)
    after = locate(replace_values(base(*overrides), {key: value}))
    return {name for name in before if before[name] != after[name].folder.name}


@pytest.mark.parametrize(
    "change",
    [
        ("distill.precision", Precision.bf16),
        ("distill.float32_matmul_precision", MatmulPrecision.highest),
        ("distill.kd.temperature", 2.0),
        ("distill.cached_logits_top_k", 8),
        ("distill.max_steps", 150),
        ("distill.seq_length", 128),
        ("distill.global_batch_size", 8),
        ("seed", 7),
    ],
)
def test_cached_logits_are_those_of_their_settings(change: tuple[str, Any]) -> None:
    assert {"cache_logits", "distill"} <= changed(STORED, *change)


def test_cached_logits_do_not_depend_on_the_layout() -> None:
    layout = Parallel(tensor_model_parallel_size=2)
    assert changed(STORED, "teacher.parallel", layout) == changed(STORED, "teacher.micro_batch_size", 2) == set()


@pytest.mark.parametrize("change", [("distill.lr", 0.5), ("distill.kd.lm_weight", 0.25)])
def test_cached_logits_serve_other_trainings(change: tuple[str, Any]) -> None:
    found = changed(STORED, *change)
    assert "distill" in found
    assert "cache_logits" not in found


@pytest.mark.parametrize(
    "change",
    [
        ("evaluate.continuations.questions", 7),
        ("evaluate.num_fewshot", 3),
        ("evaluate.task_limit", 9),
        ("convert.export_dtype", ExportDtype.bf16),
    ],
)
def test_task_settings_affect_successive_halving_with_a_task(change: tuple[str, Any]) -> None:
    assert "successive_halving" in changed(SCORED, *change)
    if change[0].startswith("evaluate."):  # the search uses the size of exported models
        assert "successive_halving" not in changed(SEARCHED, *change)


@pytest.mark.parametrize(
    "change", [("distill.num_workers", 1), ("distill.micro_batch_size", 2), ("distill.kd.chunk_tokens", 64)]
)
def test_settings_without_effect_do_not_change_folders(change: tuple[str, Any]) -> None:
    assert changed((), *change) == set()


@pytest.mark.parametrize(
    ("change", "first", "same"),
    [
        (("prune.calibration_samples", 8), "importance", "import"),
        (("distill.lr", 0.5), "distill", "prune"),
        (("evaluate.seq_length", 64), "evaluate", "nemo_to_hf"),
        (("seed", 3), "demo_model", ""),
    ],
)
def test_a_change_affects_its_readers_and_later_stages(change: tuple[str, Any], first: str, same: str) -> None:
    found = changed((), *change)
    assert first in found
    assert same not in found


@pytest.mark.parametrize(
    ("quant_format", "key", "value", "depends"),
    [
        ("int4", "quantize.int4_group_size", 64, True),
        ("int4", "quantize.keep", ["*.o_proj"], True),
        ("int8", "quantize.int4_group_size", 64, False),
        ("int4", "quantize.calibration_samples", 8, False),
    ],
)
def test_fake_quantization_is_that_of_its_settings(quant_format: str, key: str, value: Any, depends: bool) -> None:
    overrides = (f"distill.quantize={quant_format}", f"quantize.formats=[{quant_format}]")
    assert ("distill" in changed(overrides, key, value)) == depends
    # Without fake quantization, a distillation does not depend on the formats that are written later.
    assert "distill" not in changed(overrides[1:], key, value)
