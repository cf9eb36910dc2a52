"""What a run writes to disk, estimated from shapes and steps, and what the disk has left."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from prune_distill.config.values import require
from prune_distill.model.model_size import parameters
from prune_distill.model.student import shape_to_prune, student_shape
from prune_distill.schema import Precision, RunConfig, Training
from prune_distill.schema.phases import training_tokens
from prune_distill.units import GIB

# Where there is too little room.
FIX = "delete something, or set run_dir to a larger disk"
# What a training checkpoint holds a parameter besides the weights: fp32 weights and Adam's two moments, in the model's
# shapes (ckpt_optim_fully_reshardable), in either precision.
OPTIMIZER_BYTES = 12
# Of a token of a completion: an id of up to six digits in JSON, and its mask.
COMPLETION_BYTES = 9


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk of a run's folder.

    Attributes:
        needed: what the whole run writes, by kind; see `bytes_needed`.
        written: what the folder contains already.
        free: what the disk has left.
    """

    needed: dict[str, int]
    written: int
    free: int

    @property
    def total(self) -> int:
        return sum(self.needed.values())

    @property
    def sizes(self) -> dict[str, int]:
        """All of them by name."""
        return {**self.needed, "total": self.total, "written": self.written, "free": self.free}

    @property
    def has_room(self) -> bool:
        """Whether what the run still writes fits the disk."""
        return self.total - self.written <= self.free

    def describe(self, run_dir: str) -> str:
        """The free space and what the run still writes, as a clause about `run_dir`."""
        to_come = self.total - self.written
        return f"{run_dir} has {self.free / GIB:,.1f} GiB free, and the run still writes about {to_come / GIB:,.1f} GiB"


def estimate_disk(cfg: RunConfig) -> Disk:
    """What a run needs on disk, next to what its folder and its disk have now."""
    run_dir = Path(cfg.run_dir)
    return Disk(bytes_needed(cfg), written_bytes(run_dir), free_bytes(run_dir))


def bytes_needed(cfg: RunConfig) -> dict[str, int]:
    """Bytes by kind, everything kept.

    - `tokens`: as many as distillation reads, each once. An assumption: what prepare_data writes is what the JSONL
      files hold, and their tokens are not known before.
    - `teacher`: as a NeMo checkpoint; a demo's also as the two models that it is made as. Where the teacher is not the
      model that is pruned, both models; and all teachers of single sources.
    - `students`: pruned, distilled and controls, each for NeMo and for Hugging Face; the candidates of successive
      halving; what earlier rounds leave, for NeMo; a byte per parameter of each quantized format.
    - `checkpoints`: of each training, those that are kept and the one being written.
    - `signal`: the teacher's, where it is stored: at most, before compression (see `cached_logits_bytes`). Each
      sequence is in the cache of one teacher.
    - `completions`: of on-policy rounds, at most. Their students count among `students` and `checkpoints`.

    A corrected teacher counts among `teacher` (for NeMo and for Hugging Face), its training among `checkpoints`.
    """
    student = parameters(student_shape(cfg), cfg.model.family)
    original, teacher = require(cfg.model.shape), require(cfg.teacher_shape)
    original_params, teacher_params = parameters(original, cfg.model.family), parameters(teacher, cfg.teacher_family)
    others = [parameters(require(other.shape), require(other.family)) for other in cfg.source_teachers]
    own_teachers = weight_bytes(Precision.bf16) * (teacher_params * cfg.has_own_teacher + sum(others))
    trained, stored = weight_bytes(cfg.distill.precision), teacher_weight_bytes(cfg)
    on_policy = cfg.distill.on_policy
    rounds = 0 if on_policy is None else on_policy.rounds
    trainings = 1 + len(cfg.distill.controls) + rounds
    between = [
        parameters(shape_to_prune(cfg, number), cfg.model.family) for number in range(1, len(cfg.prune.rounds) + 1)
    ]
    taking_part = 0 if cfg.prune.successive_halving is None else cfg.prune.successive_halving.candidates
    demo, correction = cfg.model.demo, cfg.distill.teacher_correction
    correction_bytes = 0 if correction is None else 2 * weight_bytes(correction.precision) * teacher_params
    needed = {
        "tokens": training_tokens(cfg.distill) * token_bytes(original.vocab_size),
        "teacher": (1 if demo is None else 3) * stored * original_params + own_teachers + correction_bytes,
        "students": (2 * (stored + trainings * trained) + taking_part * stored + len(cfg.quantize.formats)) * student
        + (stored + trained) * sum(between),
        "checkpoints": (trainings + taking_part) * _checkpoints(cfg.distill, student)
        + (0 if demo is None else _checkpoints(demo.training, original_params))
        + (0 if correction is None else _checkpoints(correction, teacher_params))
        + sum(_checkpoints(cfg.distill, model) for model in between),
    }
    if cfg.distill.reads_cached_logits:
        tokens = training_tokens(cfg.distill)
        if on_policy is not None:
            tokens += rounds * on_policy.steps * cfg.distill.global_batch_size * cfg.distill.seq_length
        needed["signal"] = tokens * cached_logits_bytes(cfg.distill.cached_logits_top_k, cfg.shared_vocabulary)
    if on_policy is not None:
        completions = rounds * on_policy.prompts_per_round * on_policy.samples_per_prompt
        length = on_policy.prompt_tokens + on_policy.max_new_tokens
        needed["completions"] = completions * length * (COMPLETION_BYTES + token_bytes(original.vocab_size))
    return needed


def cached_logits_bytes(top_k: int, vocab_size: int) -> int:
    """Bytes of a token in cached logits (prune_distill/distillation/cached_logits.py), before compression.

    An id without its bytes that are always 0, a log-probability; and the tail's. Compression takes off 46 % at k = 64
    for the demo's teacher (vocabulary of 1,024), 41 % for Zipf-like logits over 151,936 entries.
    """
    id_bytes = math.ceil((vocab_size - 1).bit_length() / 8)
    return top_k * (id_bytes + 2) + 4


def _checkpoints(training: Training, model: int) -> int:
    kept = training.keep_checkpoints + training.keep_best
    return (kept + 1) * (weight_bytes(training.precision) + OPTIMIZER_BYTES) * model


def token_bytes(vocab_size: int) -> int:
    """Bytes of a token in Megatron's index (DType.optimal_dtype, megatron/core/datasets/indexed_dataset.py:106)."""
    return 2 if vocab_size < 65500 else 4


def weight_bytes(precision: Precision) -> int:
    return 2 if precision is Precision.bf16 else 4


def teacher_weight_bytes(cfg: RunConfig) -> int:
    """Bytes of a weight of the model that is pruned, and so of the student: one of Hugging Face's is taken to be in
    bf16."""
    return weight_bytes(Precision.bf16 if cfg.model.demo is None else cfg.model.demo.training.precision)


def written_bytes(run_dir: Path) -> int:
    """Bytes of the files that a run folder holds already."""
    return sum(path.lstat().st_size for path in run_dir.rglob("*") if path.is_file())


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds a path, or will hold it."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free
