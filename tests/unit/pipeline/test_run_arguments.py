"""Arguments of a stage's `run`: the view of the config, and the dataclass of its inputs."""

from __future__ import annotations

import ast
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.config.composition import config_groups
from prune_distill.pipeline.run_arguments import ConfigView, InputPath, UndeclaredKeyError, fill_inputs, view_config
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import STAGES, find, select_stages
from prune_distill.schema import DistillConfig, Loss, RunConfig
from prune_distill.schema.fields import Identity, identity_of
from tests.helpers.config_reads import keys_read, keys_read_of

ROOT = Path(__file__).resolve().parents[3]
SEARCHED = ("prune.num_layers=null", "prune.ffn_hidden_size=null", "prune.budget.params_fraction=0.667")
HALVING = (*SEARCHED, "prune.successive_halving.round_tokens=10000")
TASK = ("prune.successive_halving.score.task=mmlu", "evaluate.tasks=[mmlu]", "evaluate.task_folder=tasks")
CORRECTED = ("distill.teacher_correction={max_steps: 9, seq_length: 64, global_batch_size: 4, lr: 1e-4, min_lr: 1e-5}",)
ROUNDS = ("prune.rounds=[{steps: 20, num_layers: 5}, {steps: 30, drop_layers: [2]}]", "prune.num_layers=3")
ON_POLICY = "distill.on_policy={rounds: 4, steps: 30, lr: 1e-5, prompts_per_round: 8, prompts: [p.jsonl]}"
TEACHER = (
    "teacher={hf_path: /models/teacher, family: llama, shape: {num_layers: 8, hidden_size: 320, ffn_hidden_size: 960, "
    "num_attention_heads: 5, num_query_groups: 5, kv_channels: 64, vocab_size: 1088, max_position_embeddings: 2048}}"
)
BY_SOURCE = "data.sources={{{}}}".format(
    ", ".join(
        f"{name}: {{files: [{name}.jsonl], {TEACHER.replace('=', ': ').replace('/teacher', f'/{name}')}}}"
        for name in "abcd"
    )
)
# Together they use every stage of the table.
VARIANTS = {
    "stored": ("distill.teacher_logits=cached", "distill.controls=[ce,scratch]", "evaluate.recovery=true"),
    "scored": (*HALVING, *TASK, "benchmark.enabled=true"),
    "swapped": (*CORRECTED, *ROUNDS, "distill.swap_teacher_at_step=20"),
    "quantized": (
        *("quantize.formats=[fp8,fp8_tensor,nvfp4,int8,int4]", "distill.quantize=int4"),
        *("cluster.gpu=h100_sxm", "benchmark.engine=vllm", "evaluate.engine=vllm"),
    ),
    "on_policy": ("distill.teacher_logits=cached", ON_POLICY),
    "taught": (TEACHER, *CORRECTED),
    "taught_by_source": ("distill.teacher_logits=cached", BY_SOURCE, "evaluate.verify_tokens=8"),
    "tokens": ("data.train=[a.jsonl]", "data.format=tokens", "data.validation=[v.jsonl]"),
}
EXPERIMENTS = [name for name in config_groups()["experiment"] if name != "own"]
# Keys that `Evaluator.measure` reads, which successive halving does not call.
NOT_REACHED = {
    "recipes.successive_halving": {"evaluate.max_sequences", "evaluate.samples", "evaluate.sample_new_tokens"}
}
# Keys that `prune_distill.schema.phases.phase_sizes` reads by name.
BY_NAME = {"distill.lr", "distill.min_lr", "distill.seq_length", "distill.global_batch_size"}


@cache
def configs() -> dict[str, RunConfig]:
    shipped = {name: compose([f"experiment={name}"]) for name in EXPERIMENTS}
    return shipped | {name: compose(["experiment=demo", *overrides]) for name, overrides in VARIANTS.items()}


def configured_stages() -> Iterator[tuple[Stage, RunConfig]]:
    """Yield every stage of every config with its config."""
    for cfg in configs().values():
        yield from ((stage, stage.configure(cfg)) for stage in select_stages(cfg))


@cache
def keys_of(module: str) -> set[str]:
    """Return the keys that a stage's module reads."""
    found = keys_read(module)
    if module == "recipes.report":
        for path in (ROOT / "prune_distill" / "reporting").glob("*.py"):
            found |= keys_read_of(f"prune_distill.reporting.{path.stem}", "run.cfg")
    return found - NOT_REACHED.get(module, set())


def read(view: Any, key: str) -> None:
    for part in key.split("."):
        view = None if view is None else getattr(view, part)


def test_the_configs_use_every_stage() -> None:
    rounds = {f".round{number}" for number in (1, 2)}
    wanted = {stage.name for stage, _ in configured_stages()}
    assert {stage.name for stage in STAGES if ".round" not in stage.name} <= wanted
    assert rounds <= {f".{name.partition('.')[2]}" for name in wanted}


def test_stages_read_only_keys_that_they_declare() -> None:
    for stage, cfg in configured_stages():
        view = view_config(cfg, stage)
        for key in keys_of(stage.module):
            read(view, key)


def test_every_key_that_is_declared_as_read_is_read() -> None:
    for module in {stage.module for stage in STAGES}:
        rows = [stage for stage in STAGES if stage.module == module]
        read_here = BY_NAME | keys_of(module)
        declared = {key for stage in rows for key in (*stage.reads, *stage.shows)}
        assert not {key for key in declared if not any(f"{found}.".startswith(f"{key}.") for found in read_here)}, (
            module
        )


def test_a_field_that_another_stage_hashes_is_read_by_that_stage_alone() -> None:
    for stage, cfg in configured_stages():
        for key in keys_of(stage.module):
            owner: Any = cfg
            for part in key.split("."):
                field = type(owner).__dataclass_fields__[part]
                if identity_of(field, owner) is Identity.hashed_elsewhere:
                    assert any(f"{key}.".startswith(f"{own}.") for own in stage.hashed_keys(cfg)), (stage.name, key)
                owner = getattr(owner, part)
                if not dataclasses.is_dataclass(owner):
                    break


def test_fields_have_reasons() -> None:
    reasons = [reason for stage in STAGES for reason in stage.reads.values()]
    assert all(len(reason) > 15 for reason in reasons)


@pytest.fixture
def view() -> RunConfig:
    stage = dataclasses.replace(find("importance"), sections=("distill.kd.temperature", "evaluate"), name="mine")
    return view_config(configs()["demo"], stage)


def test_declared_keys_and_placement_can_be_read(view: RunConfig) -> None:
    cfg = configs()["demo"]
    assert view.distill.kd.temperature == cfg.distill.kd.temperature
    assert view.evaluate is cfg.evaluate  # a declared group is the real one, for replace and asdict
    assert view.seed == cfg.seed
    assert view.cluster is cfg.cluster
    assert view.distill.parallel is cfg.distill.parallel
    assert view.distill.micro_batch_size == cfg.distill.micro_batch_size


@pytest.mark.parametrize(
    "key", ["name", "data.train", "distill.lr", "distill.kd.top_k", "distill.val_batches", "distill.teacher_correction"]
)
def test_another_key_raises_with_the_stage_and_the_key(view: RunConfig, key: str) -> None:
    with pytest.raises(UndeclaredKeyError, match=rf"stage mine reads {key}, "):
        read(view, key)


def test_properties_have_the_restrictions_of_the_view() -> None:
    cfg = configs()["demo"]
    both = ConfigView(cfg.distill, frozenset({"loss", "teacher_logits"}), "mine")
    assert both.runs_teacher is cfg.distill.runs_teacher
    one = ConfigView(dataclasses.replace(cfg.distill, loss=Loss.kd), frozenset({"loss"}), "mine")
    with pytest.raises(UndeclaredKeyError, match="reads teacher_logits"):
        _ = one.runs_teacher
    with pytest.raises(AttributeError, match="no_such_key"):
        _ = one.no_such_key


def test_checking_a_group_for_null_needs_a_declaration(view: RunConfig) -> None:
    with pytest.raises(UndeclaredKeyError, match=r"reads prune\.budget"):
        _ = view.prune.budget
    declared = view_config(configs()["demo"], find("search"))
    assert declared.prune.budget is None


def test_a_field_that_is_hashed_under_a_condition_is_placement_otherwise() -> None:
    distill = configs()["demo"].distill
    alone: DistillConfig = dataclasses.replace(distill, loss=Loss.ce)
    assert ConfigView(alone, frozenset(), "mine").teacher_logits is alone.teacher_logits
    with pytest.raises(UndeclaredKeyError):
        _ = ConfigView(distill, frozenset(), "mine").teacher_logits


def test_a_view_survives_copies(view: RunConfig) -> None:
    assert copy.deepcopy(view).seed == view.seed


@dataclass(frozen=True)
class Some:
    data: Path
    others: dict[str, InputPath]
    extra: Path | None = None


@dataclass(frozen=True)
class Fixed:
    data: Path


def test_inputs_are_filled_by_name_and_the_others_by_name_in_one_field() -> None:
    paths = {"data": Path("d"), "a": "owner/name", "others": Path("o")}
    assert fill_inputs(Some, paths) == Some(Path("d"), {"a": "owner/name", "others": Path("o")})
    assert fill_inputs(Fixed, {"data": Path("d")}) == Fixed(Path("d"))
    with pytest.raises(TypeError, match="more"):
        fill_inputs(Fixed, {"data": Path("d"), "more": Path("m")})
    with pytest.raises(TypeError, match="data"):
        fill_inputs(Fixed, {})


@cache
def inputs_class(module: str) -> type[Any]:
    """Return `Inputs` of a stage's module without importing it, because most modules import NeMo."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    (definition,) = [node for node in ast.parse(source).body if getattr(node, "name", None) == "Inputs"]
    names: dict[str, Any] = {**globals()}
    exec(ast.unparse(definition), names)
    found: type[Any] = names["Inputs"]
    return found


def test_the_inputs_of_the_stage_table_are_fields_of_the_stages_inputs() -> None:
    filled: dict[str, set[str]] = {}
    for stage, cfg in configured_stages():
        inputs = fill_inputs(inputs_class(stage.module), {name: Path(name) for name in stage.inputs(cfg)})
        given = {field.name for field in dataclasses.fields(inputs) if getattr(inputs, field.name) not in (None, {})}
        filled.setdefault(stage.module, set()).update(given)
    for stage in STAGES:
        assert filled[stage.module] == {field.name for field in dataclasses.fields(inputs_class(stage.module))}
