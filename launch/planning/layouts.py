"""Parallel layouts of the ranks at hand: which divide everything, which fit a GPU's memory, and which comes first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from launch.planning.memory import Models, fullest, training_memory
from prune_distill.config.validate import layout_faults
from prune_distill.schema import Parallel, Recompute, RunConfig, Training

MICRO_BATCHES = (8, 4, 2, 1)


@dataclass(frozen=True)
class Layout:
    """One layout of the distillation, with the memory (bytes) of its fullest rank."""

    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batch_size: int
    recompute: Recompute
    peak: int
    expert: int = 1

    @property
    def rank_order(self) -> tuple[bool, int, int, int, int, int]:
        """Best first: no recomputation; the least model parallelism, that is communication; then TP before CP before
        PP, since tensor parallelism stays within a node and leaves no bubble; then the least expert parallelism, which
        costs an exchange of tokens; then the larger micro batch."""
        model_parallel = self.tensor * self.pipeline * self.context
        recomputes = self.recompute is Recompute.full
        return (recomputes, model_parallel, self.pipeline, self.context, self.expert, -self.micro_batch_size)

    @property
    def overrides(self) -> dict[str, str]:
        """The config values that ask for it."""
        return {
            "distill.parallel.tensor_model_parallel_size": str(self.tensor),
            "distill.parallel.pipeline_model_parallel_size": str(self.pipeline),
            "distill.parallel.context_parallel_size": str(self.context),
            "distill.parallel.expert_model_parallel_size": str(self.expert),
            "distill.micro_batch_size": str(self.micro_batch_size),
            "distill.recompute": self.recompute.value,
        }


def build_layout(training: Training, cfg: RunConfig, models: Models, ranks: int) -> Layout:
    """The layout that a training asks for."""
    parallel = training.parallel
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    replicas = ranks // (sizes[0] * sizes[1] * sizes[2])
    peak = fullest(training_memory(training, cfg.distill.loss, models, ranks)).total
    experts_over = parallel.expert_model_parallel_size
    return Layout(*sizes, replicas, training.micro_batch_size, training.recompute, peak, experts_over)


def fitting(cfg: RunConfig, models: Models, ranks: int, limit: float) -> list[Layout]:
    """The layouts that divide everything and need at most `limit` bytes, best first.

    Of each TP, PP, CP and EP the one with the largest micro batch, without recomputation if any fits so. `selective` is
    no choice of its own: it saves next to nothing where attention scores are not stored.
    """
    found = []
    for parallel in _parallels(cfg, ranks):
        options = (
            build_layout(variant.distill, cfg, models, ranks)
            for recompute in (Recompute.none, Recompute.full)
            for size in MICRO_BATCHES
            if not layout_faults(variant := _variant(cfg, parallel, size, recompute))
        )
        layout = next((layout for layout in options if layout.peak <= limit), None)
        if layout is not None:
            found.append(layout)
    return sorted(found, key=lambda layout: layout.rank_order)


def undivided(cfg: RunConfig, ranks: int) -> list[str]:
    """Why other layouts are none: each value that does not divide, once."""
    reasons: dict[str, None] = {}
    for parallel in _parallels(cfg, ranks):
        for fault in layout_faults(_variant(cfg, parallel, 1, Recompute.none)):
            reasons.setdefault(str(fault).partition(";")[0].replace("distill.parallel.", "").replace("distill.", ""))
    return list(reasons)


def _parallels(cfg: RunConfig, ranks: int) -> Iterator[Parallel]:
    """Every split of the ranks, and of a mixture's experts; tensor-parallel ranks share a node."""
    shape, sequence_parallel = cfg.model.shape, cfg.distill.parallel.sequence_parallel
    experts = (shape.num_moe_experts if shape else None) or 1
    for tensor in _divisors(cfg.cluster.devices_per_node):
        for pipeline in _divisors(ranks // tensor):
            for context in _divisors(ranks // tensor // pipeline):
                for expert in _divisors(math.gcd(experts, ranks // pipeline)):
                    yield Parallel(tensor, pipeline, context, sequence_parallel, expert)


def _variant(cfg: RunConfig, parallel: Parallel, micro_batch_size: int, recompute: Recompute) -> RunConfig:
    distill = dataclasses.replace(
        cfg.distill, parallel=parallel, micro_batch_size=micro_batch_size, recompute=recompute
    )
    return dataclasses.replace(cfg, distill=distill)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
