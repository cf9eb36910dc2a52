"""The hours of a run's stages, from `launch.planning.time` or at a stated share of the GPU's peak."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.planning.machine import Machine, describe_machine
from launch.planning.memory import Models, caching_settings
from launch.planning.time import forward_seconds, training_seconds
from prune_distill.config.values import cached_share, halving_rounds, halving_steps, require
from prune_distill.model.flops import forward_flops, training_flops
from prune_distill.model.student import shape_to_prune, student_shape, student_shapes
from prune_distill.pipeline.stages import Stage, select_stages
from prune_distill.schema import (
    Family,
    Gpu,
    LayerSelection,
    Loss,
    Parallel,
    Precision,
    PruneConfig,
    RunConfig,
    Shape,
    Training,
)
from prune_distill.schema.phases import training_tokens
from prune_distill.units import parse_time_limit


@dataclass(frozen=True)
class StageHours:
    """The time of one stage.

    Attributes:
        ranks: GPUs that it occupies.
        hours, gpu_hours: None where they cannot be estimated.
        jobs: how many jobs the cluster's time limit cuts it into, at least; None without a limit.
        cost: None without `cluster.gpu.cost_per_hour`.
    """

    stage: str
    ranks: int
    hours: float | None
    gpu_hours: float | None
    jobs: int | None
    cost: float | None = None


@dataclass(frozen=True)
class TrainingWork:
    """A part of a training.

    Attributes:
        share: of the training's steps, summed over the models that are trained.
    """

    training: Training
    loss: Loss
    models: Models
    share: float = 1.0

    @property
    def flops(self) -> float:
        models = self.models
        shapes = models.student, models.teacher, models.teacher_family
        flops = training_flops(self.training, self.loss, models.family, *shapes)
        return training_tokens(self.training) * self.share * flops.total

    def seconds(self, machine: Machine, ranks: int) -> float:
        return self.share * training_seconds(self.training, self.loss, self.models, machine, ranks)


@dataclass(frozen=True)
class ForwardWork:
    """Forward passes.

    Attributes:
        flops: of all of them.
        layout: the parallel layout, micro batch and sequence length.
        sequential: whether pipeline stages wait for one another, and no ranks share the batches.
    """

    shape: Shape
    family: Family
    flops: float
    layout: Training
    sequential: bool

    def seconds(self, machine: Machine, ranks: int) -> float:
        layout, parallel = self.layout, self.layout.parallel
        stages = forward_seconds(self.shape, self.family, layout, machine)
        tokens = layout.micro_batch_size * layout.seq_length
        micro_batches = self.flops / (tokens * forward_flops(self.shape, self.family, layout.seq_length))
        if self.sequential:
            return micro_batches * sum(stages)
        sizes = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        return micro_batches / (ranks // sizes) * max(stages)


Work = TrainingWork | ForwardWork


def estimate_hours(cfg: RunConfig) -> list[StageHours]:
    """Every stage of a run, with hours where they can be estimated."""
    correction, limit, gpu = cfg.distill.teacher_correction, cfg.cluster.time_limit, cfg.cluster.gpu
    price = gpu.cost_per_hour if gpu else None
    estimates = []
    for stage in select_stages(cfg):
        ranks, work = stage.ranks(cfg), stage_work(stage, cfg)
        precision = correction.precision if correction and stage.name == "correct_teacher" else cfg.distill.precision
        seconds = work_seconds(work, cfg, ranks) if work and precision is Precision.bf16 else None
        hours = None if seconds is None else seconds / 3600
        gpu_hours = None if hours is None else hours * ranks
        jobs = math.ceil(hours * 3600 / parse_time_limit(limit)) if hours is not None and limit else None
        cost = None if gpu_hours is None or price is None else gpu_hours * price
        estimates.append(StageHours(stage.name, ranks, hours, gpu_hours, jobs, cost))
    return estimates


def work_seconds(work: Work, cfg: RunConfig, ranks: int) -> float | None:
    """Seconds of a stage's work on its ranks; None where the GPU's figures are not stated."""
    gpu = cfg.cluster.gpu
    if gpu is not None and gpu.mfu is not None:
        working = 1 if isinstance(work, ForwardWork) and work.sequential else ranks
        return seconds_at(gpu.mfu, work.flops, gpu, working)
    machine = describe_machine(cfg.cluster)
    return None if machine is None else work.seconds(machine, ranks)


def seconds_at(mfu: float, flops: float, gpu: Gpu, ranks: int) -> float:
    """Seconds on `ranks` GPUs that reach the share `mfu` of their peak."""
    return flops / (ranks * gpu.bf16_tflops * 1e12 * mfu)


def stage_work(stage: Stage, cfg: RunConfig) -> Work | None:
    """What a stage that trains, calibrates or scores computes; None for any other stage."""
    own, family, original = stage.configure(cfg), cfg.model.family, require(cfg.model.shape)
    teacher, teacher_family = require(cfg.teacher_shape), cfg.teacher_family
    if stage.module == "recipes.search":
        flops = search_flops(cfg.prune, family, original, student_shapes(cfg))
        return ForwardWork(original, family, flops, _calibration(cfg.prune), sequential=True)
    if stage.module == "recipes.importance":
        shape = shape_to_prune(own)
        flops = calibration_flops(own.prune, family, shape)
        return ForwardWork(shape, family, flops, _calibration(own.prune), sequential=True)
    if stage.module == "recipes.cache_logits":
        teacher, teacher_family = require(own.teacher_shape), own.teacher_family
        # All sequences, an upper limit, where the share is not known; the plan warns of that.
        share = cached_share(own) or 1.0
        flops = round(
            share * training_tokens(own.distill) * forward_flops(teacher, teacher_family, own.distill.seq_length)
        )
        settings = caching_settings(own.teacher, own.distill)
        return ForwardWork(teacher, teacher_family, flops, settings, sequential=False)
    if stage.module == "recipes.correct_teacher" and cfg.distill.teacher_correction is not None:
        return TrainingWork(cfg.distill.teacher_correction, Loss.ce, Models(teacher_family, teacher, None))
    if stage.module in ("recipes.successive_halving", "recipes.distill"):
        run = own.distill
        if stage.module == "recipes.successive_halving":
            share, with_teacher = halving_steps(cfg) / run.max_steps, run.loss is Loss.kd
        else:
            # A distillation that starts from successive halving's winner has the steps of its rounds behind it.
            done = halving_rounds(cfg)[-1][1] if "winner" in stage.inputs(own) else 0
            share, with_teacher = 1 - done / run.max_steps, run.runs_teacher
        models = Models(family, student_shape(own), teacher if with_teacher else None, teacher_family)
        return TrainingWork(run, run.loss, models, share)
    return None


def _calibration(prune: PruneConfig) -> Training:
    """The layout of stages that run the teacher over calibration text."""
    parallel = Parallel(prune.tensor_model_parallel_size, prune.pipeline_model_parallel_size)
    return Training(seq_length=prune.calibration_seq_length, micro_batch_size=prune.micro_batch_size, parallel=parallel)


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


def calibration_flops(prune: PruneConfig, family: Family, teacher: Shape) -> int:
    """FLOP of stage importance: the teacher forward over the calibration text."""
    return (
        prune.calibration_samples
        * prune.calibration_seq_length
        * forward_flops(teacher, family, prune.calibration_seq_length)
    )
