"""Distillation: the losses, where the teacher's logits come from, and its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from prune_distill.schema.fields import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    hashed_elsewhere,
    hashed_if,
    placement,
    recorded,
)
from prune_distill.schema.on_policy import OnPolicy
from prune_distill.schema.quantize import QuantFormat
from prune_distill.schema.training import Fp8, Training


class Loss(Enum):
    """`kd`: knowledge distillation from the teacher, with the loss of `distill.kd`. `ce`: cross-entropy on the data,
    without a teacher."""

    kd = "kd"
    ce = "ce"


class Divergence(Enum):
    """The divergence between the student's and the teacher's distributions: KL weighted by the teacher's probabilities
    (`forward_kl`) or by the student's (`reverse_kl`), or the mean of both models' KL divergences from their mean
    (`jensen_shannon`)."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"


class TeacherLogits(Enum):
    """Where distillation gets the teacher's distributions. `live`: the teacher runs next to the student. `cached`: the
    teacher runs once in an earlier stage, which keeps the most probable tokens of each distribution (offline
    distillation)."""

    live = "live"
    cached = "cached"


class HiddenLoss(Enum):
    """The loss between hidden states of student and teacher: 1 - cosine similarity (`cosine`), or the mean of squared
    differences (`mse`)."""

    cosine = "cosine"
    mse = "mse"


class LossImplementation(Enum):
    """`chunked`: computed from hidden states in chunks, without ever storing all logits. `triton`: the same by Triton
    kernels, with fewer passes over a chunk's logits. `upstream`: NeMo's LogitsKLLoss, for reference."""

    chunked = "chunked"
    triton = "triton"
    upstream = "upstream"


class Init(Enum):
    """The student's initial weights: those of the pruned teacher (`pruned`), or random ones (`random`)."""

    pruned = "pruned"
    random = "random"


@dataclass
class LayerPair:
    """A layer of the student and the layer of the teacher whose output it learns."""

    # Number of the student's layer, counted from 1.
    student: PositiveInt = MISSING
    # Number of the teacher's layer, counted from 1.
    teacher: PositiveInt = MISSING


@dataclass
class KdConfig:
    """The loss of distillation: kd_weight x temperature² x divergence + lm_weight x cross-entropy on the data
    + intermediate_weight x mean loss of the layer pairs. The weights are fixed; none is rescaled during training."""

    divergence: Divergence = Divergence.forward_kl
    # Divides both models' logits, in the divergence only.
    temperature: PositiveFloat = 1.0
    # Weight of the divergence from the teacher.
    kd_weight: PositiveFloat = 1.0
    # Weight of the cross-entropy on the data.
    lm_weight: NonNegativeFloat = 0.0
    # Keeps the k most probable tokens of the teacher's distribution and merges the rest into one; null: the whole
    # vocabulary.
    top_k: PositiveInt | None = None
    # Layers of the student that learn the outputs of layers of the teacher.
    intermediate_pairs: list[LayerPair] = field(default_factory=list)
    intermediate_loss: HiddenLoss = hashed_if(HiddenLoss.cosine, lambda kd: bool(kd.intermediate_pairs))
    # Weight of the mean loss of the layer pairs.
    intermediate_weight: PositiveFloat = hashed_if(1.0, lambda kd: bool(kd.intermediate_pairs))
    implementation: LossImplementation = placement(LossImplementation.chunked)
    # Tokens whose logits are in memory at the same time, unless implementation=upstream. `auto`: the fewest with which
    # the loss is nearly as fast as it gets, as far as the GPU's memory goes.
    chunk_tokens: PositiveInt = placement(256)


@dataclass
class DistillConfig(Training):
    """Distillation of the pruned student from the teacher: a training, with a loss and a teacher."""

    loss: Loss = Loss.kd
    init: Init = Init.pruned
    kd: KdConfig = hashed_if(KdConfig, lambda distill: distill.loss is Loss.kd)
    teacher_logits: TeacherLogits = hashed_if(TeacherLogits.live, lambda distill: distill.loss is Loss.kd)
    # FP8 for the matrix products of the teacher's layers too, with the scales of distill.fp8 (hybrid if that is null).
    teacher_fp8: bool = hashed_if(False, lambda distill: distill.loss is Loss.kd)
    # Tokens of each distribution that the cache keeps. Part of the identity of the stage cache_logits, and
    # through its output of the stages that read it.
    cached_logits_top_k: PositiveInt = recorded(64)
    # Sequences per file of cached logits: the most that a rank loses when the stage is killed.
    cached_logits_shard_sequences: PositiveInt = placement(256)
    # Trains the teacher on the distillation data first, with the language-modeling loss; null: the teacher is not
    # trained. A low learning rate is best, such as that at the end of its pretraining. Part of the identity of the
    # stage correct_teacher.
    teacher_correction: Training | None = hashed_elsewhere(None)
    # The step at which the corrected teacher replaces the original one; null: it is the teacher from the start.
    swap_teacher_at_step: PositiveInt | None = hashed_if(None, lambda distill: distill.loss is Loss.kd)
    # Trains the student with fake quantization to a format: fp8, int8 or int4 (quantization-aware distillation); null:
    # without. The stage quantize.FORMAT then writes it. Groups and kept layers are those of the group quantize.
    quantize: QuantFormat | None = None
    # Further distillations on the student's own completions; null: none. Part of the identity of their stages.
    on_policy: OnPolicy | None = hashed_elsewhere(None)
    # Further students, trained for the same steps on the same data, for comparison in the report: "ce" (no teacher),
    # "scratch" (no teacher and random initial weights).
    controls: list[str] = placement(list)

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher runs beside the student."""
        return self.loss is Loss.kd and self.teacher_logits is TeacherLogits.live

    @property
    def fp8_of_teacher(self) -> Fp8 | None:
        """The FP8 scales of the teacher's products; None: no FP8."""
        return (self.fp8 or Fp8.hybrid) if self.teacher_fp8 else None

    @property
    def loss_in_words(self) -> str:
        """What training minimizes, as cards and reports call it."""
        if self.loss is Loss.ce:
            return "cross-entropy on the data"
        kd = self.kd
        names = {Divergence.forward_kl: "KL", Divergence.reverse_kl: "reverse KL"}
        parts = {
            f"{names.get(kd.divergence, 'Jensen-Shannon')} divergence from the teacher": kd.kd_weight,
            "cross-entropy on the data": kd.lm_weight,
            "distance of layer pairs": kd.intermediate_weight if kd.intermediate_pairs else 0.0,
        }
        weighted = {words: weight for words, weight in parts.items() if weight}
        return " + ".join(
            words if len(weighted) == 1 else f"{weight:g} x {words}" for words, weight in weighted.items()
        )

    @property
    def reads_cached_logits(self) -> bool:
        """Whether the student learns from cached logits."""
        return self.loss is Loss.kd and self.teacher_logits is TeacherLogits.cached
