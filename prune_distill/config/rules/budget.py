"""Rules of the search in the group `prune`: its budget and its successive halving."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prune_distill.config.rule import Finding, rule
from prune_distill.config.rules.prune import LENGTH, ORIGINAL, SPACE
from prune_distill.config.values import OWN_TASK, halving_rounds, require
from prune_distill.config.wording import too_long
from prune_distill.model import student
from prune_distill.schema import RunConfig
from prune_distill.schema.phases import training_phases

# The absolute limits, and the shares of the teacher's cost that limit the same.
LIMITS = {"params": "params_fraction", "memory_gb": "memory_fraction", "latency_ms": "latency_fraction"}
OWN_METRICS = ("acc", "acc_norm", "acc_mutual_info")


@rule("prune.budget.seq_length", "prune.budget.seq_length", LENGTH)
def seq_length(cfg: RunConfig) -> Iterator[Finding]:
    limit, length = require(cfg.model.shape).max_position_embeddings, require(cfg.prune.budget).seq_length
    if length is not None and length > limit:
        yield Finding("prune.budget.seq_length", too_long("prune.budget.seq_length", limit))


@rule("prune.budget.limits", *(f"prune.budget.{name}" for pair in LIMITS.items() for name in pair), ORIGINAL)
def limits(cfg: RunConfig) -> Iterator[Finding]:
    """Require limits, and each at most once."""
    given = {name: getattr(cfg.prune.budget, name) for pair in LIMITS.items() for name in pair}
    if all(value is None for value in given.values()):
        yield Finding(
            "prune.budget",
            "contains no limit; set prune.budget.params, memory_gb or latency_ms, or a fraction of the "
            f"{cfg.original_name}'s such as prune.budget.params_fraction=0.67",
        )
    for limit, share in LIMITS.items():
        if given[limit] is not None and given[share] is not None:
            key, other = f"prune.budget.{limit}", f"prune.budget.{share}"
            yield Finding(key, f"{other}={given[share]} limits the same; set one of the two to null")


@rule(
    "prune.budget.latency_ms",
    *("prune.budget.latency_ms", "prune.budget.latency_fraction", "prune.pipeline_model_parallel_size"),
)
def latency(cfg: RunConfig) -> Iterator[Finding]:
    budget, key = require(cfg.prune.budget), "prune.pipeline_model_parallel_size"
    limited = [name for name in ("latency_ms", "latency_fraction") if getattr(budget, name) is not None]
    if limited and cfg.prune.pipeline_model_parallel_size > 1:
        yield Finding(key, f"prune.budget.{limited[0]} is measured on one rank; set {key}=1")


@rule("prune.budget.reachable", *SPACE, "prune.budget.params", "prune.pipeline_model_parallel_size", ORIGINAL)
def reachable(cfg: RunConfig) -> Iterator[Finding]:
    """Require that some shape meets the limits, as far as they can be computed without measuring."""
    shape = require(cfg.model.shape)
    if shape.num_moe_experts or limits.faults(cfg) or latency.faults(cfg):
        return
    space = student.build_space(cfg)
    if all((student.depths(space), student.widths(space), student.ffns(space))):
        yield from _reachable_limits(cfg, space)
        return
    parallel = cfg.distill.parallel
    yield Finding(
        "distill.parallel",
        f"divides no size within prune.budget (tensor parallel {parallel.tensor_model_parallel_size}, pipeline "
        f"parallel {parallel.pipeline_model_parallel_size}); lower those, or raise prune.budget.max_depth_pruning or "
        "prune.budget.max_width_pruning",
    )


def _reachable_limits(cfg: RunConfig, space: student.Space) -> Iterator[Finding]:
    teacher, smallest = space.cost(space.shape), student.smallest(space)
    least = space.cost(smallest)
    for (name, share), unit, words, limit, teacher_value, smallest_value in zip(
        list(LIMITS.items())[:2],
        (1.0, student.GB),
        ("parameters", "GB"),
        space.limits[:2],
        (teacher.params, teacher.memory),
        (least.params, least.memory),
        strict=True,
    ):
        is_absolute = getattr(cfg.prune.budget, name) is not None
        key, scale = (f"prune.budget.{name}", unit) if is_absolute else (f"prune.budget.{share}", teacher_value)
        if math.isinf(limit):
            continue
        if limit >= teacher_value:
            yield Finding(
                key,
                f"no less than the {cfg.original_name}'s {teacher_value / unit:g} {words}; "
                f"set {key} below {teacher_value / scale:.6g}",
            )
        elif limit < smallest_value:
            sizes = ", ".join(f"{axis} {getattr(smallest, axis)}" for axis in student.AXES)
            yield Finding(
                key,
                f"below the {smallest_value / unit:g} {words} of the smallest shape within the bounds of the search "
                f"({sizes}); set {key} to {_round_up(smallest_value / scale)} or more, or raise "
                "prune.budget.max_depth_pruning or prune.budget.max_width_pruning",
            )


def _round_up(value: float) -> str:
    """A number to four digits, never below itself."""
    if value >= 1e4:
        return str(math.ceil(value))
    digits = 10 ** (3 - math.floor(math.log10(value)))
    return f"{math.ceil(value * digits - 1e-9) / digits:.10g}"


@rule("prune.successive_halving", "prune.successive_halving?", "prune.budget?")
def successive_halving(cfg: RunConfig) -> Iterator[Finding]:
    if cfg.prune.successive_halving is not None and cfg.prune.budget is None:
        yield Finding(
            "prune.successive_halving",
            "there is no search whose candidates could take part; set a limit such as "
            "prune.budget.params_fraction=0.67, or prune.successive_halving=null",
        )


@rule(
    "prune.successive_halving.steps",
    *("prune.successive_halving.candidates", "prune.successive_halving.round_tokens", "distill.phases"),
    *(f"distill.{name}" for name in ("max_steps", "seq_length", "global_batch_size", "micro_batch_size")),
    *(f"distill.{name}" for name in ("lr", "min_lr", "warmup_steps")),
)
def halving_length(cfg: RunConfig) -> Iterator[Finding]:
    rounds, most = halving_rounds(cfg), cfg.distill.max_steps
    steps = rounds[-1][1]
    if steps < most:
        return
    key = "prune.successive_halving.round_tokens"
    # Each round ends at twice the step of the one before.
    doubled = 2 ** (len(rounds) - 1)
    tokens = (most - 1) // doubled * training_phases(cfg.distill)[0].tokens_a_step
    fix = f"set {key}={tokens} or less, or lower" if tokens else "lower"
    yield Finding(
        key,
        f"the last round would end at step {steps} of distill.max_steps={most}; {fix} "
        f"prune.successive_halving.candidates, or set distill.max_steps to {steps + 1} or more",
    )


@rule(
    "prune.successive_halving.score",
    *(
        "prune.successive_halving.score.task",
        "prune.successive_halving.score.metric",
        "evaluate.continuations?",
        "evaluate.tasks",
    ),
)
def score(cfg: RunConfig) -> Iterator[Finding]:
    task, metric = (getattr(require(cfg.prune.successive_halving).score, name) for name in ("task", "metric"))
    known = [*([] if cfg.evaluate.continuations is None else [OWN_TASK]), *cfg.evaluate.tasks]
    if task not in known:
        fix = "evaluate.continuations={}" if task == OWN_TASK else f"evaluate.tasks=[{task}]"
        key = "prune.successive_halving.score.task"
        yield Finding(key, f"not among the tasks of the evaluation, {known}; set {fix}")
    elif task == OWN_TASK and metric not in OWN_METRICS:
        key = "prune.successive_halving.score.metric"
        yield Finding(key, f"not a metric of {OWN_TASK}; set {key} to one of {', '.join(OWN_METRICS)}")
