"""FLOPs of a training, computed from shapes.

A multiplication and an addition count as two. Matrix products take 2 FLOP a parameter and token forward, 4 backward;
causal attention 2 x seq_length x queries forward in each layer (scores and their use with the values, the masked half
left out, as flash attention does), twice that backward. Norms, rotations and the loss are not counted. Utilization
(`cluster.gpu.mfu`) is derived with the same rules, so that they cancel where the shapes are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from prune_distill.model.model_size import layer_weights, product_weights
from prune_distill.schema import Family, Loss, Recompute, Shape, Training
from prune_distill.schema.phases import training_phases

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs per token of training: student forward and backward, teacher forward, recomputation."""

    student: int
    teacher: int
    recompute: int

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.recompute


def training_flops(
    training: Training,
    loss: Loss,
    family: Family,
    student: Shape,
    teacher: Shape | None,
    teacher_family: Family | None = None,
) -> TokenFlops:
    """Return FLOPs per token of a training; without the teacher if `loss` is cross-entropy or it does not run.

    Args:
        teacher_family: the teacher's; None: the student's.
    """
    phases = training_phases(training)
    total = sum(phase.steps * phase.tokens_a_step for phase in phases)
    # For several sequence lengths, the mean over tokens.
    length = sum(phase.steps * phase.tokens_a_step * phase.seq_length for phase in phases) // max(total, 1)
    return sequence_flops(length, training.recompute, loss, family, student, teacher, teacher_family)


def sequence_flops(
    seq_length: int,
    recompute: Recompute,
    loss: Loss,
    family: Family,
    student: Shape,
    teacher: Shape | None,
    teacher_family: Family | None = None,
) -> TokenFlops:
    """Return FLOPs per token of training on sequences of `seq_length` tokens."""
    again = {
        Recompute.none: 0,
        Recompute.selective: _attention(student, seq_length),
        Recompute.full: 2 * student.num_layers * layer_weights(student, family) + _attention(student, seq_length),
    }
    return TokenFlops(
        student=FORWARD_AND_BACKWARD * forward_flops(student, family, seq_length),
        teacher=forward_flops(teacher, teacher_family or family, seq_length) if teacher and loss is Loss.kd else 0,
        recompute=again[recompute],
    )


def forward_flops(shape: Shape, family: Family, seq_length: int) -> int:
    """Return FLOPs per token of a forward pass over sequences of `seq_length` tokens."""
    return 2 * product_weights(shape, family) + _attention(shape, seq_length)


def _attention(shape: Shape, seq_length: int) -> int:
    return 2 * seq_length * shape.num_attention_heads * shape.kv_channels * shape.num_layers


@dataclass(frozen=True)
class Meter:
    """Computes the model-FLOPs utilization of a training.

    Attributes:
        peak: peak FLOP/s of all ranks together, in the training's precision.
        teacher_family: the teacher's; None: the student's.
    """

    loss: Loss
    family: Family
    student: Shape
    teacher: Shape | None
    peak: float
    teacher_family: Family | None = None

    def utilization(self, tokens_per_second: float, seq_length: int) -> float:
        """Return the model-FLOPs utilization: the fraction of the peak, without recomputation."""
        models = self.family, self.student, self.teacher, self.teacher_family
        flops = sequence_flops(seq_length, Recompute.none, self.loss, *models)
        return tokens_per_second * flops.total / self.peak
