"""FLOPs of pruning and distillation, and the hours that they take on a stated GPU.

A multiplication and an addition count as two. Matrix products take 2 FLOP a parameter and token forward, 4 backward;
causal attention 2 x seq_length x queries forward in each layer (scores and their use with the values, the masked half
left out, as flash attention does), twice that backward. Norms, rotations and the loss are not counted. Utilisation
(`cluster.gpu.utilisation`) is derived with the same rules, so that they cancel where the shapes are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from conf.model_size import layer_weights, product_weights
from conf.schema import Family, Gpu, Loss, Precision, PruneConfig, Recompute, Shape, Training

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class TokenFlops:
    """FLOP a token of training: the student forward and backward, the teacher forward, the student's layers again."""

    student: int
    teacher: int
    recompute: int

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.recompute


def training_flops(training: Training, loss: Loss, family: Family, student: Shape, teacher: Shape | None) -> TokenFlops:
    """FLOP a token of a training run; without the teacher where `loss` is cross-entropy, or it does not run beside."""
    again = {
        Recompute.none: 0,
        Recompute.selective: _attention(student, training.seq_length),
        Recompute.full: 2 * student.num_layers * layer_weights(student, family)
        + _attention(student, training.seq_length),
    }
    return TokenFlops(
        student=FORWARD_AND_BACKWARD * forward_flops(student, family, training.seq_length),
        teacher=forward_flops(teacher, family, training.seq_length) if teacher and loss is Loss.kd else 0,
        recompute=again[training.recompute],
    )


def forward_flops(shape: Shape, family: Family, seq_length: int) -> int:
    """FLOP a token of a forward pass over sequences of `seq_length` tokens."""
    return 2 * product_weights(shape, family) + _attention(shape, seq_length)


def _attention(shape: Shape, seq_length: int) -> int:
    return 2 * seq_length * shape.num_attention_heads * shape.kv_channels * shape.num_layers


def tokens(training: Training) -> int:
    """Tokens of a training run, repeated ones included."""
    return training.max_steps * training.global_batch_size * training.seq_length


def training_hours(flops: float, precision: Precision, gpu: Gpu | None, ranks: int) -> float | None:
    """Hours on `ranks` GPUs; None where the GPU is not stated, or its speed in this precision isn't."""
    if gpu is None or precision is not Precision.bf16:
        return None
    return flops / (ranks * gpu.bf16_tflops * 1e12 * gpu.utilisation * 3600)


def calibration_flops(prune: PruneConfig, family: Family, teacher: Shape) -> int:
    """FLOP of pruning: the teacher forward over the calibration text; none where the layers to drop are named."""
    if prune.drop_layers:
        return 0
    return (
        prune.calibration_samples
        * prune.calibration_seq_length
        * forward_flops(teacher, family, prune.calibration_seq_length)
    )
