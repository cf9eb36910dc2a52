"""A distillation step with products in FP8: of the teacher alone, and of both models."""

from __future__ import annotations

from dataclasses import fields

from prune_distill.nemo import devices
from prune_distill.schema import DistillConfig
from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.figures import Figures
from tests.benchmarks.gpu.step import measure_run, prepare

SETTINGS = {
    "off": "",
    "teacher": "distill.teacher_fp8=true",
    "hybrid": "distill.fp8=hybrid",
    "blockwise": "distill.fp8=blockwise",
}
MICRO_BATCH = 2


def measure(figures: Figures) -> None:
    known = {field.name for field in fields(DistillConfig)}
    settings = {name: own for name, own in SETTINGS.items() if own.partition("=")[0].removeprefix("distill.") in known}
    if not settings:
        figures.missing("fp8", "", "not available: distill.fp8 and distill.teacher_fp8 are no keys of this version")
        return
    if devices.torch_device() == "cpu":
        figures.missing("fp8", "", "not available: the stand-in for Transformer Engine has no FP8")
        return
    # On a GPU that the 8B shapes do not fit, the small model's.
    run = prepare(figures, "fp8", models.BIG) or prepare(figures, "fp8", models.SMALL)
    if run is None:
        return
    micro_batch = min(MICRO_BATCH, run.micro_batches[0])
    for name, own in {"off": "", **settings}.items():
        measure_run(figures, f"fp8/{name}", run, micro_batch, *([own] if own else []))
