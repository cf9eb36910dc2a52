"""What a run takes at other lengths, and what cached logits, FP8 or a smaller student would save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.planning.hours import estimate_hours
from launch.planning.memory import distilled_models, fullest, training_memory
from prune_distill.config.validate import validate
from prune_distill.config.values import count_ranks, replace_values
from prune_distill.model.student import student_shape
from prune_distill.schema import Fp8, RunConfig, TeacherLogits
from prune_distill.schema.phases import training_phases, training_tokens
from prune_distill.units import GIB

TOKENS = (10e9, 30e9, 90e9)
# A length that differs from the run's own by less is left out.
SAME_LENGTH = 0.01
# Of the student's layers, for the smaller student.
FEWER_LAYERS = 0.75


@dataclass(frozen=True)
class Cell:
    """A variant of a run at one length.

    Attributes:
        hours, gpu_hours: of all stages that are estimated, one after another.
        cost: None without `cluster.gpu.cost_per_hour`.
    """

    tokens: float
    hours: float
    gpu_hours: float
    cost: float | None


@dataclass(frozen=True)
class Variant:
    """A variant of a run.

    Attributes:
        changes: the settings that ask for it; empty for the run as it is.
        why_not: why it is not estimated; None where it is.
        fits: whether it fits the GPU in the present layout; None where no GPU is stated.
    """

    name: str
    changes: dict[str, str]
    cells: list[Cell]
    why_not: str | None = None
    fits: bool | None = None


def what_if(cfg: RunConfig) -> list[Variant]:
    """The run as it is and each variant, at its own length and at `TOKENS`."""
    own = float(training_tokens(cfg.distill))
    lengths = sorted([own, *(tokens for tokens in TOKENS if abs(tokens / own - 1) > SAME_LENGTH)])
    gpu = cfg.cluster.gpu
    layers = math.ceil(student_shape(cfg).num_layers * FEWER_LAYERS)
    variants = [_variant("as configured", {}, cfg, lengths)]
    # A search chooses its sizes itself, and rounds have sizes of their own.
    if cfg.prune.budget is None and not cfg.prune.rounds and layers < student_shape(cfg).num_layers:
        smaller = dataclasses.replace(cfg, prune=dataclasses.replace(cfg.prune, num_layers=layers, drop_layers=None))
        variants.append(_variant(f"{layers} layers", {"prune.num_layers": str(layers)}, smaller, lengths))
    if cfg.distill.runs_teacher:
        cached = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, teacher_logits=TeacherLogits.cached))
        variants.append(_variant("cached logits", {"distill.teacher_logits": "cached"}, cached, lengths))
        if gpu is None or gpu.fp8_tflops is not None:
            variants += _fp8_variants(cfg, lengths)
    return variants


def _fp8_variants(cfg: RunConfig, lengths: Sequence[float]) -> list[Variant]:
    """FP8 for the teacher, and for both models, unless the run has it already."""
    variants = []
    if not cfg.distill.teacher_fp8:
        teacher = replace_values(cfg, {"distill.teacher_fp8": True})
        variants.append(_variant("FP8 teacher", {"distill.teacher_fp8": "true"}, teacher, lengths))
    if cfg.distill.fp8 is None:
        both = replace_values(cfg, {"distill.fp8": Fp8.hybrid, "distill.teacher_fp8": True})
        settings = {"distill.fp8": "hybrid", "distill.teacher_fp8": "true"}
        variants.append(_variant("FP8 teacher, student", settings, both, lengths))
    return variants


def _variant(name: str, changes: dict[str, str], cfg: RunConfig, lengths: Sequence[float]) -> Variant:
    faults = validate(cfg)
    if faults:
        return Variant(name, changes, [], faults[0].message)
    cells = [_cell(with_tokens(cfg, tokens), tokens) for tokens in lengths]
    if not all(cell.hours for cell in cells):
        return Variant(name, changes, [], "hours are not estimated for this GPU")
    return Variant(name, changes, cells, fits=_fits(cfg))


def _fits(cfg: RunConfig) -> bool | None:
    """Whether the distillation fits the GPU."""
    if cfg.cluster.gpu is None:
        return None
    memory = training_memory(cfg.distill, cfg.distill.loss, distilled_models(cfg), count_ranks(cfg))
    return fullest(memory).total <= cfg.cluster.gpu.memory_gib * GIB


def _cell(cfg: RunConfig, tokens: float) -> Cell:
    stages = estimate_hours(cfg)
    hours = sum(stage.hours or 0.0 for stage in stages)
    costs = [stage.cost for stage in stages if stage.cost is not None]
    return Cell(tokens, hours, sum(stage.gpu_hours or 0.0 for stage in stages), sum(costs) if costs else None)


def with_tokens(cfg: RunConfig, tokens: float) -> RunConfig:
    """The run with a distillation of so many tokens, in whole steps; its phases keep their shares."""
    ratio = tokens / training_tokens(cfg.distill)
    phases = cfg.distill.phases
    if phases:
        lengths = [max(1, round(phase.steps * ratio)) for phase in training_phases(cfg.distill)]
        phases = [
            dataclasses.replace(phase, max_steps=steps, tokens=None)
            for phase, steps in zip(phases, lengths, strict=True)
        ]
        steps = sum(lengths)
    else:
        steps = max(1, math.ceil(cfg.distill.max_steps * ratio))
    return dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, max_steps=steps, phases=phases))


def to_json(variants: Sequence[Variant]) -> list[dict[str, object]]:
    return [dataclasses.asdict(variant) for variant in variants]


def to_rows(variants: Sequence[Variant]) -> list[list[str]]:
    """A table: for each variant the GPU-hours at each length, and the cost where the GPU's price is stated."""
    estimated = [variant for variant in variants if variant.cells]
    if not estimated:
        return []
    lengths = [f"{_count(cell.tokens)} tokens" for cell in estimated[0].cells]
    rows = [["GPU-hours", *lengths]]
    rows += [[variant.name, *(_number(cell.gpu_hours) for cell in variant.cells)] for variant in estimated]
    if estimated[0].cells[0].cost is not None:
        rows.append(["cost", *lengths])
        rows += [[variant.name, *(_number(cell.cost or 0.0) for cell in variant.cells)] for variant in estimated]
    return rows


def to_notes(variants: Sequence[Variant]) -> list[str]:
    """Sentences on the variants, below the table."""
    estimated = [variant for variant in variants if variant.cells]
    notes = ["cached logits pay where further students or epochs read them"] if len(estimated) > 1 else []
    for variant in variants:
        if variant.why_not:
            notes.append(f"{variant.name}: not estimated ({variant.why_not})")
        elif variant.fits is False and variant.changes:
            settings = " ".join(f"{key}={value}" for key, value in variant.changes.items())
            notes.append(f"{variant.name}: does not fit in this layout; plan with {settings} for one that does")
    return notes


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _count(tokens: float) -> str:
    """`10 B`, or in smaller units for a small run."""
    unit, letter = next((item for item in ((1e9, "B"), (1e6, "M")) if tokens >= item[0]), (1e3, "k"))
    return f"{tokens / unit:,.3g} {letter}"
