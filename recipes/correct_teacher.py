"""torchrun --nproc_per_node 8 -m recipes.correct_teacher --config RUN_DIR/resolved.yaml

Teacher correction: the teacher is trained on the distillation data as language models are, so that what it then teaches
fits these data (Minitron in practice, arXiv 2408.11796, section 2). The student is pruned from the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import METRICS
from prune_distill.pipeline.stage_main import stage_main
from prune_distill.schema import RunConfig


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: teacher (a NeMo checkpoint), data.

    Output: `nemo/`, the corrected teacher; `metrics.jsonl`; `checkpoints/`. Its gain is in the metrics: held-out loss
    (nats per token) before and after, on the same batches.
    """
    from prune_distill.nemo import backend

    backend.activate()
    from prune_distill.data.folder import DataFolder
    from prune_distill.nemo import nemo_api
    from prune_distill.training.training import train

    correction = cfg.distill.correct_teacher
    assert correction is not None  # or the stage is not wanted
    teacher = nemo_api.load_model(inputs["teacher"])
    data = DataFolder.read(inputs["data"])
    key = "distill.correct_teacher"
    metrics = train(
        teacher, correction, data, out, seed=cfg.seed, start=inputs["teacher"], key=key, validate_first=True
    )
    return {**metrics, **gain(out / METRICS)}


def gain(metrics: Path) -> dict[str, float | None]:
    """Held-out loss before and after a training, from its `metrics.jsonl`; None: lost with lines of that file."""
    losses = {line["step"]: line["val_loss"] for line in read_metrics(metrics) if "val_loss" in line}
    before, after = losses.get(0), losses[max(losses)] if losses else None
    gained = None if before is None or after is None else before - after
    return {"val_loss_before": before, "val_loss_after": after, "val_loss_gain": gained}


if __name__ == "__main__":
    stage_main(run, "correct_teacher")
