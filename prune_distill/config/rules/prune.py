"""Rules of the sizes in the group `prune`, and of how pruning is distributed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from prune_distill.config.rule import Finding, rule
from prune_distill.config.values import require
from prune_distill.config.wording import any_of, around, quote_for_hydra, too_long
from prune_distill.model.student import AXES, EXPERT_AXES, MOST_ROUNDS, loadable, resize, shape_to_prune
from prune_distill.schema import LayerSelection, RunConfig, Shape, TargetSizes

# Step of the sizes that Minitron can prune to (modelopt/torch/prune/plugins/mcore_minitron.py:230).
WIDTH_STEP = 64
WIDTHS = (*AXES[1:], *EXPERT_AXES)
LENGTH = "model.shape.max_position_embeddings"
SHAPE = tuple(f"model.shape.{field.name}" for field in fields(Shape))
SIZES = (*(f"prune.{name}" for name in (*AXES, *EXPERT_AXES)), "prune.drop_layers", "prune.rounds")
# What the sizes of each round are compared with.
# Decides what messages call the model that is pruned.
ORIGINAL = "teacher.hf_path"
ROUNDS = (*SHAPE, *SIZES, "prune.budget?", ORIGINAL)
# What the space of a search depends on.
SPACE = (
    *(*SHAPE, "model.family", "prune.budget", "prune.calibration_seq_length", "convert.export_dtype"),
    *(f"distill.parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline")),
)
STUDENT = (*SPACE, *SIZES)


@dataclass(frozen=True)
class Round:
    """A round of pruning.

    Attributes:
        at: the key of its target sizes; `sizes`: the target sizes.
        shape: the shape that it prunes; `who`: the model that has it.
        by_hand: whether its sizes are set by hand, not searched.
    """

    at: str
    sizes: TargetSizes
    shape: Shape
    who: str
    by_hand: bool


def list_rounds(cfg: RunConfig) -> list[Round]:
    """All rounds of pruning. With a budget, the last one searches among shapes of the teacher."""
    earlier = cfg.prune.rounds
    targets = {**{f"prune.rounds[{number}]": sizes for number, sizes in enumerate(earlier)}, "prune": cfg.prune}
    rounds = []
    for number, (at, sizes) in enumerate(targets.items()):
        by_hand = at != "prune" or cfg.prune.budget is None
        before = number if by_hand else 0
        who = f"model after round {before}" if before else cfg.original_name
        rounds.append(Round(at, sizes, shape_to_prune(cfg, before), who, by_hand))
    return rounds


@rule("prune.budget_or_sizes", *SIZES, "prune.budget?", ORIGINAL)
def budget_or_sizes(cfg: RunConfig) -> Iterator[Finding]:
    prune = cfg.prune
    if prune.budget is None:
        return
    targets = {f"prune.{name}": getattr(prune, name) for name in (*AXES, *EXPERT_AXES, "drop_layers")}
    named = [f"{key}={quote_for_hydra(value)}" for key, value in targets.items() if value]
    if named:
        yield Finding(
            "prune.budget",
            f"the search chooses all sizes, but {', '.join(named)} is set too; set prune.budget=null, or the others to "
            "null",
        )
    if prune.rounds:
        yield Finding(
            "prune.budget",
            f"the search is among shapes of the {cfg.original_name}, not of a model that prune.rounds has pruned; set "
            "the sizes of the last round and prune.budget=null, or set prune.rounds=[]",
        )


@rule("prune.nothing", *ROUNDS)
def nothing(cfg: RunConfig) -> Iterator[Finding]:
    for round_ in list_rounds(cfg):
        targets = {name: getattr(round_.sizes, name) for name in (*AXES, *EXPERT_AXES)}
        unchanged = all(value in (None, getattr(round_.shape, name)) for name, value in targets.items())
        if round_.by_hand and unchanged and not round_.sizes.drop_layers:
            keys = ", ".join(f"{round_.at}.{name}" for name in ("num_layers", "drop_layers", *WIDTHS))
            budget = ", or a limit such as prune.budget.params_fraction=0.67" if round_.at == "prune" else ""
            yield Finding(round_.at, f"the student would be as large as the {round_.who}; set one of {keys}{budget}")


@rule("prune.drop_layers", *ROUNDS)
def drop_layers(cfg: RunConfig) -> Iterator[Finding]:
    for round_ in list_rounds(cfg):
        key, drop, count = f"{round_.at}.drop_layers", round_.sizes.drop_layers, round_.shape.num_layers
        if not drop:
            continue
        if round_.sizes.num_layers is not None and round_.by_hand:
            other = f"{round_.at}.num_layers"
            yield Finding(key, f"{other} is set too; set one of the two to null")
        outside = [layer for layer in drop if not 1 <= layer <= count]
        if outside:
            yield Finding(key, f"the {round_.who} has no layers {outside}; set {key} to numbers from 1 to {count}")
        repeated = sorted({layer for layer in drop if drop.count(layer) > 1})
        if repeated:
            yield Finding(key, f"names {repeated} more than once; set {key}={quote_for_hydra(sorted(set(drop)))}")
        if len(set(drop)) >= count:
            yield Finding(key, f"would drop all {count} layers; drop fewer")


@rule("prune.layer_selection", *SIZES, "prune.layer_selection", "prune.budget?")
def depth(cfg: RunConfig) -> Iterator[Finding]:
    by_hand = [] if cfg.prune.budget is not None else [("prune", cfg.prune.num_layers)]
    rounds = [(f"prune.rounds[{number}]", sizes.num_layers) for number, sizes in enumerate(cfg.prune.rounds)]
    for at, count in (*rounds, *by_hand):
        if cfg.prune.layer_selection is LayerSelection.block and count is None:
            yield Finding(
                f"{at}.num_layers",
                f"prune.layer_selection=block chooses the layers to drop, but not how many; set {at}.num_layers, or "
                "prune.layer_selection=importance",
            )


@rule("prune.sizes", *ROUNDS)
def sizes(cfg: RunConfig) -> Iterator[Finding]:
    for round_ in list_rounds(cfg):
        for name in (*AXES, *EXPERT_AXES):
            key, target, current = f"{round_.at}.{name}", getattr(round_.sizes, name), getattr(round_.shape, name)
            if target is None or current is None:
                continue
            if target > current:
                yield Finding(key, f"larger than the {round_.who}'s {current}; set {key} to at most {current}")
            elif target < current and name.endswith("hidden_size") and target % WIDTH_STEP:
                fix = f"set {key} to {any_of(around(target, WIDTH_STEP))}"
                yield Finding(key, f"not a multiple of {WIDTH_STEP}, the step in which Minitron prunes; {fix}")


@rule("prune.experts", *ROUNDS)
def experts(cfg: RunConfig) -> Iterator[Finding]:
    """Require sizes that a dense model, or a mixture of experts, has."""
    for round_ in list_rounds(cfg):
        sizes, shape, at = round_.sizes, round_.shape, round_.at
        if not shape.num_moe_experts:
            for name in EXPERT_AXES:
                if getattr(sizes, name) is not None:
                    yield Finding(f"{at}.{name}", f"the {cfg.original_name} has no experts; set {at}.{name}=null")
            continue
        if sizes.ffn_hidden_size is not None:
            key = f"{at}.ffn_hidden_size"
            yield Finding(
                key, f"a mixture of experts has no dense FFN; set {key}=null, and {at}.moe_ffn_hidden_size for experts"
            )
        least = shape.moe_router_topk or 0
        if sizes.num_moe_experts is not None and sizes.num_moe_experts < least:
            key = f"{at}.num_moe_experts"
            yield Finding(key, f"less than the {least} experts that process each token; set {key} to at least {least}")


@rule("prune.experts_support", "model.shape.num_moe_experts", "prune.budget?", "prune.tensor_model_parallel_size")
def experts_support(cfg: RunConfig) -> Iterator[Finding]:
    """Refuse what pruning cannot do with a mixture of experts."""
    if not require(cfg.model.shape).num_moe_experts:
        return
    if cfg.prune.budget is not None:
        # The search space has whole mixtures only (modelopt/torch/nas/plugins/megatron.py:812).
        yield Finding(
            "prune.budget",
            "the search supports no mixtures of experts; set prune.budget=null, and sizes such as prune.num_layers",
        )
    if cfg.prune.tensor_model_parallel_size > 1:
        key = "prune.tensor_model_parallel_size"
        yield Finding(key, f"not supported with experts; set {key}=1, and prune.pipeline_model_parallel_size to more")


@rule("prune.heads", *ROUNDS)
def heads(cfg: RunConfig) -> Iterator[Finding]:
    """Minitron prunes groups, and heads within each group (modelopt/torch/prune/plugins/mcore_minitron.py:138-151)."""
    for round_ in list_rounds(cfg):
        if round_.sizes.num_attention_heads is None and round_.sizes.num_query_groups is None:
            continue
        pruned, key = resize(round_.shape, round_.sizes), f"{round_.at}.num_attention_heads"
        count, groups = pruned.num_attention_heads, pruned.num_query_groups
        most = round_.shape.num_attention_heads // round_.shape.num_query_groups
        fix = f"set {key} to {any_of([groups * heads_of_group for heads_of_group in range(1, most + 1)])}"
        if count % groups:
            problem = f"not divisible by {round_.at}.num_query_groups={groups}"
            yield Finding(key, f"{problem}; {fix}", value=count)
        elif count // groups > most:
            problem = f"{count // groups} heads in each of {groups} query groups, but the {round_.who} has {most}"
            yield Finding(key, f"{problem}; {fix}", value=count)


@rule("prune.loadable", *ROUNDS, "model.family")
def loads_in_transformers(cfg: RunConfig) -> Iterator[Finding]:
    """Require widths that the family's class in transformers accepts together (see `loadable`).

    A search considers no others.
    """
    for round_ in list_rounds(cfg):
        pruned, shape = resize(round_.shape, round_.sizes), round_.shape
        if not round_.by_hand or loadable(pruned, cfg.model.family, shape):
            continue
        hidden, count, groups = pruned.hidden_size, pruned.num_attention_heads, pruned.num_query_groups
        multiples = range(1, shape.num_attention_heads // shape.num_query_groups + 1)
        fitting = {
            "hidden_size": [size for size in around(hidden, math.lcm(count, WIDTH_STEP)) if size < shape.hidden_size],
            "num_attention_heads": [groups * each for each in multiples if hidden % (groups * each) == 0],
        }
        key = f"{round_.at}.{'num_attention_heads' if round_.sizes.hidden_size is None else 'hidden_size'}"
        fixes = [f"{round_.at}.{name} to {any_of(values)}" for name, values in fitting.items() if values]
        yield Finding(
            key,
            f"transformers 5 loads no Llama whose hidden size {hidden} is not a multiple of its {count} attention "
            f"heads; set {' or '.join(fixes) or f'{key} to null'}",
        )


@rule("prune.rounds", "prune.rounds", "distill.warmup_steps")
def rounds(cfg: RunConfig) -> Iterator[Finding]:
    earlier = cfg.prune.rounds
    if len(earlier) > MOST_ROUNDS:
        problem = f"{len(earlier)} rounds before the last are too many"
        yield Finding("prune.rounds", f"{problem}; set at most {MOST_ROUNDS} of them")
    for number, sizes in enumerate(earlier):
        key = f"prune.rounds[{number}].steps"
        if sizes.steps <= cfg.distill.warmup_steps:
            yield Finding(
                key, f"ends within the warm-up of distill.warmup_steps={cfg.distill.warmup_steps}; set {key} to more"
            )


@rule("prune.calibration_seq_length", "prune.calibration_seq_length", LENGTH)
def calibration_seq_length(cfg: RunConfig) -> Iterator[Finding]:
    limit = require(cfg.model.shape).max_position_embeddings
    if cfg.prune.calibration_seq_length > limit:
        yield Finding("prune.calibration_seq_length", too_long("prune.calibration_seq_length", limit))


@rule("prune.pipeline", "prune.pipeline_model_parallel_size", "model.shape.num_layers", ORIGINAL)
def pipeline(cfg: RunConfig) -> Iterator[Finding]:
    count, key = require(cfg.model.shape).num_layers, "prune.pipeline_model_parallel_size"
    if cfg.prune.pipeline_model_parallel_size > count:
        yield Finding(key, f"more than the {cfg.original_name}'s {count} layers; set {key} to at most {count}")


@rule("prune.tensor", "prune.tensor_model_parallel_size", *SIZES)
def tensor(cfg: RunConfig) -> Iterator[Finding]:
    """ModelOpt's importance is for one tensor-parallel rank (modelopt/torch/nas/plugins/megatron.py:1363)."""
    prune, key = cfg.prune, "prune.tensor_model_parallel_size"
    only_drops_layers = prune.drop_layers and all(getattr(prune, name) is None for name in WIDTHS)
    if prune.tensor_model_parallel_size > 1 and not only_drops_layers:
        yield Finding(
            key,
            "supported only where prune.drop_layers names the layers and no width is pruned; "
            f"set {key}=1, and prune.pipeline_model_parallel_size to more",
        )


@rule("prune.tensor_divides", "prune.tensor_model_parallel_size", *SHAPE, ORIGINAL)
def tensor_divides(cfg: RunConfig) -> Iterator[Finding]:
    shape, size, key = cfg.model.shape, cfg.prune.tensor_model_parallel_size, "prune.tensor_model_parallel_size"
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    uneven = [f"{name} {getattr(shape, name)}" for name in names if getattr(shape, name) % size]
    if uneven:
        yield Finding(key, f"does not divide the {cfg.original_name}'s {', '.join(uneven)}; set {key}=1")


@rule(
    "prune.ranks",
    *(f"prune.{name}_model_parallel_size" for name in ("pipeline", "tensor")),
    "cluster.devices_per_node",
)
def ranks(cfg: RunConfig) -> Iterator[Finding]:
    devices = cfg.cluster.devices_per_node
    pipeline, tensor = cfg.prune.pipeline_model_parallel_size, cfg.prune.tensor_model_parallel_size
    key, other = "prune.pipeline_model_parallel_size", "prune.tensor_model_parallel_size"
    if pipeline * tensor > devices:
        product = f"times {other}={tensor} is " if tensor > 1 else ""
        yield Finding(
            key,
            f"{product}more than the {devices} devices of a node; set {key} to at most {max(1, devices // tensor)}, or "
            f"cluster.devices_per_node={pipeline * tensor}",
        )
