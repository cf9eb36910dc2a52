"""torchrun --nproc_per_node 8 -m recipes distill --config RUN_DIR/resolved.yaml

Distillation: the pruned student learns the teacher's next-token distribution, with the loss in `distill.kd`. The
controls are separate stages that train the same shape on the same tokens without a teacher: `distill.ce` from the
pruned weights, `distill.scratch` from random ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prune_distill.config.values import utilization_meter
from prune_distill.data.folder import read_training_data
from prune_distill.distillation.cached_logits import CachedLogitsReader
from prune_distill.distillation.distillation import TeacherSwap, student_to_train
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pruning.successive_halving import resume_from_winner
from prune_distill.schema import Init, RunConfig
from prune_distill.training.training import train


@dataclass(frozen=True)
class Inputs:
    """NeMo checkpoints, prepared data, and the teacher's cached logits.

    Attributes:
        teacher: None if the student learns from the data alone or from `cached_logits`.
        corrected_teacher: replaces the teacher at a step.
        winner: checkpoint of the first steps of this distillation, from successive halving.
        completions: the student's own, in an on-policy round.
    """

    student: Path
    data: Path
    teacher: Path | None = None
    corrected_teacher: Path | None = None
    cached_logits: Path | None = None
    winner: Path | None = None
    completions: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `nemo/`, the student as its own model class; `metrics.jsonl`; `checkpoints/`."""
    cached_logits = shared_ids = None
    if inputs.cached_logits is not None:
        cached_logits = CachedLogitsReader(inputs.cached_logits)
        shared_ids = cached_logits.description.vocab_size
    model = student_to_train(cfg.distill, inputs.student, inputs.teacher, cfg.quantize, shared_ids)
    if cached_logits is not None and shared_ids is not None:
        most = min(shared_ids, model.config.vocab_size)
        cached_logits.require(temperature=cfg.distill.kd.temperature, vocab_size=most)
    callbacks = []
    if inputs.corrected_teacher is not None and cfg.distill.swap_teacher_at_step is not None:
        callbacks.append(TeacherSwap(inputs.corrected_teacher, cfg.distill.swap_teacher_at_step))
    if inputs.winner is not None:
        resume_from_winner(inputs.winner, out)
    data = read_training_data(inputs.data, inputs.completions)
    start = inputs.student if cfg.distill.init is Init.pruned else None
    return train(
        *(model, cfg.distill, data, out),
        seed=cfg.seed,
        start=start,
        meter=utilization_meter(cfg),
        cached_logits=cached_logits,
        callbacks=callbacks,
    )
