"""FLOPs of pruning, and the hours that work takes on a stated GPU; `prune_distill.model.flops` counts them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prune_distill.model.flops import forward_flops
from prune_distill.schema import Depth, Family, Gpu, Precision, PruneConfig, Shape


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
        blocks = depth + 1 if prune.depth is Depth.block and cut else 0
        others = 2 * min(cut, depth) if prune.budget.layer_sets > 1 else 0
        tried += (blocks + others) * forward_flops(dataclasses.replace(teacher, num_layers=depth), family, length)
    return length * (prune.budget.samples * scored + prune.block_samples * tried)


def training_hours(flops: float, precision: Precision, gpu: Gpu | None, ranks: int) -> float | None:
    """Hours on `ranks` GPUs; None where the GPU is not stated, or its speed in this precision isn't."""
    if gpu is None or precision is not Precision.bf16:
        return None
    return flops / (ranks * gpu.bf16_tflops * 1e12 * gpu.utilisation * 3600)


def calibration_flops(prune: PruneConfig, family: Family, teacher: Shape) -> int:
    """FLOP of stage importance: the teacher forward over the calibration text."""
    return (
        prune.calibration_samples
        * prune.calibration_seq_length
        * forward_flops(teacher, family, prune.calibration_seq_length)
    )
