"""The stage table: whole, in order, and what configs ask of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from conf.composition import config_groups
from conf.load import compose
from conf.schema import Loss, RunConfig
from conf.typed import schema_keys
from recipes import stages
from recipes.stages import STAGES, External, Output, find, wanted


def test_names_are_unique_and_modules_exist() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert importlib.util.find_spec(stage.module) is not None, stage.module


def test_sections_and_settings_are_keys_of_the_schema() -> None:
    known = set(schema_keys(RunConfig))
    for stage in STAGES:
        assert {*stage.sections, *stage.settings} <= known, stage.name


@pytest.mark.parametrize("name", config_groups()["experiment"])
def test_inputs_come_from_stages_that_ran_before(name: str) -> None:
    cfg = compose([f"experiment={name}"])
    done: list[str] = []
    for stage in wanted(cfg):
        sources = stage.inputs(stage.configure(cfg)).values()
        assert {source.stage for source in sources if isinstance(source, Output)} <= set(done), stage.name
        done.append(stage.name)
    assert done[-1] == "report"


def test_what_is_wanted(demo: Callable[..., RunConfig]) -> None:
    every = [stage.name for stage in STAGES]
    assert [stage.name for stage in wanted(demo("distill.controls=[ce,scratch]"))] == every
    few = wanted(demo("distill.controls=[]", "evaluate.verify_tokens=0"))
    left_out = ("distill.ce", "distill.scratch", "verify")
    assert [stage.name for stage in few] == [name for name in every if name not in left_out]
    published = wanted(compose(["experiment=qwen3_8b_to_6b_depth"]))
    assert published[0].name == "prepare_data"


def test_the_teacher_and_the_documents_are_the_demos_or_the_users(demo: Callable[..., RunConfig]) -> None:
    assert find("hf_to_nemo").inputs(demo()) == {"hf_model": Output("demo_model", "hf")}
    assert find("prepare_data").inputs(demo())["train"] == Output("demo_model", "corpus/train.jsonl")
    own = compose(["experiment=qwen3_8b_to_6b_width", "data.train=[a.jsonl]", "data.validation=[v.jsonl]"])
    assert find("prepare_data").inputs(own) == {
        "tokenizer": External(("Qwen/Qwen3-8B",), hub=True),
        "train": External(("a.jsonl",)),
        "validation": External(("v.jsonl",)),
    }


def test_a_control_is_distillation_without_a_teacher(demo: Callable[..., RunConfig]) -> None:
    cfg = demo()
    control = find("distill.ce")
    variant = control.configure(cfg)
    assert variant.distill.loss is Loss.ce
    assert cfg.distill.loss is Loss.kd
    assert "teacher" not in control.inputs(variant)
    assert "teacher" in find("distill").inputs(cfg)


def test_ranks(demo: Callable[..., RunConfig]) -> None:
    batches = ("distill.global_batch_size=8", "model.demo.training.global_batch_size=8")
    cfg = demo("cluster.devices_per_node=2", "prune.pipeline_model_parallel_size=2", *batches)
    ranks = {stage.name: stage.ranks(cfg) for stage in STAGES}
    assert {name for name, count in ranks.items() if count == 2} == {
        "prune",
        "distill",
        "distill.ce",
        "distill.scratch",
    }


def test_an_unknown_stage_is_named_with_those_there_are() -> None:
    with pytest.raises(KeyError, match="no stage 'destil'; the stages are demo_model, prepare_data"):
        find("destil")


def test_world_size_counts_all_ranks() -> None:
    assert stages.world_size(compose(["experiment=qwen3_8b_to_6b_depth"])) == 8
