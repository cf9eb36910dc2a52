"""torchrun --nproc_per_node 8 -m recipes distill --config RUN_DIR/resolved.yaml

Distillation: the pruned student learns the teacher's next-token distribution (`distill.kd` says by which loss). The
controls are stages of their own that train the same shape on the same tokens without a teacher: `distill.ce` from the
pruned weights, `distill.scratch` from random ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_distill.config.values import utilization_meter
from prune_distill.data.folder import DataFolder
from prune_distill.distillation.distillation import TeacherSwap, student_to_train
from prune_distill.distillation.signal import SignalReader
from prune_distill.pruning.tournament import resume_from
from prune_distill.schema import Init, RunConfig
from prune_distill.training.training import train


def run(cfg: RunConfig, inputs: dict[str, Any], out: Path) -> dict[str, Any]:
    """Inputs: student, data and, with a teacher's loss, teacher (NeMo checkpoints) or its stored signal;
    corrected_teacher, where that one takes the teacher's place at a step; begun, where a tournament has trained this
    student for its first steps.

    Output: `nemo/`, the student as its own model class; `metrics.jsonl`; `checkpoints/`.
    """
    model = student_to_train(cfg.distill, inputs["student"], inputs.get("teacher"))
    signal = None
    if cfg.distill.reads_signal:
        signal = SignalReader(inputs["signal"])
        signal.require(temperature=cfg.distill.kd.temperature, vocab_size=model.config.vocab_size)
    callbacks = []
    if "corrected_teacher" in inputs and cfg.distill.swap_teacher_at_step is not None:
        callbacks.append(TeacherSwap(inputs["corrected_teacher"], cfg.distill.swap_teacher_at_step))
    if "begun" in inputs:
        resume_from(inputs["begun"], out)
    data = DataFolder.read(inputs["data"])
    start = inputs["student"] if cfg.distill.init is Init.pruned else None
    return train(
        *(model, cfg.distill, data, out),
        seed=cfg.seed,
        start=start,
        meter=utilization_meter(cfg),
        signal=signal,
        callbacks=callbacks,
    )
