"""Rules read the keys that they declare, and are skipped if one of them has no usable value."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.config import load
from prune_distill.config.composition import config_groups
from prune_distill.config.rule import Finding, Rule, rule
from prune_distill.config.typed import schema_keys
from prune_distill.config.validate import ALL_RULES, validate
from prune_distill.errors import ConfigError, Fault
from prune_distill.schema import RunConfig
from tests.helpers.faults import find_faults

DEMO = ["experiment=demo", "prune.ffn_hidden_size=null"]
CORRECTION = "{max_steps: 9, seq_length: 64, global_batch_size: 4, lr: 1e-4, min_lr: 1e-5}"
ON_POLICY = "{steps: 9, lr: 1e-5, min_lr: 1e-4, warmup_steps: 9, prompts_per_round: 8, server_url: x, prompts: [p]}"
MOE = ["model.family=qwen3_moe", "model.shape.num_moe_experts=4", "model.shape.moe_ffn_hidden_size=128"]
BUDGET = [*DEMO, "prune.num_layers=null", "prune.budget.params_fraction=0.8"]
PAIRS = "distill.kd.intermediate_pairs=[{student: 2, teacher: 9}]"
FP8 = ["distill.fp8=blockwise", "distill.teacher_fp8=true", "model.demo.training.fp8=hybrid"]
CACHE_LAYOUT = [
    "teacher.parallel={tensor_model_parallel_size: 3, pipeline_model_parallel_size: 4, context_parallel_size: 2}",
    "teacher.micro_batch_size=3",
]
SLURM = [*DEMO, "cluster=slurm", "cluster.slurm.partition=a b", "cluster.slurm.account=null"]
TEACHER = (
    "{hf_path: m/t, family: llama, shape: {num_layers: 8, hidden_size: 320, ffn_hidden_size: 960, "
    "num_attention_heads: 5, num_query_groups: 5, kv_channels: 64, vocab_size: 1088, max_position_embeddings: 2048}}"
)
BY_SOURCE = f"data.sources={{web: {{files: [w.jsonl]}}, code: {{files: [c.jsonl], teacher: {TEACHER}}}}}"
# Configs that cover as many branches of the rules as possible.
CONFIGS = [
    *([f"experiment={name}"] for name in config_groups()["experiment"] if name != "own"),
    [
        *DEMO,
        f"distill.teacher_correction={CORRECTION}",
        "distill.swap_teacher_at_step=200",
        "distill.teacher_logits=cached",
    ],
    [*DEMO, "distill.loss=ce", f"distill.teacher_correction={CORRECTION}", "prune.num_layers=null"],
    [*DEMO, *CACHE_LAYOUT, "distill.loss=ce", "distill.packing=documents"],
    [*DEMO, *CACHE_LAYOUT, "distill.teacher_logits=cached", "distill.fp8=hybrid", "distill.teacher_fp8=true"],
    [*DEMO, *MOE, "model.shape.moe_router_topk=2", "prune.num_moe_experts=1", "prune.tensor_model_parallel_size=2"],
    [*DEMO, *MOE, "model.shape.moe_router_topk=5", "distill.parallel.expert_model_parallel_size=3"],
    [*BUDGET, "prune.successive_halving={round_tokens: 1000, score: {task: mmlu}}", "prune.hidden_size=64"],
    [*BUDGET, "prune.budget.latency_ms=5", "prune.budget.seq_length=4096", "prune.pipeline_model_parallel_size=2"],
    [*DEMO, "prune.rounds=[{steps: 20, num_layers: 5, num_attention_heads: 3}]", "distill.wandb={project: x}", PAIRS],
    [
        *DEMO,
        "prune.layer_selection=block",
        "prune.num_layers=null",
        "prune.drop_layers=[2,9]",
        "distill.recompute=full",
        PAIRS,
    ],
    [*DEMO, "distill.phases=[{max_steps: 80}, {tokens: 80, weights: {web: 1}}]", "distill.schedule=wsd"],
    [*DEMO, "distill.loss=ce", f"distill.on_policy={ON_POLICY}", "distill.seq_length=100"],
    [*DEMO, f"distill.on_policy={ON_POLICY}", "distill.on_policy.engine=server", "distill.on_policy.prompts=[]"],
    [*DEMO, "distill.parallel={tensor_model_parallel_size: 3, pipeline_model_parallel_size: 2}", PAIRS],
    [*DEMO, "data.sources={web: {files: [w.jsonl], weight: 1}, code: {files: []}}", "data.validation=[w.jsonl]"],
    [*DEMO, BY_SOURCE, "distill.teacher_logits=cached", "distill.parallel.pipeline_model_parallel_size=2"],
    [*DEMO, BY_SOURCE, f"distill.teacher_correction={CORRECTION}", f"distill.on_policy={ON_POLICY}"],
    [
        *DEMO,
        *FP8,
        "cluster.gpu=a100_80",
        "distill.precision=bf16",
        "distill.micro_batch_size=1",
        "distill.seq_length=40",
    ],
    [
        *DEMO,
        *FP8,
        "cluster.gpu=l40s",
        "model.shape.num_attention_heads=6",
        "prune.rounds=[{steps: 9, hidden_size: 40}]",
    ],
    [*BUDGET, *FP8, *MOE, "model.shape.moe_router_topk=2"],
    [*DEMO, "distill.loss=ce", "distill.teacher_fp8=true", f"distill.teacher_correction={CORRECTION}"],
    [*DEMO, "distill.kd.top_k=9", "distill.kd.divergence=reverse_kl", "distill.kd.implementation=upstream"],
    [*SLURM, "cluster.slurm.container_image=x", "cluster.slurm.container_mounts=[a]", "cluster.slurm.secrets=[A]"],
    [*SLURM, "cluster.slurm.container_image=null", "cluster.slurm.container_mounts=[a]", "evaluate.tasks=[mmlu]"],
]


class UndeclaredReadError(AssertionError):
    """A rule read a key that it does not declare."""


def guard(value: Any, reads: Iterable[str], key: str = "") -> Any:
    """Copy a dataclass; reading a key that is not one of `reads`, or above or below one of them, raises.

    `dataclasses.replace` may copy every field.
    """
    declared = {read.replace("?", "") for read in reads}
    if not dataclasses.is_dataclass(value) or isinstance(value, type) or key in declared - _only_null(reads):
        return value
    prefix = f"{key}." if key else ""
    names = [field.name for field in dataclasses.fields(value)]
    hidden = {name for name in names if not any(f"{read}.".startswith(f"{prefix}{name}.") for read in declared)}

    def read(self: Any, name: str) -> Any:
        if name in hidden and sys._getframe(1).f_code.co_filename != dataclasses.__file__:
            raise UndeclaredReadError(prefix + name)
        return object.__getattribute__(self, name)

    copy = object.__new__(type(type(value).__name__, (type(value),), {"__getattribute__": read}))
    for name in names:
        object.__setattr__(copy, name, guard(getattr(value, name), reads, prefix + name))
    return copy


def _only_null(reads: Iterable[str]) -> set[str]:
    return {read.rstrip("?") for read in reads if read.endswith("?")}


def read_config(overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, set[str]]:
    """Return a config and its unreadable keys, regardless of faults."""
    found: list[tuple[RunConfig, set[str]]] = []

    def record(cfg: RunConfig, unreadable: Collection[str] = ()) -> list[Fault]:
        found.append((cfg, set(unreadable)))
        return []

    with monkeypatch.context() as patched:
        patched.setattr(load, "validate", record)
        with contextlib.suppress(ConfigError):
            compose(overrides)
    return found[0]


def test_rules_read_only_the_keys_that_they_declare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried: set[tuple[str, tuple[str, ...]]] = set()
    undeclared: list[str] = []
    for overrides in CONFIGS:
        cfg, unreadable = read_config(overrides, monkeypatch)
        bad = {*unreadable, *(fault.keys[0] for fault in validate(cfg, unreadable) if fault.rule == "value.bounds")}
        for one in ALL_RULES:
            if one.applies_to(cfg, bad):
                tried.add((one.id, one.reads))
                try:
                    list(one.check(guard(cfg, one.reads)))
                except UndeclaredReadError as error:
                    undeclared.append(f"{one.id} reads {error} ({' '.join(overrides)})")
    assert undeclared == []
    assert {(one.id, one.reads) for one in ALL_RULES} - tried == set()


def test_an_undeclared_read_raises() -> None:
    cfg = compose(["experiment=demo"])
    guarded = guard(cfg, ["distill.lr", "model.shape.num_layers", "model.demo?", "prune"])
    assert (guarded.distill.lr, guarded.model.shape.num_layers, guarded.prune.rounds) == (0.001, 6, [])
    assert dataclasses.replace(guarded.model.shape, num_layers=5).num_layers == 5
    assert guarded.model.demo is not None
    for read in (
        lambda: guarded.distill.min_lr,
        lambda: dataclasses.replace(guarded.model.shape, num_layers=5).hidden_size,
        lambda: guarded.model.demo.training,
        lambda: guarded.seed,
    ):
        with pytest.raises(UndeclaredReadError):
            read()


def test_rules_declare_keys_that_exist() -> None:
    known = set(schema_keys(RunConfig))
    assert [read for rule in ALL_RULES for read in rule.reads if read.replace("?", "") not in known] == []


@pytest.mark.parametrize(
    ("reads", "unreadable", "applies"),
    [
        (["distill.lr"], [], True),
        (["distill.lr"], ["distill.min_lr"], True),
        (["distill.lr"], ["distill.lr"], False),
        (["distill.lr"], ["distill"], False),
        (["distill.phases"], ["distill.phases[0].lr"], False),
        (["model.shape?"], ["model.shape.num_layers"], True),
        (["model.shape?"], ["model.shape"], False),
        (["model.shape"], ["model.shape.num_layers"], False),
        # A group that is null.
        (["cluster.slurm.mem"], [], False),
        (["cluster.slurm?.mem"], [], True),
        (["cluster.slurm?.mem"], ["cluster.slurm.mem"], False),
        (["cluster.slurm?"], [], True),
    ],
)
def test_rules_with_unusable_keys_are_skipped(reads: list[str], unreadable: list[str], applies: bool) -> None:
    cfg = compose(["experiment=demo"])
    assert Rule("any", tuple(reads), lambda cfg: iter(())).applies_to(cfg, unreadable) is applies


def test_a_finding_becomes_a_fault() -> None:
    @rule("distill.example", "distill.lr")
    def example(cfg: RunConfig) -> Iterable[Finding]:
        yield Finding(
            "distill.lr", "above distill.min_lr and data.train; set distill.phases[0].lr=1 in /x/data.train.gz"
        )
        yield Finding("distill.lr", "wrong; set it", value=None)
        yield Finding("model.hf_path", "/x/config.json: missing; add it", names_file=True)

    assert example.faults(compose(["experiment=demo"])) == [
        Fault(
            "distill.example",
            ("distill.lr", "distill.min_lr", "data.train", "distill.phases[0].lr"),
            "distill.lr=0.001: above distill.min_lr and data.train; set distill.phases[0].lr=1 in /x/data.train.gz",
        ),
        Fault("distill.example", ("distill.lr",), "distill.lr=null: wrong; set it"),
        Fault("distill.example", ("model.hf_path",), "/x/config.json: missing; add it"),
    ]


def test_pairs_are_checked_against_the_students_of_all_rounds() -> None:
    rounds = "prune.rounds=[{steps: 20, num_layers: 5}]"
    pairs = "distill.kd.intermediate_pairs=[{student: 5, teacher: 6}]"
    compose(["experiment=demo", rounds, pairs.replace("5", "4")])
    (fault,) = find_faults(["experiment=demo", rounds, pairs])
    assert fault.rule == "kd.pairs"
    assert "the student has no layers [5]" in str(fault)
