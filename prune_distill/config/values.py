"""Values of a config by dotted key, and values that follow from several keys. No torch."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prune_distill.model.flops import Meter
from prune_distill.model.student import student_shape
from prune_distill.schema import (
    BenchmarkConfig,
    DistillConfig,
    Init,
    ModelConfig,
    Parallel,
    Phase,
    Precision,
    RunConfig,
    Schedule,
    TeacherConfig,
)
from prune_distill.schema.phases import training_phases

# The name of the task that a run makes of its own documents.
OWN_TASK = "heldout_continuations"

# Python of the environment that `make serve-env` creates.
SERVE_PYTHON = Path(__file__).resolve().parents[2] / ".venv-serve/bin/python"

# The sources of an on-policy round: the data of the distillation, and the student's completions.
OFF_POLICY, ON_POLICY = "off-policy", "on-policy"

T = TypeVar("T")


def get_value(cfg: RunConfig, key: str, unreadable: Collection[str] = ()) -> Any:
    """The value of a dotted key such as `distill.phases[0].lr` or `data.sources.web.weight`.

    None where the value, or a group above it, is null or one of the `unreadable` keys.
    """
    value: Any = cfg
    path = ""
    for part in key.split("."):
        path = f"{path}.{part}".lstrip(".")
        if value is None or path in unreadable:
            return None
        name, _, item = part.partition("[")
        value = value[name] if isinstance(value, dict) else getattr(value, name)
        value = value[int(item.rstrip("]"))] if item else value
    return value


def replace_values(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A deep copy of a config with other values, given by dotted key."""
    cfg = copy.deepcopy(cfg)
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        setattr(get_value(cfg, group) if group else cfg, name, value)
    return cfg


def require(value: T | None) -> T:
    """A value that is known not to be null."""
    assert value is not None
    return value


def serve_python(benchmark: BenchmarkConfig) -> Path:
    """Python of the environment that has vLLM."""
    return SERVE_PYTHON if benchmark.serve_python is None else Path(benchmark.serve_python).expanduser().absolute()


def on_policy_settings(cfg: RunConfig, number: int) -> dict[str, Any]:
    """The settings of on-policy round `number`, from 1, by dotted key."""
    on_policy = require(cfg.distill.on_policy)
    return {
        # Other prompts, samples and off-policy sequences in each round. The phases of a training take the next seeds.
        "seed": (cfg.seed + 1000 * number) % 2**32,
        "distill.max_steps": on_policy.steps,
        "distill.phases": [
            Phase(max_steps=on_policy.steps, weights={OFF_POLICY: 1 - on_policy.mix, ON_POLICY: on_policy.mix})
        ],
        **{f"distill.{name}": getattr(on_policy, name) for name in ("lr", "min_lr", "warmup_steps")},
        "distill.schedule": Schedule.cosine,
        "distill.init": Init.pruned,
        # These refer to steps of the distillation before.
        **dict.fromkeys(("distill.decay_steps", "distill.swap_teacher_at_step")),
        "distill.skip_steps": [],
        "distill.controls": [],
    }


def named_models(cfg: RunConfig) -> dict[str, ModelConfig | TeacherConfig]:
    """The groups of a config that name a model, by key: the model that is pruned, and all teachers."""
    return {"model": cfg.model, "teacher": cfg.teacher, **named_source_teachers(cfg)}


def named_source_teachers(cfg: RunConfig) -> dict[str, TeacherConfig]:
    """The teachers that sources of the data name, by key."""
    # A config that is being checked may have unreadable sources.
    teachers = {name: getattr(source, "teacher", None) for name, source in (cfg.data.sources or {}).items()}
    return {f"data.sources.{name}.teacher": teacher for name, teacher in teachers.items() if teacher is not None}


def sources_of_teacher(cfg: RunConfig, number: int) -> list[str]:
    """The sources that a teacher teaches, by its number in `RunConfig.teacher_numbers`."""
    return [name for name, own in cfg.teacher_numbers.items() if own == number]


def cache_stage_settings(cfg: RunConfig, number: int) -> dict[str, Any]:
    """The settings, by dotted key, of a stage that caches the logits of teacher `number`; 0: the teacher of the run."""
    if not cfg.source_teachers:
        return {}
    sources = {
        name: dataclasses.replace(source, teacher=source.teacher or cfg.teacher)
        for name, source in require(cfg.data.sources).items()
    }
    return {"teacher": [cfg.teacher, *cfg.source_teachers][number], "data.sources": sources}


def cached_share(cfg: RunConfig) -> float | None:
    """The share of a training's sequences that a stage cache_logits caches, from the weights of the sources; None: not
    known, as they have no weights. `cfg`: the config of the stage."""
    own = cfg.cached_sources
    if own is None:
        return 1.0
    weights = {name: source.weight for name, source in require(cfg.data.sources).items()}
    if None in weights.values():
        return 1.0 if len(own) == len(weights) else None
    return sum(require(weights[name]) for name in own) / sum(map(require, weights.values()))


def describe_teachers(cfg: RunConfig, past: bool = False) -> str:
    """The teachers of a run as a sentence; empty where the model that is pruned is the only one."""
    if not cfg.source_teachers:
        return f"The teacher {'was' if past else 'is'} {cfg.teacher.hf_path}." if cfg.has_own_teacher else ""
    names = [
        cfg.teacher.hf_path or "the model that is pruned",
        *(str(teacher.hf_path) for teacher in cfg.source_teachers),
    ]
    taught = [(name, sources_of_teacher(cfg, number)) for number, name in enumerate(names)]
    clauses = [f"{name} for {', '.join(sources)}" for name, sources in taught if sources]
    return f"The teachers by source of the data {'were' if past else 'are'} {'; '.join(clauses)}."


def count_ranks(cfg: RunConfig) -> int:
    """Ranks of a distributed stage: one per device of the cluster section."""
    return cfg.cluster.nodes * cfg.cluster.devices_per_node


def caching_layout(teacher: TeacherConfig, distill: DistillConfig) -> tuple[Parallel, int]:
    """The layout in which stage `cache_logits` runs a teacher, and its sequences per forward pass.

    Only tensor and pipeline parallelism count; all other ranks are replicas.
    """
    return teacher.parallel or distill.parallel, teacher.micro_batch_size or distill.micro_batch_size


def utilization_meter(cfg: RunConfig) -> Meter | None:
    """The FLOP and the peak by which the distillation's utilization is computed.

    With a budget they are those of the largest candidate. None where the GPU or the model is not known, or the training
    is not in bf16.
    """
    gpu, teacher = cfg.cluster.gpu, cfg.teacher_shape
    if gpu is None or teacher is None or cfg.model.shape is None or cfg.distill.precision is not Precision.bf16:
        return None
    peak = gpu.bf16_tflops * 1e12 * count_ranks(cfg)
    running_teacher = teacher if cfg.distill.runs_teacher else None
    models = cfg.model.family, student_shape(cfg), running_teacher
    return Meter(cfg.distill.loss, *models, peak, cfg.teacher_family)


def halving_rounds(cfg: RunConfig) -> list[tuple[int, int]]:
    """The number of candidates in each round of successive halving, and the step of the distillation at which it
    ends."""
    successive_halving = require(cfg.prune.successive_halving)
    first = math.ceil(successive_halving.round_tokens / training_phases(cfg.distill)[0].tokens_a_step)
    plan, candidates, steps = [], successive_halving.candidates, first
    while candidates > 1:
        plan.append((candidates, steps))
        candidates, steps = math.ceil(candidates / 2), 2 * steps
    return plan


def halving_steps(cfg: RunConfig) -> int:
    """Steps of successive halving, summed over its candidates."""
    plan = halving_rounds(cfg)
    before = [0, *(step for _, step in plan[:-1])]
    return sum(candidates * (step - last) for (candidates, step), last in zip(plan, before, strict=True))
