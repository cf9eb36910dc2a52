"""FLOPs of pruning, and the hours that work takes on a stated GPU. `conf.flops` says how they are counted."""

from __future__ import annotations

from conf.flops import forward_flops
from conf.schema import Family, Gpu, Precision, PruneConfig, Shape


def training_hours(flops: float, precision: Precision, gpu: Gpu | None, ranks: int) -> float | None:
    """Hours on `ranks` GPUs; None where the GPU is not stated, or its speed in this precision isn't."""
    if gpu is None or precision is not Precision.bf16:
        return None
    return flops / (ranks * gpu.bf16_tflops * 1e12 * gpu.utilisation * 3600)


def calibration_flops(prune: PruneConfig, family: Family, teacher: Shape) -> int:
    """FLOP of pruning: the teacher forward over the calibration text; none where the layers to drop are named."""
    if prune.drop_layers:
        return 0
    return (
        prune.calibration_samples
        * prune.calibration_seq_length
        * forward_flops(teacher, family, prune.calibration_seq_length)
    )
