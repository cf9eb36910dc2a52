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
from prune_distill.distillation.cached_logits_batch import TeacherCaches
from prune_distill.distillation.distillation import TeacherSwap, student_to_train
from prune_distill.pipeline.names import cached_logits_name
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pruning.successive_halving import resume_from_winner
from prune_distill.schema import Init, RunConfig
from prune_distill.training.training import train


@dataclass(frozen=True)
class Inputs:
    """NeMo checkpoints, prepared data, and the teachers' cached logits.

    Attributes:
        cached_logits: by the names of `prune_distill.pipeline.names.cached_logits_name`.
        teacher: None if the student learns from the data alone or from `cached_logits`.
        corrected_teacher: replaces the teacher at a step.
        winner: checkpoint of the first steps of this distillation, from successive halving.
        completions: the student's own, in an on-policy round.
    """

    student: Path
    data: Path
    cached_logits: dict[str, Path]
    teacher: Path | None = None
    corrected_teacher: Path | None = None
    winner: Path | None = None
    completions: Path | None = None


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `nemo/`, the student as its own model class; `metrics.jsonl`; `checkpoints/`."""
    caches = _open_caches(cfg, inputs.cached_logits)
    shared_ids = None if caches is None else caches.readers[0].description.vocab_size
    model = student_to_train(cfg.distill, inputs.student, inputs.teacher, cfg.quantize, shared_ids)
    if caches is not None and shared_ids is not None:
        most = min(shared_ids, model.config.vocab_size)
        for reader in caches.readers:
            reader.require(temperature=cfg.distill.kd.temperature, vocab_size=most)
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
        cached_logits=caches,
        callbacks=callbacks,
    )


def _open_caches(cfg: RunConfig, folders: dict[str, Path]) -> TeacherCaches | None:
    """Open the cached logits of all teachers; None: there are none."""
    if not folders:
        return None
    names = list(folders)
    by_source: dict[str, int] = {}
    if cfg.source_teachers:
        by_source = {source: names.index(cached_logits_name(number)) for source, number in cfg.teacher_numbers.items()}
    return TeacherCaches([CachedLogitsReader(folder) for folder in folders.values()], by_source)
