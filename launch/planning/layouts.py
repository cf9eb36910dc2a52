"""Parallel layouts of the ranks at hand: which divide everything, which fit a GPU's memory, and the fastest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.planning.machine import Machine
from launch.planning.memory import Models, fullest, training_memory
from launch.planning.time import training_seconds
from prune_distill.config.validate import layout_faults
from prune_distill.errors import Fault
from prune_distill.schema import DistillConfig, Loss, Parallel, Recompute, RunConfig, Training

MICRO_BATCHES = (8, 4, 2, 1)
DISTILL, CORRECTION = "distill", "distill.teacher_correction"


@dataclass(frozen=True)
class Layout:
    """One layout of a training.

    Attributes:
        peak: bytes of its fullest rank.
        seconds: of an optimizer step, the mean over all phases; None where the GPU's figures are not stated.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batch_size: int
    recompute: Recompute
    peak: int
    expert: int = 1
    seconds: float | None = None

    @property
    def rank_order(self) -> tuple[float, bool, int, int, int, int, int]:
        """Best first: the fastest; where that is not known, no recomputation, then the least model parallelism, that
        is communication; then TP before CP before PP, since tensor parallelism stays within a node and leaves no
        bubble; then the least expert parallelism, which costs an exchange of tokens; then the larger micro batch."""
        model_parallel = self.tensor * self.pipeline * self.context
        recomputes = self.recompute is Recompute.full
        order = (recomputes, model_parallel, self.pipeline, self.context, self.expert, -self.micro_batch_size)
        return (self.seconds or 0.0, *order)

    @property
    def values(self) -> dict[str, Any]:
        """The settings that ask for it, by their key below the training's."""
        return {
            "parallel.tensor_model_parallel_size": self.tensor,
            "parallel.pipeline_model_parallel_size": self.pipeline,
            "parallel.context_parallel_size": self.context,
            "parallel.expert_model_parallel_size": self.expert,
            "micro_batch_size": self.micro_batch_size,
            "recompute": self.recompute,
        }

    @property
    def overrides(self) -> dict[str, str]:
        """The config values that ask for it, of the distillation."""
        return {
            f"{DISTILL}.{key}": value.value if isinstance(value, Recompute) else str(value)
            for key, value in self.values.items()
        }


@dataclass(frozen=True)
class Task:
    """A training that needs a layout.

    Attributes:
        key: `DISTILL` or `CORRECTION`.
        machine: None where the GPU's figures are not stated.
        fixed: settings that a layout has to have, by their key below the training's.
    """

    cfg: RunConfig
    key: str
    models: Models
    ranks: int
    machine: Machine | None
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> Training:
        training = self.cfg.distill if self.key == DISTILL else self.cfg.distill.teacher_correction
        assert training is not None
        return training

    @property
    def loss(self) -> Loss:
        return self.cfg.distill.loss if self.key == DISTILL else Loss.ce

    def variant(self, parallel: Parallel, micro_batch_size: int, recompute: Recompute) -> Task:
        return self.replace(parallel=parallel, micro_batch_size=micro_batch_size, recompute=recompute)

    def replace(self, **changes: Any) -> Task:
        """The same with other settings of the training."""
        changed = dataclasses.replace(self.training, **changes)
        if self.key == CORRECTION:
            changed = dataclasses.replace(self.cfg.distill, teacher_correction=changed)
        assert isinstance(changed, DistillConfig)
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, distill=changed))

    @property
    def faults(self) -> list[Fault]:
        return layout_faults(self.cfg, self.key)

    def layout(self) -> Layout:
        """The layout that the training asks for."""
        training, parallel = self.training, self.training.parallel
        sizes = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        replicas = self.ranks // (sizes[0] * sizes[1] * sizes[2])
        peak = fullest(training_memory(training, self.loss, self.models, self.ranks)).total
        seconds = None
        if self.machine is not None:
            total = training_seconds(training, self.loss, self.models, self.machine, self.ranks)
            seconds = total / training.max_steps
        expert = parallel.expert_model_parallel_size
        return Layout(*sizes, replicas, training.micro_batch_size, training.recompute, peak, expert, seconds)


def fitting(task: Task, limit: float) -> list[Layout]:
    """The layouts that divide everything and need at most `limit` bytes, best first.

    Of each TP, PP, CP and EP the best micro batch with or without recomputation. `selective` is no choice of its own:
    it saves next to nothing where attention scores are not stored.
    """
    fit = ([layout for layout in group if layout.peak <= limit] for group in _dividing(task))
    found = [min(layouts, key=lambda layout: layout.rank_order) for layouts in fit if layouts]
    return sorted(found, key=lambda layout: layout.rank_order)


def smallest_layout(task: Task) -> Layout | None:
    """Of the layouts that divide everything, the one that needs the least memory."""
    return min((layout for group in _dividing(task) for layout in group), key=lambda layout: layout.peak, default=None)


def _dividing(task: Task) -> Iterator[list[Layout]]:
    """The layouts that divide everything, for each TP, PP, CP and EP."""
    sizes = [task.fixed["micro_batch_size"]] if "micro_batch_size" in task.fixed else MICRO_BATCHES
    recomputes = [task.fixed["recompute"]] if "recompute" in task.fixed else (Recompute.none, Recompute.full)
    for parallel in _parallels(task):
        variants = (task.variant(parallel, size, recompute) for recompute in recomputes for size in sizes)
        yield [variant.layout() for variant in variants if not variant.faults]


def undivided(task: Task) -> list[str]:
    """Why other layouts are not possible: each value that does not divide, once."""
    reasons: dict[str, None] = {}
    for parallel in _parallels(task):
        for fault in task.variant(parallel, 1, Recompute.none).faults:
            reasons.setdefault(str(fault).partition(";")[0].replace("distill.parallel.", "").replace("distill.", ""))
    return list(reasons)


def _parallels(task: Task) -> Iterator[Parallel]:
    """Every split of the ranks, and of a mixture's experts; tensor-parallel ranks share a node."""
    cfg = task.cfg
    sequence_parallel = task.training.parallel.sequence_parallel
    fixed = {key.partition(".")[2]: value for key, value in task.fixed.items() if key.startswith("parallel.")}
    shapes = (cfg.teacher_shape, cfg.model.shape)
    experts = next((shape.num_moe_experts for shape in shapes if shape and shape.num_moe_experts), 1)
    for tensor in _divisors(cfg.cluster.devices_per_node):
        for pipeline in _divisors(task.ranks // tensor):
            for context in _divisors(task.ranks // tensor // pipeline):
                for expert in _divisors(math.gcd(experts, task.ranks // pipeline)):
                    parallel = Parallel(tensor, pipeline, context, sequence_parallel, expert)
                    if all(getattr(parallel, name) == value for name, value in fixed.items()):
                        yield parallel


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
