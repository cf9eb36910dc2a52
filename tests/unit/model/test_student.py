"""Budgets: the shapes of a search, their costs, and faults."""

from __future__ import annotations

from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.config.values import halving_rounds
from prune_distill.errors import ConfigError
from prune_distill.model import student
from prune_distill.model.model_size import parameters
from prune_distill.model.student import AXES, build_space, candidates, student_shape, student_shapes
from prune_distill.schema import LayerSelection, PruneConfig, RunConfig, Shape
from tests.helpers.faults import check_fault

DEMO = ("experiment=demo", "prune.num_layers=null", "prune.ffn_hidden_size=null")
QWEN = ("experiment=qwen3_8b_to_6b_depth", "layout=published", "prune.num_layers=null")
# The demo's teacher has 5,246,976 parameters.
TWO_THIRDS = "prune.budget.params_fraction=0.667"


def demo(*overrides: str) -> RunConfig:
    return compose([*DEMO, *overrides])


def sizes(shape: Shape) -> tuple[int, ...]:
    return tuple(getattr(shape, axis) for axis in AXES)


def test_candidates_meet_the_budget_and_bounds_and_are_maximal() -> None:
    cfg = demo(TWO_THIRDS)
    found = candidates(build_space(cfg))
    teacher = cfg.model.shape
    assert teacher is not None
    whole = parameters(teacher, cfg.model.family)
    for shape in found:
        assert parameters(shape, cfg.model.family) <= 0.667 * whole
        assert shape.num_layers >= 4
        assert shape.hidden_size >= 0.6 * 256
        assert shape.hidden_size % 64 == shape.ffn_hidden_size % 64 == 0
        assert shape.num_attention_heads % shape.num_query_groups == 0
    for one in found:
        inside = [other for other in found if all(a >= b for a, b in zip(sizes(other), sizes(one), strict=True))]
        assert inside == [one]
    # Depth alone and width alone are among them.
    assert (4, 256, 704, 4, 2) in map(sizes, found)
    assert any(shape.num_layers == 6 for shape in found)


def test_parallelism_of_the_distillation_divides_every_candidate() -> None:
    cfg = compose([*QWEN, "prune.budget.params_fraction=0.7", "prune.budget.max_candidates=1000"])
    found = student_shapes(cfg)
    assert len(found) > 20
    for shape in found:
        assert shape.num_query_groups % 8 == shape.num_attention_heads % 8 == shape.ffn_hidden_size % 128 == 0
        assert shape.hidden_size % 128 == 0
    # The budget is used up to a step of the FFN, which is less than 3 % of the model.
    limit = 0.7 * parameters(cfg.model.shape, cfg.model.family)  # type: ignore[arg-type]
    assert all(0.97 * limit < parameters(shape, cfg.model.family) <= limit for shape in found)
    pipelined = ("distill.parallel.pipeline_model_parallel_size=2", "distill.parallel.tensor_model_parallel_size=4")
    halves = student_shapes(compose([*QWEN, "prune.budget.params_fraction=0.7", *pipelined]))
    assert {shape.num_layers % 2 for shape in halves} == {0}


def test_the_plan_uses_the_largest_candidate() -> None:
    cfg = demo(TWO_THIRDS)
    most = max(parameters(shape, cfg.model.family) for shape in student_shapes(cfg))
    assert parameters(student_shape(cfg), cfg.model.family) == most
    assert len(candidates(build_space(demo(TWO_THIRDS, "prune.budget.max_candidates=2")))) == 2


def test_memory_is_weights_and_cache() -> None:
    cfg = demo("prune.budget.memory_fraction=0.7", "prune.budget.batch_size=8", "prune.budget.seq_length=1024")
    space = build_space(cfg)
    weights, cache = 4 * 5_246_976, 4 * 2 * 6 * 2 * 64 * 8 * 1024  # the demo exports in fp32
    assert space.cost(space.shape).memory == weights + cache
    for shape in candidates(space):
        assert space.cost(shape).memory <= 0.7 * (weights + cache)
    both = candidates(build_space(demo("prune.budget.memory_fraction=0.7", "prune.budget.params=3.4e6")))
    assert all(space.cost(shape).params <= 3.4e6 for shape in both)


def test_a_latency_limit_uses_measurements() -> None:
    space = build_space(demo("prune.budget.latency_ms=4.5"))
    # Without measurements nothing is excluded: the largest shape is close to the teacher's.
    assert sizes(student_shape(demo("prune.budget.latency_fraction=0.5"))) == (6, 256, 704, 4, 2)
    found = candidates(space, lambda shape: shape.num_layers * shape.hidden_size / 256)
    assert found
    assert all(shape.num_layers * shape.hidden_size / 256 <= 4.5 for shape in found)


def test_what_needs_importance() -> None:
    assert not student.needs_importance(PruneConfig(drop_layers=[2]))
    assert not student.needs_importance(PruneConfig(num_layers=2, layer_selection=LayerSelection.block))
    for prune in (PruneConfig(num_layers=2), PruneConfig(drop_layers=[2], hidden_size=64)):
        assert student.needs_importance(prune)
        assert student.runs_teacher(prune)
    assert not student.runs_teacher(PruneConfig(drop_layers=[2]))
    assert student.runs_teacher(PruneConfig(num_layers=2, layer_selection=LayerSelection.block))


def test_rounds_halve_the_candidates_and_double_the_steps() -> None:
    cfg = demo(TWO_THIRDS, "prune.successive_halving.round_tokens=10000", "prune.successive_halving.candidates=5")
    assert halving_rounds(cfg) == [(5, 10), (3, 20), (2, 40)]


SCORED = (TWO_THIRDS, "prune.successive_halving.round_tokens=10000")
# Overrides, and their one fault: its rule, its first key, and a part of the fix.
BUDGETS: list[tuple[list[str], str, str, str]] = [
    (["prune.budget.params=6e6"], "prune.budget.reachable", "prune.budget.params", "below"),
    (["prune.budget.params=1e6"], "prune.budget.reachable", "prune.budget.params", "or more"),
    (
        ["prune.budget.params_fraction=0.1"],
        "prune.budget.reachable",
        "prune.budget.params_fraction",
        "params_fraction to 0.4127",
    ),
    (["prune.budget.params_fraction=1.5"], "value.bounds", "prune.budget.params_fraction", ""),
    (["prune.budget.params_fraction=0"], "value.bounds", "prune.budget.params_fraction", "above 0"),
    (["prune.budget.memory_gb=1"], "prune.budget.reachable", "prune.budget.memory_gb", "below 0.0225608"),
    (["prune.budget.memory_gb=0.001"], "prune.budget.reachable", "prune.budget.memory_gb", "to 0.009709"),
    (
        ["prune.budget.params=3e6", "prune.budget.params_fraction=0.6"],
        "prune.budget.limits",
        "prune.budget.params",
        "",
    ),
    (["prune.budget.batch_size=2"], "prune.budget.limits", "prune.budget", "params_fraction=0.67"),
    ([TWO_THIRDS, "prune.num_layers=4"], "prune.budget_or_sizes", "prune.budget", "prune.budget=null"),
    ([TWO_THIRDS, "prune.drop_layers=[2]"], "prune.budget_or_sizes", "prune.budget", "set prune.budget=null"),
    ([TWO_THIRDS, "prune.budget.max_width_pruning=1.2"], "value.bounds", "prune.budget.max_width_pruning", ""),
    (
        [TWO_THIRDS, "prune.budget.seq_length=4096"],
        "prune.budget.seq_length",
        "prune.budget.seq_length",
        "at most 2048",
    ),
    (
        [TWO_THIRDS, "prune.successive_halving.candidates=3"],
        "value.missing",
        "prune.successive_halving.round_tokens",
        "",
    ),
    (
        [TWO_THIRDS, "prune.successive_halving.round_tokens=1000000"],
        "prune.successive_halving.steps",
        "prune.successive_halving.round_tokens",
        "set prune.successive_halving.round_tokens=80896 or less",
    ),
    (
        [*SCORED, "evaluate.continuations=null", "prune.successive_halving.score.task=heldout_continuations"],
        "prune.successive_halving.score",
        "prune.successive_halving.score.task",
        "evaluate.continuations={}",
    ),
    (
        [*SCORED, "prune.successive_halving.score.task=mmlu"],
        "prune.successive_halving.score",
        "prune.successive_halving.score.task",
        "set evaluate.tasks=[mmlu]",
    ),
    (
        [
            *SCORED,
            "prune.successive_halving.score.task=heldout_continuations",
            "prune.successive_halving.score.metric=exact_match",
        ],
        "prune.successive_halving.score",
        "prune.successive_halving.score.metric",
        "acc_norm",
    ),
    (
        [
            *SCORED,
            "prune.successive_halving.score.task=heldout_continuations",
            "prune.successive_halving.score.margin=-1",
        ],
        "value.bounds",
        "prune.successive_halving.score.margin",
        "",
    ),
    (
        ["prune.num_layers=4", "prune.successive_halving.round_tokens=10000"],
        "prune.successive_halving",
        "prune.successive_halving",
        "prune.budget.params_fraction=0.67",
    ),
    (
        ["prune.layer_selection=block", "prune.hidden_size=192"],
        "prune.layer_selection",
        "prune.num_layers",
        "set prune.num_layers",
    ),
    (
        [
            "prune.num_layers=4",
            *("prune.tensor_model_parallel_size=2", "cluster.devices_per_node=2", "distill.micro_batch_size=2"),
        ],
        "prune.tensor",
        "prune.tensor_model_parallel_size",
        "prune.tensor_model_parallel_size=1",
    ),
    (
        [
            *("prune.budget.latency_ms=5", "prune.pipeline_model_parallel_size=2"),
            *("cluster.devices_per_node=2", "distill.micro_batch_size=2"),
        ],
        "prune.budget.latency_ms",
        "prune.pipeline_model_parallel_size",
        "set prune.pipeline_model_parallel_size=1",
    ),
]


@pytest.mark.parametrize(("overrides", "rule", "key", "fix"), BUDGETS, ids=[" ".join(case[0]) for case in BUDGETS])
def test_an_impossible_budget_reports_the_nearest_shape(overrides: list[str], rule: str, key: str, fix: str) -> None:
    check_fault([*DEMO, *overrides], rule, key, fix)


def test_the_suggested_value_is_accepted() -> None:
    with pytest.raises(ConfigError) as caught:
        demo("prune.budget.params_fraction=0.1")
    offered = str(caught.value).partition("set prune.budget.params_fraction to ")[2].split()[0]
    cfg: Any = demo(f"prune.budget.params_fraction={offered}")
    assert candidates(build_space(cfg))


def test_pipeline_stages_divide_the_remaining_layers() -> None:
    pipeline = ("distill.parallel.pipeline_model_parallel_size=6", "cluster.devices_per_node=6")
    cfg = demo("prune.budget.params_fraction=0.95", *pipeline)
    assert {shape.num_layers for shape in student_shapes(cfg)} == {6}


LLAMA = ("experiment=demo", "model.family=llama", "model.shape.hidden_size=192", "model.shape.num_attention_heads=6")
LLAMA += ("model.shape.num_query_groups=2", "model.shape.kv_channels=32", "prune.num_layers=null")
LLAMA += ("prune.ffn_hidden_size=null",)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["prune.hidden_size=128"], "prune.hidden_size"),
        (["prune.rounds=[{hidden_size: 128, steps: 200}]", "prune.num_layers=4"], "prune.rounds[0].hidden_size"),
        (["prune.rounds=[{num_layers: 5, steps: 200}]", "prune.hidden_size=128"], "prune.hidden_size"),
        (["prune.rounds=[{num_attention_heads: 4, steps: 200}]", "prune.hidden_size=128"], None),
        (["prune.hidden_size=128", "prune.num_attention_heads=4"], None),
        (["prune.hidden_size=128", "model.family=mistral"], None),
        (["prune.num_layers=4"], None),
        # A fault that the teacher already has in transformers 5.
        (["prune.hidden_size=128", "model.shape.hidden_size=256"], None),
    ],
)
def test_llama_widths_that_transformers_rejects(overrides: list[str], key: str | None) -> None:
    """transformers 5 requires the hidden size to be a multiple of the heads, for any head size."""
    overrides = [*LLAMA, *overrides]
    if key is None:
        compose(overrides)
        return
    # Of 2 groups with 3 heads each, and 128 is not a multiple of 6.
    heads = f"{key.removesuffix('hidden_size')}num_attention_heads to 2 or 4"
    check_fault(overrides, "prune.loadable", key, heads)


def test_a_search_skips_widths_that_transformers_rejects() -> None:
    llama, mistral = (
        build_space(compose([*LLAMA, f"model.family={family}", "prune.budget.params_fraction=0.7"]))
        for family in ("llama", "mistral")
    )
    assert all(shape.hidden_size % shape.num_attention_heads == 0 for shape in candidates(llama))
    assert candidates(llama)
    assert any(shape.hidden_size % shape.num_attention_heads for shape in candidates(mistral))
    least = student.smallest(llama)
    assert (least.hidden_size, least.num_attention_heads) == (128, 4)
