"""What students a config's prune section asks for, and what each of them costs. No torch.

A section that names sizes asks for one shape. One with a budget asks for a search: `candidates` are the shapes that it
chooses among, known from the config alone (but for a limit on latency, which has to be measured).
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
# Further ones that pruning has, of mixtures; no search varies them.
EXPERT_AXES = ("num_moe_experts", "moe_ffn_hidden_size")
# What matrix units like; Minitron's own step is 64 (modelopt/torch/prune/plugins/mcore_minitron.py:230).
FINE_STEP = 64
COARSE_STEP = 128
# Sizes from here on are searched in the coarse step.
LARGE = 2048
GB = 1e9
# Rounds of pruning before the last for which there are stages.
MOST_ROUNDS = 4


@dataclass(frozen=True)
class Cost:
    """What a shape costs: parameters, bytes of weights and KV cache, milliseconds (None: not measured)."""

    params: int
    memory: float
    latency: float | None = None


@dataclass(frozen=True)
class Space:
    """Everything that decides which shapes a search may choose; hashable, so that it is worked out once.

    Attributes:
        teacher: the fields of the teacher's `Shape`.
        tensor, pipeline: parallelism of the distillation; divides what it cuts.
        sequences, tokens: the batch and its length that memory is estimated for.
        width: bytes of a stored weight and of a cached key or value.
        limits: params, memory (bytes), latency (ms); infinite where there is none.
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
    """The search space of a config with a budget and a known teacher; shares become absolute limits."""
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
    """The shapes that a search chooses among: within the limits, and none of them inside another one.

    Args:
        latency: milliseconds of a shape; where None, a limit on latency is not looked at.
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
    """Every limit grows with every size, so that of shapes alike but for the FFN only the largest is of interest."""
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
    """Whether a shape is within the limits."""
    cost = space.cost(shape)
    params, memory, milliseconds = space.limits
    return cost.params <= params and cost.memory <= memory and (latency is None or latency(shape) <= milliseconds)


def loadable(shape: Shape, family: Family, teacher: Shape) -> bool:
    """Whether transformers loads a student of this shape wherever it loads the teacher.

    transformers 5 wants Llama's hidden size to be a multiple of its heads, unlike those of other families.
    """
    if not family.traits.heads_divide_hidden or teacher.hidden_size % teacher.num_attention_heads:
        return True
    return shape.hidden_size % shape.num_attention_heads == 0


def widths(space: Space) -> list[tuple[int, int, int]]:
    """Hidden sizes with heads and query groups that transformers loads together."""
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
    """Heads and query groups: whole groups, with as many heads in each (Minitron cuts both so)."""
    heads, groups = space.shape.num_attention_heads, space.shape.num_query_groups
    kept = 1 - space.max_width_pruning - 1e-9
    return [
        (group * each, group)
        for group in range(max(1, math.ceil(groups * kept)), groups + 1)
        for each in range(1, heads // groups + 1)
        if group * each >= heads * kept and group % space.tensor == 0
    ]


def _steps(whole: int, cut: float, divisor: int) -> list[int]:
    """The teacher's size, and multiples of the step below it."""
    step = math.lcm(COARSE_STEP if whole >= LARGE else FINE_STEP, divisor)
    least = max(1, math.ceil(whole * (1 - cut) - 1e-9))
    return [*range(math.ceil(least / step) * step, whole, step), whole]


def smallest(space: Space) -> Shape:
    """The smallest shape, by parameters, within the bounds on cuts, whatever the limits."""
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
    """At most so many, evenly spread over the order in which they were enumerated: by depth, heads, hidden size."""
    if len(shapes) <= most:
        return shapes
    return [shapes[index * len(shapes) // most] for index in range(most)]


def student_shape(cfg: RunConfig) -> Shape:
    """The student's shape: the teacher's with the sizes of the prune section. Needs `model.shape`.

    With a budget, the largest of the candidates by parameters, as which one it will be is not known yet: what is
    estimated from it is the most that the run will need. Where none is known, the teacher's own shape stands for it.
    """
    return max(student_shapes(cfg), key=lambda shape: parameters(shape, cfg.model.family))


def student_shapes(cfg: RunConfig) -> list[Shape]:
    """The shapes of which the student will have one."""
    if cfg.prune.budget is None:
        return [resize(shape_to_prune(cfg), cfg.prune)]
    space = build_space(cfg)
    return candidates(space) or [space.shape]


def shape_to_prune(cfg: RunConfig, rounds: int | None = None) -> Shape:
    """The shape that so many rounds leave (None: all before the last): the teacher's, where there are none."""
    shape = cast(Shape, cfg.model.shape)
    for earlier in cfg.prune.rounds[:rounds]:
        shape = resize(shape, earlier)
    return shape


def round_settings(cfg: RunConfig, number: int) -> dict[str, object]:
    """What makes the config of a run that of its round `number`, from 1: values by dotted key."""
    own = cfg.prune.rounds[number - 1]
    return {
        **{f"prune.{name}": getattr(own, name) for name in (*AXES, *EXPERT_AXES, "drop_layers")},
        "prune.rounds": cfg.prune.rounds[: number - 1],
        "distill.max_steps": own.steps,
        # These speak of the last distillation's own steps, or of stages before it.
        **{f"distill.{name}": [] for name in ("phases", "skip_steps", "controls")},
        "distill.teacher_logits": TeacherLogits.live,
        "distill.swap_teacher_at_step": None,
    }


def needs_importance(prune: PruneConfig) -> bool:
    """Whether anything is pruned but layers that are named, or chosen as a block."""
    by_importance = prune.num_layers is not None and prune.layer_selection is LayerSelection.importance
    widths = any(getattr(prune, axis) is not None for axis in (*AXES[1:], *EXPERT_AXES))
    return by_importance or widths or prune.budget is not None


def runs_teacher(prune: PruneConfig) -> bool:
    """Whether pruning runs the teacher forward at all: only layers that are named are dropped without."""
    return not prune.drop_layers or needs_importance(prune)


def resize(shape: Shape, sizes: TargetSizes) -> Shape:
    """A shape after a round of pruning to these sizes."""
    targets = {axis: size for axis in (*AXES, *EXPERT_AXES) if (size := getattr(sizes, axis)) is not None}
    targets.setdefault("num_layers", shape.num_layers - len(sizes.drop_layers or ()))
    return dataclasses.replace(shape, **targets)
