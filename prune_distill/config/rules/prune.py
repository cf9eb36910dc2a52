"""Rules of the section `prune`, each fault naming a key, its value and the value to set instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

from prune_distill.config.rules.evaluation import OWN_METRICS, OWN_TASK
from prune_distill.config.wording import any_of, around, too_long
from prune_distill.model import student
from prune_distill.model.student import GB, MOST_ROUNDS, Space, shape_to_prune, student_shape
from prune_distill.schema import Budget, Depth, RunConfig, TargetSizes
from prune_distill.schema.phases import training_phases

Rule = Callable[[RunConfig], Iterator[str]]

# Steps of the sizes that Minitron can prune to (modelopt/torch/prune/plugins/mcore_minitron.py:230).
WIDTH_STEP = 64
WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", *student.EXPERT_AXES)
LIMITS = ("params", "memory_gb", "latency")
SHARES = ("params_share", "memory_share", "latency_share")


def _choice(cfg: RunConfig) -> Iterator[str]:
    """Exclusive ways to say what to prune."""
    prune = cfg.prune
    targets = {name: getattr(prune, name) for name in ("num_layers", *WIDTHS)}
    asked = [f"prune.{name}={value}" for name, value in targets.items() if value is not None]
    if prune.budget is not None:
        named = [*asked, *([f"prune.drop_layers={prune.drop_layers}"] if prune.drop_layers else [])]
        if named:
            yield (
                f"prune.budget searches all sizes, but {', '.join(named)} is set too; "
                "set prune.budget=null, or the others to null"
            )
        return
    if prune.drop_layers and prune.num_layers is not None:
        yield (
            f"prune.drop_layers={prune.drop_layers} cannot go together with prune.num_layers={prune.num_layers}; "
            "set prune.drop_layers=null, or prune.num_layers=null"
        )
    shape = cfg.model.shape
    kept = shape is not None and all(value in (None, getattr(shape, name)) for name, value in targets.items())
    if not prune.drop_layers and (kept or not asked):
        yield (
            "the prune section keeps the student as large as the teacher; set one of prune.num_layers, "
            f"prune.drop_layers, {', '.join(f'prune.{name}' for name in WIDTHS)}, or a limit such as "
            "prune.budget.params_share=0.67"
        )


def _drop_layers(cfg: RunConfig) -> Iterator[str]:
    drop, shape = cfg.prune.drop_layers, cfg.model.shape
    if not drop or shape is None:
        return
    outside = [layer for layer in drop if not 1 <= layer <= shape.num_layers]
    if outside:
        yield (
            f"prune.drop_layers={drop} names {outside}, but the teacher's layers are 1 to {shape.num_layers}; "
            f"set prune.drop_layers to numbers from 1 to {shape.num_layers}"
        )
    twice = sorted({layer for layer in drop if drop.count(layer) > 1})
    if twice:
        yield f"prune.drop_layers={drop} names {twice} more than once; set prune.drop_layers={sorted(set(drop))}"
    if len(set(drop)) >= shape.num_layers:
        yield f"prune.drop_layers={drop} leaves no layer of {shape.num_layers}; drop fewer"


def _depth(cfg: RunConfig) -> Iterator[str]:
    if cfg.prune.depth is Depth.block and cfg.prune.num_layers is None and cfg.prune.budget is None:
        yield (
            "prune.depth=block chooses which layers go, but prune.num_layers=null says of none; set prune.num_layers, "
            "or prune.depth=importance"
        )


def _sizes(cfg: RunConfig) -> Iterator[str]:
    shape = cfg.model.shape
    if shape is None:
        return
    for name in ("num_layers", *WIDTHS):
        target, teacher_value = getattr(cfg.prune, name), getattr(shape, name)
        if target is not None and teacher_value is not None and target > teacher_value:
            yield (
                f"prune.{name}={target} is larger than the teacher's {teacher_value}; "
                f"set prune.{name} to at most {teacher_value}"
            )
    for name in ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size"):
        target, teacher_value = getattr(cfg.prune, name), getattr(shape, name)
        if target is not None and target < (teacher_value or 0) and target % WIDTH_STEP:
            yield (
                f"prune.{name}={target} is not a multiple of {WIDTH_STEP}, the step in which Minitron prunes; "
                f"set prune.{name} to {any_of(around(target, WIDTH_STEP))}"
            )


def _experts(cfg: RunConfig) -> Iterator[str]:
    """What can be pruned of a mixture of experts, and of nothing else."""
    prune, shape = cfg.prune, cfg.model.shape
    if shape is None:
        return
    if not shape.num_moe_experts:
        for name in student.EXPERT_AXES:
            if getattr(prune, name) is not None:
                yield (
                    f"prune.{name}={getattr(prune, name)} prunes experts, but the teacher has none; "
                    f"set prune.{name}=null"
                )
        return
    if prune.budget is not None:
        # Its search space runs only whole mixtures (modelopt/torch/nas/plugins/megatron.py:812).
        yield (
            "prune.budget cannot search the shapes of a mixture of experts; set prune.budget=null, and sizes such as "
            "prune.num_layers"
        )
    if prune.ffn_hidden_size is not None:
        yield (
            f"prune.ffn_hidden_size={prune.ffn_hidden_size} is the size of what a mixture of experts has not; set "
            "prune.ffn_hidden_size=null, and prune.moe_ffn_hidden_size for that of an expert"
        )
    if prune.num_moe_experts is not None and prune.num_moe_experts < (shape.moe_router_topk or 0):
        yield (
            f"prune.num_moe_experts={prune.num_moe_experts} is less than the {shape.moe_router_topk} that a token goes "
            f"through; set prune.num_moe_experts to at least {shape.moe_router_topk}"
        )
    if prune.tensor_model_parallel_size > 1:
        yield (
            f"prune.tensor_model_parallel_size={prune.tensor_model_parallel_size} does not go with experts; set "
            "prune.tensor_model_parallel_size=1, and prune.pipeline_model_parallel_size to more"
        )


def _heads(cfg: RunConfig) -> Iterator[str]:
    """Minitron prunes groups, and heads within each group (modelopt/torch/prune/plugins/mcore_minitron.py:138-151)."""
    shape = cfg.model.shape
    if shape is None or (cfg.prune.num_attention_heads is None and cfg.prune.num_query_groups is None):
        return
    pruned = student_shape(cfg)
    heads, groups = pruned.num_attention_heads, pruned.num_query_groups
    most = shape.num_attention_heads // shape.num_query_groups
    fitting = [groups * per_group for per_group in range(1, most + 1)]
    if heads % groups:
        yield (
            f"prune.num_attention_heads={heads} is not divisible by the student's {groups} query groups; "
            f"set prune.num_attention_heads to {any_of(fitting)}"
        )
    elif heads // groups > most:
        yield (
            f"prune.num_attention_heads={heads} over {groups} query groups are {heads // groups} heads a group, but "
            f"the teacher has {most}; set prune.num_attention_heads to {any_of(fitting)}"
        )


def _loadable(cfg: RunConfig) -> Iterator[str]:
    """Widths that the family's class in transformers takes together (prune_distill/model/student.py, loadable)."""
    shape, prune = cfg.model.shape, cfg.prune
    # A search considers none that transformers refuses.
    if shape is None or prune.budget is not None:
        return
    pruned = student_shape(cfg)
    if student.loadable(pruned, cfg.model.family, shape):
        return
    hidden, heads, groups = pruned.hidden_size, pruned.num_attention_heads, pruned.num_query_groups
    key = "hidden_size" if prune.hidden_size is not None else "num_attention_heads"
    fitting = {
        "hidden_size": [size for size in around(hidden, math.lcm(heads, WIDTH_STEP)) if size < shape.hidden_size],
        "num_attention_heads": [
            count
            for count in range(groups, groups * (shape.num_attention_heads // shape.num_query_groups) + 1, groups)
            if hidden % count == 0
        ],
    }
    fixes = [f"prune.{name} to {any_of(values)}" for name, values in fitting.items() if values]
    yield (
        f"prune.{key}={getattr(prune, key)}: transformers 5 loads no Llama whose hidden size {hidden} is not a multiple"
        f" of its {heads} attention heads; set {', or '.join(fixes) or f'prune.{key} to null'}"
    )


def _calibration(cfg: RunConfig) -> Iterator[str]:
    shape = cfg.model.shape
    if shape is None:
        return
    budget = cfg.prune.budget
    lengths = {"calibration_seq_length": cfg.prune.calibration_seq_length}
    if budget is not None and budget.seq_length is not None:
        lengths["budget.seq_length"] = budget.seq_length
    for key, length in lengths.items():
        if length > shape.max_position_embeddings:
            yield too_long(f"prune.{key}", length, shape)


def _pipeline(cfg: RunConfig) -> Iterator[str]:
    shape, stages = cfg.model.shape, cfg.prune.pipeline_model_parallel_size
    if shape is not None and stages > shape.num_layers:
        yield (
            f"prune.pipeline_model_parallel_size={stages} is more than the teacher's {shape.num_layers} layers; "
            f"set prune.pipeline_model_parallel_size to at most {shape.num_layers}"
        )


def _tensor(cfg: RunConfig) -> Iterator[str]:
    """ModelOpt's importance is for one tensor-parallel rank (modelopt/torch/nas/plugins/megatron.py:1363)."""
    prune, shape = cfg.prune, cfg.model.shape
    size = prune.tensor_model_parallel_size
    if size == 1:
        return
    if not prune.drop_layers or any(getattr(prune, name) is not None for name in WIDTHS):
        yield (
            f"prune.tensor_model_parallel_size={size} works only where prune.drop_layers names the layers and no width "
            "is pruned; set prune.tensor_model_parallel_size=1, and prune.pipeline_model_parallel_size to more"
        )
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    uneven = (
        [] if shape is None else [f"{name} {getattr(shape, name)}" for name in names if getattr(shape, name) % size]
    )
    if uneven:
        yield (
            f"prune.tensor_model_parallel_size={size} does not divide the teacher's {', '.join(uneven)}; "
            "set prune.tensor_model_parallel_size=1"
        )


def _ranks(cfg: RunConfig) -> Iterator[str]:
    there_are = cfg.cluster.devices_per_node
    pipeline, tensor = cfg.prune.pipeline_model_parallel_size, cfg.prune.tensor_model_parallel_size
    keys = f"prune.pipeline_model_parallel_size={pipeline}"
    if tensor > 1:
        keys += f" x prune.tensor_model_parallel_size={tensor}"
    if pipeline * tensor > there_are:
        yield (
            f"{keys} is more than the {there_are} devices of a node; "
            f"set prune.pipeline_model_parallel_size to at most {max(1, there_are // tensor)}, or "
            f"cluster.devices_per_node={pipeline * tensor}"
        )


def _limits(cfg: RunConfig) -> Iterator[str]:
    """That a budget says something, and says it once."""
    budget = cfg.prune.budget
    if budget is None:
        return
    given = {name: getattr(budget, name) for name in (*LIMITS, *SHARES)}
    if not any(value is not None for value in given.values()):
        yield (
            "prune.budget limits nothing; set prune.budget.params, .memory_gb or .latency, or a share of the teacher's "
            "such as prune.budget.params_share=0.67"
        )
    for limit, share in zip(LIMITS, SHARES, strict=True):
        if given[limit] is not None and given[share] is not None:
            yield (
                f"prune.budget.{limit}={given[limit]} and prune.budget.{share}={given[share]} both limit the same; "
                "set one of them to null"
            )
    if (budget.latency is not None or budget.latency_share is not None) and cfg.prune.pipeline_model_parallel_size > 1:
        yield (
            "a budget of latency is measured on one rank, but prune.pipeline_model_parallel_size="
            f"{cfg.prune.pipeline_model_parallel_size}; set prune.pipeline_model_parallel_size=1"
        )


def _reachable(cfg: RunConfig) -> Iterator[str]:
    """That some shape meets the limits, as far as they can be computed without measuring."""
    if cfg.prune.budget is None or cfg.model.shape is None or list(_limits(cfg)) or cfg.model.shape.num_moe_experts:
        return
    space = student.space_of(cfg)
    if not all((student.depths(space), student.widths(space), student.ffns(space))):
        parallel = cfg.distill.parallel
        yield (
            "prune.budget leaves no size that distill.parallel divides (tensor parallel "
            f"{parallel.tensor_model_parallel_size}, pipeline parallel {parallel.pipeline_model_parallel_size}); lower "
            "those, or raise "
            "prune.budget.max_depth_cut or prune.budget.max_width_cut"
        )
        return
    yield from _unreachable(cfg.prune.budget, space)


def _unreachable(budget: Budget, space: Space) -> Iterator[str]:
    whole, least = space.cost(space.shape), space.cost(student.smallest(space))
    limits = (
        ("params", 1.0, "parameters", space.limits[0], whole.params, least.params),
        ("memory_gb", GB, "GB", space.limits[1], whole.memory, least.memory),
    )
    for (name, unit, words, limit, teacher_value, smallest), share in zip(limits, SHARES, strict=False):
        if math.isinf(limit):
            continue
        key = name if getattr(budget, name) is not None else share
        scale = unit if key == name else teacher_value
        said = f"prune.budget.{key}={getattr(budget, key):g}"
        if limit >= teacher_value:
            yield (
                f"{said} is no less than the teacher's {teacher_value / unit:g} {words}; "
                f"set prune.budget.{key} below {teacher_value / scale:.6g}"
            )
        elif limit < smallest:
            sizes = ", ".join(f"{axis} {getattr(student.smallest(space), axis)}" for axis in student.AXES)
            yield (
                f"{said} is below the {smallest / unit:g} {words} of the smallest shape within max_depth_cut and "
                f"max_width_cut ({sizes}); set prune.budget.{key} to {_up(smallest / scale)} or more, or raise those"
            )


def _up(value: float) -> str:
    """A number to four figures, never below itself."""
    if value >= 1e4:
        return str(math.ceil(value))
    digits = 10 ** (3 - math.floor(math.log10(value)))
    return f"{math.ceil(value * digits - 1e-9) / digits:.10g}"


def _tournament(cfg: RunConfig) -> Iterator[str]:
    tournament = cfg.prune.tournament
    if tournament is None:
        return
    if cfg.prune.budget is None:
        yield (
            "prune.tournament chooses among the candidates of a search, but prune.budget=null; set a limit such as "
            "prune.budget.params_share=0.67, or prune.tournament=null"
        )
    steps = rounds(cfg)[-1][1]
    if steps >= cfg.distill.max_steps:
        yield (
            f"prune.tournament takes the last to step {steps}, but distill.max_steps={cfg.distill.max_steps}; "
            "lower prune.tournament.round_tokens or .candidates, or raise distill.max_steps"
        )


def _score(cfg: RunConfig) -> Iterator[str]:
    score = cfg.prune.tournament.score if cfg.prune.tournament is not None else None
    if score is None:
        return
    own = [] if cfg.evaluate.continuations is None else [OWN_TASK]
    asked = [*own, *cfg.evaluate.tasks]
    if score.task not in asked:
        fix = "evaluate.continuations={}" if score.task == OWN_TASK else f"evaluate.tasks=[{score.task}]"
        yield f"prune.tournament.score.task={score.task} is none of the tasks that evaluate asks, {asked}; set {fix}"
    elif score.task == OWN_TASK and score.metric not in OWN_METRICS:
        yield (
            f"prune.tournament.score.metric={score.metric} is none of {OWN_TASK}'s; set it to one of "
            f"{', '.join(OWN_METRICS)}"
        )


def rounds(cfg: RunConfig) -> list[tuple[int, int]]:
    """Of each round of the tournament: how many take part, and the step of the distillation at which it ends."""
    tournament = cfg.prune.tournament
    assert tournament is not None
    first = math.ceil(tournament.round_tokens / training_phases(cfg.distill)[0].tokens_a_step)
    plan, taking_part, steps = [], tournament.candidates, first
    while taking_part > 1:
        plan.append((taking_part, steps))
        taking_part, steps = math.ceil(taking_part / 2), 2 * steps
    return plan


def steps_of_rounds(cfg: RunConfig) -> int:
    """Steps of the tournament, all candidates' together."""
    plan = rounds(cfg)
    before = [0, *(step for _, step in plan[:-1])]
    return sum(taking_part * (step - last) for (taking_part, step), last in zip(plan, before, strict=True))


# Of one round of pruning.
ROUND_RULES: tuple[Rule, ...] = (_choice, _drop_layers, _depth, _sizes, _experts, _heads, _loadable)


def _rounds(cfg: RunConfig) -> Iterator[str]:
    """What rounds may not be, and the rules of each but the last."""
    earlier = cfg.prune.rounds
    if earlier and cfg.prune.budget is not None:
        yield (
            "prune.budget searches among shapes of the teacher, which prune.rounds leaves behind; state the sizes of "
            "the last round and set prune.budget=null, or set prune.rounds=[]"
        )
    if len(earlier) > MOST_ROUNDS:
        yield f"prune.rounds has {len(earlier)} rounds before the last; set {MOST_ROUNDS} of them at most"
        return
    for index, own in enumerate(earlier):
        key = f"prune.rounds[{index}]"
        if own.steps <= cfg.distill.warmup_steps:
            yield (
                f"{key}.steps={own.steps} end before the learning rate is at its height (distill.warmup_steps="
                f"{cfg.distill.warmup_steps}); set {key}.steps to more"
            )
        view = _of_round(cfg, own, index)
        yield from (f"{key}: {fault}" for rule in ROUND_RULES for fault in rule(view))


def _last(rule: Rule) -> Rule:
    """A rule of the last round: its sizes are those of `prune` itself."""

    def check_last_round(cfg: RunConfig) -> Iterator[str]:
        earlier = cfg.prune.rounds
        # With a budget as well, `_rounds` has said that one of them has to go.
        in_rounds = earlier and cfg.prune.budget is None
        return rule(_of_round(cfg, cfg.prune, len(earlier)) if in_rounds else cfg)

    return check_last_round


def _of_round(cfg: RunConfig, sizes: TargetSizes, earlier: int) -> RunConfig:
    """What the rules of a round read: its sizes, and as the model's shape that which earlier rounds leave."""
    shape = None if cfg.model.shape is None else shape_to_prune(cfg, earlier)
    names = {name: getattr(sizes, name) for name in (*student.AXES, *student.EXPERT_AXES, "drop_layers")}
    as_they_are = {name: getattr(cfg.prune, name) for name in ("depth", "tensor_model_parallel_size")}
    prune = SimpleNamespace(**names, **as_they_are, rounds=[], budget=None)
    model = SimpleNamespace(shape=shape, family=cfg.model.family)
    return cast(RunConfig, SimpleNamespace(model=model, prune=prune))


RULES: tuple[Rule, ...] = (
    *(_last(rule) for rule in ROUND_RULES),
    _rounds,
    _calibration,
    _pipeline,
    _tensor,
    _ranks,
    _limits,
    _reachable,
    _tournament,
    _score,
)
