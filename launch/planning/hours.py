"""The hours of a run's stages: FLOPs from shapes and tokens, on a GPU that reaches a stated share of its peak."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from prune_distill.config.values import halving_rounds, halving_steps
from prune_distill.model.flops import forward_flops, training_flops
from prune_distill.model.student import shape_to_prune, student_shape, student_shapes
from prune_distill.pipeline.stages import Stage, select_stages
from prune_distill.schema import Family, Gpu, LayerSelection, Loss, Precision, PruneConfig, RunConfig, Shape
from prune_distill.schema.phases import training_tokens
from prune_distill.units import parse_time_limit

# Modules of stages whose pipeline stages wait for one another: they are no faster than one rank.
SEQUENTIAL = ("recipes.importance", "recipes.search")


@dataclass(frozen=True)
class StageHours:
    """The time of one stage.

    Attributes:
        ranks: GPUs that it occupies.
        hours, gpu_hours: None where they cannot be estimated.
        jobs: how many jobs the cluster's time limit cuts it into, at least; None without a limit.
    """

    stage: str
    ranks: int
    hours: float | None
    gpu_hours: float | None
    jobs: int | None


def estimate_hours(cfg: RunConfig, teacher: Shape) -> list[StageHours]:
    """Every stage of a run, with hours where they can be estimated."""
    correction, limit = cfg.distill.teacher_correction, cfg.cluster.time_limit
    estimates = []
    for stage in select_stages(cfg):
        ranks, flops = stage.ranks(cfg), stage_flops(stage, cfg, teacher)
        precision = correction.precision if correction and stage.name == "correct_teacher" else cfg.distill.precision
        working = 1 if stage.module in SEQUENTIAL else ranks
        hours = training_hours(flops, precision, cfg.cluster.gpu, working) if flops else None
        gpu_hours = None if hours is None else hours * ranks
        jobs = math.ceil(hours * 3600 / parse_time_limit(limit)) if hours is not None and limit else None
        estimates.append(StageHours(stage.name, ranks, hours, gpu_hours, jobs))
    return estimates


def stage_flops(stage: Stage, cfg: RunConfig, teacher: Shape) -> float | None:
    """FLOP of a stage that trains, calibrates or scores; None for any other stage."""
    own, family = stage.configure(cfg), cfg.model.family
    if stage.module == "recipes.search":
        return search_flops(cfg.prune, family, teacher, student_shapes(cfg))
    if stage.module == "recipes.importance":
        return calibration_flops(own.prune, family, shape_to_prune(own))
    if stage.module == "recipes.cache_logits":
        return training_tokens(cfg.distill) * forward_flops(teacher, family, cfg.distill.seq_length)
    if stage.module == "recipes.correct_teacher" and cfg.distill.teacher_correction is not None:
        correction = cfg.distill.teacher_correction
        return training_tokens(correction) * training_flops(correction, Loss.ce, family, teacher, None).total
    if stage.module in ("recipes.successive_halving", "recipes.distill"):
        run = own.distill
        if stage.module == "recipes.successive_halving":
            share, with_teacher = halving_steps(cfg) / run.max_steps, run.loss is Loss.kd
        else:
            # A distillation that starts from successive halving's winner has the steps of its rounds behind it.
            done = halving_rounds(cfg)[-1][1] if "winner" in stage.inputs(own) else 0
            share, with_teacher = 1 - done / run.max_steps, run.runs_teacher
        live_teacher = teacher if with_teacher else None
        per_token = training_flops(run, run.loss, family, student_shape(own), live_teacher).total
        return training_tokens(run) * share * per_token
    return None


def search_flops(prune: PruneConfig, family: Family, teacher: Shape, candidates: Sequence[Shape]) -> int:
    """FLOPs of a search: an upper bound on choosing layers and scoring candidates.

    Forward passes over calibration text: for each depth, the teacher without each block, and without each set that
    `layer_sets.list_shifted` returns. Forward passes over the held-out sequences: the teacher, and every candidate
    without each set of layers that is kept.
    """
    assert prune.budget is not None
    length = prune.calibration_seq_length
    scored, tried = forward_flops(teacher, family, length), 0
    for shape in candidates:
        sets = prune.budget.layer_sets if shape.num_layers < teacher.num_layers else 1
        scored += sets * forward_flops(shape, family, length)
    for depth in {shape.num_layers for shape in candidates}:
        cut = teacher.num_layers - depth
        blocks = depth + 1 if prune.layer_selection is LayerSelection.block and cut else 0
        others = 2 * min(cut, depth) if prune.budget.layer_sets > 1 else 0
        tried += (blocks + others) * forward_flops(dataclasses.replace(teacher, num_layers=depth), family, length)
    return length * (prune.budget.samples * scored + prune.block_samples * tried)


def training_hours(flops: float, precision: Precision, gpu: Gpu | None, ranks: int) -> float | None:
    """Hours on `ranks` GPUs; None where the GPU is not stated, or its speed in this precision isn't."""
    if gpu is None or precision is not Precision.bf16:
        return None
    return flops / (ranks * gpu.bf16_tflops * 1e12 * gpu.mfu * 3600)


def calibration_flops(prune: PruneConfig, family: Family, teacher: Shape) -> int:
    """FLOP of stage importance: the teacher forward over the calibration text."""
    return (
        prune.calibration_samples
        * prune.calibration_seq_length
        * forward_flops(teacher, family, prune.calibration_seq_length)
    )
