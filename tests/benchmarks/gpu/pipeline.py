"""The whole tiny job through `launch.run`, with the real Transformer Engine: logits next to transformers', losses."""

from __future__ import annotations

import shutil
import time

from tests.benchmarks.gpu.figures import Figures
from tests.helpers import tiny


def measure(figures: Figures) -> None:
    run_dir = figures.work / "pipeline"
    shutil.rmtree(run_dir, ignore_errors=True)
    started = time.monotonic()
    tiny.launch(run_dir, *tiny.DEPTH)
    how = "the tiny run of the tests, all stages, fp32; wall clock with imports"
    figures.add("pipeline/total", time.monotonic() - started, "s", how)
    report = tiny.report(run_dir)
    figures.add("pipeline/backend", report["backend"], "", "report.json")
    for check, value in report["checks"].items():
        figures.add(f"pipeline/{check}", value, "", "NeMo's logits next to transformers', fp32; logits are about 5")
    for name, model in report["models"].items():
        figures.add(f"pipeline/val_loss/{name}", model["val_loss"], "nats per token", "held-out documents")
    for stage, content in report["stages"].items():
        figures.add(f"pipeline/seconds/{stage}", float(content["seconds"]), "s", "the stage's manifest")
