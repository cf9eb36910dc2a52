"""A distillation step with products in FP8: of the teacher alone, and of both models."""

from __future__ import annotations

from tests.benchmarks.gpu import models
from tests.benchmarks.gpu.figures import Figures
from tests.benchmarks.gpu.step import measure_run, prepare

SETTINGS = {
    "off": (),
    "teacher": ("distill.teacher_fp8=true",),
    "hybrid": ("distill.teacher_fp8=true", "distill.fp8=hybrid"),
    "blockwise": ("distill.teacher_fp8=true", "distill.fp8=blockwise"),
}
MICRO_BATCH = 2


def measure(figures: Figures) -> None:
    # On a GPU that the 8B shapes do not fit, the small model's.
    run = prepare(figures, "fp8", models.BIG) or prepare(figures, "fp8", models.SMALL)
    if run is None:
        return
    micro_batch = min(MICRO_BATCH, run.micro_batches[0])
    for name, settings in SETTINGS.items():
        measure_run(figures, f"fp8/{name}", run, micro_batch, *settings)
