"""Distillation: the losses, where the teacher's logits come from, and its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from prune_distill.schema.fields import matters, placement, recorded
from prune_distill.schema.training import Training


class Loss(Enum):
    """`kd`: from the teacher, as `distill.kd` says. `ce`: cross-entropy on the data, no teacher."""

    kd = "kd"
    ce = "ce"


class Divergence(Enum):
    """How far the student's distribution is from the teacher's: `forward_kl` weighs by the teacher's probabilities,
    `reverse_kl` by the student's, `jensen_shannon` is the mean of both models' KL divergences to their mean."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"


class TeacherSignal(Enum):
    """Where distillation has the teacher's distributions from. `live`: the teacher runs beside the student. `stored`:
    it ran once before, in a stage of its own, which kept the most probable tokens of each distribution."""

    live = "live"
    stored = "stored"


class HiddenLoss(Enum):
    """Between hidden states of student and teacher: 1 - cosine, or the mean of squared differences."""

    cosine = "cosine"
    mse = "mse"


class LossImplementation(Enum):
    """`chunked`: from hidden states, never holding whole logits. `upstream`: NeMo's LogitsKLLoss, for reference."""

    chunked = "chunked"
    upstream = "upstream"


class Init(Enum):
    """What a student starts from: the pruned teacher's weights, or random ones."""

    pruned = "pruned"
    random = "random"


@dataclass
class LayerPair:
    """A layer of the student and the one of the teacher whose output it learns, counted from 1."""

    student: int = MISSING
    teacher: int = MISSING


@dataclass
class KdConfig:
    """The loss of distillation: kd_weight x temperature² x divergence + lm_weight x cross-entropy of the data
    + intermediate_weight x mean over the pairs. The weights are fixed: nothing is scaled behind them."""

    divergence: Divergence = Divergence.forward_kl
    # Both models' logits are divided by it, in the divergence only.
    temperature: float = 1.0
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    # Takes of the teacher's distribution its k most probable tokens and the rest as one; null: the whole vocabulary.
    top_k: int | None = None
    intermediate_pairs: list[LayerPair] = field(default_factory=list)
    intermediate_loss: HiddenLoss = matters(HiddenLoss.cosine, lambda kd: bool(kd.intermediate_pairs))  # noqa: RUF009
    intermediate_weight: float = matters(1.0, lambda kd: bool(kd.intermediate_pairs))
    implementation: LossImplementation = placement(LossImplementation.chunked)  # noqa: RUF009
    # Tokens whose logits are in memory at a time (`chunked`).
    chunk_tokens: int = placement(256)


@dataclass
class DistillConfig(Training):
    """Distillation of the pruned student from the teacher."""

    loss: Loss = Loss.kd
    init: Init = Init.pruned
    kd: KdConfig = matters(KdConfig, lambda distill: distill.loss is Loss.kd)  # noqa: RUF009
    signal: TeacherSignal = matters(TeacherSignal.live, lambda distill: distill.loss is Loss.kd)  # noqa: RUF009
    # Tokens of each distribution that a stored signal keeps. Part of the identity of the stage teacher_signal, and of
    # what reads it through that.
    signal_top_k: int = recorded(64)
    # Sequences that a file of a stored signal holds: what is lost at most when the stage is killed, a rank.
    signal_shard_sequences: int = placement(256)
    # Trains the teacher on the distillation data first, as language models are trained; null: it stays as it is. Its
    # learning rate is best low, that of the end of its pretraining. Part of the identity of the stage correct_teacher.
    correct_teacher: Training | None = placement(None)  # noqa: RUF009
    # The step at which the corrected teacher takes the original one's place; null: it is the teacher from the start.
    swap_teacher_at_step: int | None = matters(None, lambda distill: distill.loss is Loss.kd)
    # Further students of the same steps and data that the report sets beside it: "ce" (no teacher), "scratch" (no
    # teacher, and random weights to begin with).
    controls: list[str] = field(default_factory=list, metadata={"identity": False})

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher runs beside the student."""
        return self.loss is Loss.kd and self.signal is TeacherSignal.live

    @property
    def loss_in_words(self) -> str:
        """What training minimises, as cards and reports call it."""
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
    def reads_signal(self) -> bool:
        """Whether the student learns from a stored signal."""
        return self.loss is Loss.kd and self.signal is TeacherSignal.stored
