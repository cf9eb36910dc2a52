"""FLOPs of pruning, and the hours that work takes on a stated GPU. `conf.flops` says how they are counted."""

from __future__ import annotations

from collections.abc import Sequence

from conf.flops import forward_flops
from conf.schema import Family, Gpu, Precision, PruneConfig, Shape


def search_flops(prune: PruneConfig, family: Family, teacher: Shape, candidates: Sequence[Shape]) -> int:
    """FLOP of scoring candidates: each, and the teacher, forward over the held-out sequences."""
    assert prune.budget is not None
    forward = sum(forward_flops(shape, family, prune.calibration_seq_length) for shape in (teacher, *candidates))
    return prune.budget.samples * prune.calibration_seq_length * forward


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
