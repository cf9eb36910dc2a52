"""The shapes of students that a config's prune section allows, and their costs. No torch.

A section with sizes determines one shape. A section with a budget starts a search among `candidates`, which are
known from the config alone (except for a limit on latency, which must be measured).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

from prune_distill.model.model_size import parameters
from prune_distill.schema import (
    ExportDtype,
    Family,
    LayerSelection,
    PruneConfig,
    RunConfig,
    Shape,
    TargetSizes,
    TeacherLogits,
)

AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
# More axes of pruning, for MoE models; no search varies them.
EXPERT_AXES = ("num_moe_experts", "moe_ffn_hidden_size")
# Efficient for matrix units; Minitron's step is 64 (modelopt/torch/prune/plugins/mcore_minitron.py:230).
FINE_STEP = 64
COARSE_STEP = 128
# Sizes from this one on are searched in the coarse step.
LARGE = 2048
GB = 1e9
# Maximum number of rounds of pruning before the last one.
MOST_ROUNDS = 4


@dataclass(frozen=True)
class Cost:
    """Cost of a shape: parameters, bytes of weights and KV cache, milliseconds (None: not measured)."""

    params: int
    memory: float
    latency: float | None = None


@dataclass(frozen=True)
class Space:
    """Everything that determines the shapes of a search; hashable, so that results are cached.

    Attributes:
        teacher: the fields of the teacher's `Shape`.
        tensor, pipeline: parallelism of the distillation, which must divide sizes and layers.
        sequences, tokens: batch size and length for the memory estimate.
        width: bytes per weight and per cached key or value.
        limits: params, memory (bytes), latency (ms); infinite without a limit.
    """

    family: Family
    teacher: tuple[int | bool | None, ...]
    tensor: int
    pipeline: int
    max_depth_pruning: float
    max_width_pruning: float
    sequences: int
    tokens: int
    width: int
    limits: tuple[float, float, float]
    most: int

    @property
    def shape(self) -> Shape:
        return Shape(*self.teacher)  # type: ignore[arg-type]

    def cost(self, shape: Shape) -> Cost:
        params = parameters(shape, self.family)
        cached = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * self.sequences * self.tokens
        return Cost(params, self.width * (params + cached))


Latency = Callable[[Shape], float]


def build_space(cfg: RunConfig) -> Space:
    """Return the search space of a config with a budget and a known teacher, with absolute limits."""
    budget, parallel = cfg.prune.budget, cfg.distill.parallel
    assert budget is not None
    teacher = cast(Shape, cfg.model.shape)
    space = Space(
        cfg.model.family,
        tuple(getattr(teacher, field.name) for field in dataclasses.fields(Shape)),
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        budget.max_depth_pruning,
        budget.max_width_pruning,
        budget.batch_size,
        budget.seq_length or cfg.prune.calibration_seq_length,
        4 if cfg.convert.export_dtype is ExportDtype.fp32 else 2,
        (math.inf, math.inf, math.inf),
        budget.max_candidates,
    )
    whole = space.cost(space.shape)
    params = _least(budget.params, budget.params_fraction, whole.params)
    memory = _least(budget.memory_gb and budget.memory_gb * GB, budget.memory_fraction, whole.memory)
    return dataclasses.replace(space, limits=(params, memory, budget.latency_ms or math.inf))


def _least(absolute: float | None, share: float | None, whole: float) -> float:
    return min(absolute or math.inf, whole * share if share else math.inf)


def candidates(space: Space, latency: Latency | None = None) -> list[Shape]:
    """Return the candidates of a search: shapes within the limits, none of which is smaller than another on all axes.

    Args:
        latency: returns milliseconds of a shape; None: ignore a limit on latency.
    """
    found = list(_within_limits(space, latency)) if latency else list(_known(space))
    return _thinned(found, space.most)


@cache
def _known(space: Space) -> tuple[Shape, ...]:
    return tuple(_within_limits(space, None))


def _within_limits(space: Space, latency: Latency | None) -> list[Shape]:
    found = [
        shape
        for layers, (hidden, heads, groups) in itertools.product(depths(space), widths(space))
        if (shape := _largest_ffn(space, layers, hidden, heads, groups, latency)) is not None
    ]
    sizes = [tuple(getattr(shape, axis) for axis in AXES) for shape in found]
    return [
        shape
        for shape, own in zip(found, sizes, strict=True)
        if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in sizes)
    ]


def _largest_ffn(
    space: Space, layers: int, hidden: int, heads: int, groups: int, latency: Latency | None
) -> Shape | None:
    """Return the shape with the largest FFN within the limits; costs grow with every size, so others are not needed."""
    for ffn in reversed(ffns(space)):
        shape = dataclasses.replace(
            space.shape,
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
        )
        if shape != space.shape and fits(space, shape, latency):
            return shape
    return None


def fits(space: Space, shape: Shape, latency: Latency | None = None) -> bool:
    """Return whether a shape is within the limits."""
    cost = space.cost(shape)
    params, memory, milliseconds = space.limits
    return cost.params <= params and cost.memory <= memory and (latency is None or latency(shape) <= milliseconds)


def loadable(shape: Shape, family: Family, teacher: Shape) -> bool:
    """Return whether transformers loads a student of this shape if it loads the teacher.

    transformers 5 requires Llama's hidden size to be a multiple of its heads, unlike for other families.
    """
    if not family.traits.heads_divide_hidden or teacher.hidden_size % teacher.num_attention_heads:
        return True
    return shape.hidden_size % shape.num_attention_heads == 0


def widths(space: Space) -> list[tuple[int, int, int]]:
    """Return combinations of hidden size, heads and query groups that transformers loads."""
    return [
        (hidden, heads, groups)
        for (heads, groups), hidden in itertools.product(attentions(space), hiddens(space))
        if loadable(
            dataclasses.replace(space.shape, hidden_size=hidden, num_attention_heads=heads, num_query_groups=groups),
            space.family,
            space.shape,
        )
    ]


def depths(space: Space) -> list[int]:
    most = space.shape.num_layers
    least = max(1, math.ceil(most * (1 - space.max_depth_pruning) - 1e-9))
    return [layers for layers in range(least, most + 1) if layers % space.pipeline == 0]


def hiddens(space: Space) -> list[int]:
    return _steps(space.shape.hidden_size, space.max_width_pruning, 1)


def ffns(space: Space) -> list[int]:
    return _steps(space.shape.ffn_hidden_size, space.max_width_pruning, space.tensor)


def attentions(space: Space) -> list[tuple[int, int]]:
    """Return combinations of heads and query groups with equal heads per group, as in Minitron."""
    heads, groups = space.shape.num_attention_heads, space.shape.num_query_groups
    kept = 1 - space.max_width_pruning - 1e-9
    return [
        (group * each, group)
        for group in range(max(1, math.ceil(groups * kept)), groups + 1)
        for each in range(1, heads // groups + 1)
        if group * each >= heads * kept and group % space.tensor == 0
    ]


def _steps(whole: int, cut: float, divisor: int) -> list[int]:
    """Return the teacher's size, and multiples of the step below it."""
    step = math.lcm(COARSE_STEP if whole >= LARGE else FINE_STEP, divisor)
    least = max(1, math.ceil(whole * (1 - cut) - 1e-9))
    return [*range(math.ceil(least / step) * step, whole, step), whole]


def smallest(space: Space) -> Shape:
    """Return the smallest shape, by parameters, within the bounds on pruning, without limits."""
    least = [
        dataclasses.replace(
            space.shape,
            num_layers=min(depths(space)),
            hidden_size=hidden,
            ffn_hidden_size=min(ffns(space)),
            num_attention_heads=heads,
            num_query_groups=groups,
        )
        for hidden, heads, groups in widths(space)
    ]
    return min(least, key=lambda shape: parameters(shape, space.family))


def _thinned(shapes: list[Shape], most: int) -> list[Shape]:
    """Select at most `most` shapes, evenly spaced in the order of enumeration: depth, heads, hidden size."""
    if len(shapes) <= most:
        return shapes
    return [shapes[index * len(shapes) // most] for index in range(most)]


def student_shape(cfg: RunConfig) -> Shape:
    """Return the student's shape: the teacher's with the sizes of the prune section. Needs `model.shape`.

    With a budget, return the largest candidate by parameters, because the student is not known yet: estimates from it
    are upper bounds. Without candidates, return the teacher's shape.
    """
    return max(student_shapes(cfg), key=lambda shape: parameters(shape, cfg.model.family))


def student_shapes(cfg: RunConfig) -> list[Shape]:
    """Return the possible shapes of the student."""
    if cfg.prune.budget is None:
        return [resize(shape_to_prune(cfg), cfg.prune)]
    space = build_space(cfg)
    return candidates(space) or [space.shape]


def shape_to_prune(cfg: RunConfig, rounds: int | None = None) -> Shape:
    """Return the shape after a number of rounds (None: all before the last); without rounds, the teacher's."""
    shape = cast(Shape, cfg.model.shape)
    for earlier in cfg.prune.rounds[:rounds]:
        shape = resize(shape, earlier)
    return shape


def round_settings(cfg: RunConfig, number: int) -> dict[str, object]:
    """Return the settings of round `number`, from 1, by dotted key."""
    own = cfg.prune.rounds[number - 1]
    return {
        **{f"prune.{name}": getattr(own, name) for name in (*AXES, *EXPERT_AXES, "drop_layers")},
        "prune.rounds": cfg.prune.rounds[: number - 1],
        "distill.max_steps": own.steps,
        # The weights of the last distillation are those that are quantized.
        "distill.quantize": None,
        # These refer to steps of the last distillation, or to stages before it.
        **{f"distill.{name}": [] for name in ("phases", "skip_steps", "controls")},
        "distill.teacher_logits": TeacherLogits.live,
        "distill.swap_teacher_at_step": None,
    }


def needs_importance(prune: PruneConfig) -> bool:
    """Return whether anything is pruned except layers that are named or chosen as a block."""
    by_importance = prune.num_layers is not None and prune.layer_selection is LayerSelection.importance
    widths = any(getattr(prune, axis) is not None for axis in (*AXES[1:], *EXPERT_AXES))
    return by_importance or widths or prune.budget is not None


def runs_teacher(prune: PruneConfig) -> bool:
    """Return whether pruning runs the teacher, which only dropping named layers does not."""
    return not prune.drop_layers or needs_importance(prune)


def resize(shape: Shape, sizes: TargetSizes) -> Shape:
    """Return a shape after a round of pruning to these sizes."""
    targets = {axis: size for axis in (*AXES, *EXPERT_AXES) if (size := getattr(sizes, axis)) is not None}
    targets.setdefault("num_layers", shape.num_layers - len(sizes.drop_layers or ()))
    return dataclasses.replace(shape, **targets)
