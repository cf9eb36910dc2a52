"""torchrun --nproc_per_node 8 -m recipes distill --config RUN_DIR/resolved.yaml

Distillation: the pruned student learns the teacher's next-token distribution (`distill.kd` says by which loss). The
controls are stages of their own that train the same shape on the same tokens without a teacher: `distill.ce` from the
pruned weights, `distill.scratch` from random ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prune_distill.config.values import utilization_meter
from prune_distill.data.folder import DataFolder
from prune_distill.distillation.distillation import TeacherSwap, student_to_train
from prune_distill.distillation.signal import SignalReader
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pruning.tournament import resume_from
from prune_distill.schema import Init, RunConfig
from prune_distill.training.training import train


@dataclass(frozen=True)
class Inputs:
    """NeMo checkpoints, prepared data, and the teacher's stored signal.

    Attributes:
        teacher: None where the student learns from the data alone or from `signal`.
        corrected_teacher: takes the teacher's place at a step.
        begun: what a tournament left of the first steps of this distillation.
    """

    student: Path
    data: Path
    teacher: Path | None = None
    corrected_teacher: Path | None = None
    signal: Path | None = None
    begun: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `nemo/`, the student as its own model class; `metrics.jsonl`; `checkpoints/`."""
    model = student_to_train(cfg.distill, inputs.student, inputs.teacher)
    signal = None
    if inputs.signal is not None:
        signal = SignalReader(inputs.signal)
        signal.require(temperature=cfg.distill.kd.temperature, vocab_size=model.config.vocab_size)
    callbacks = []
    if inputs.corrected_teacher is not None and cfg.distill.swap_teacher_at_step is not None:
        callbacks.append(TeacherSwap(inputs.corrected_teacher, cfg.distill.swap_teacher_at_step))
    if inputs.begun is not None:
        resume_from(inputs.begun, out)
    data = DataFolder.read(inputs.data)
    start = inputs.student if cfg.distill.init is Init.pruned else None
    return train(
        *(model, cfg.distill, data, out),
        seed=cfg.seed,
        start=start,
        meter=utilization_meter(cfg),
        signal=signal,
        callbacks=callbacks,
    )
