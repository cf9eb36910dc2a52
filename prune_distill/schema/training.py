"""A training run: steps, learning rate, parallelism, checkpoints and trackers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from prune_distill.schema.fields import placement, recorded


class Precision(Enum):
    """Training precision. `bf16`: NeMo's bf16-mixed, weights in bf16 with fp32 master weights; `fp32`: all in fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class MatmulPrecision(Enum):
    """How fp32 matrix products are computed, in torch's terms: `medium` may go through bf16, `high` through TF32."""

    highest = "highest"
    high = "high"
    medium = "medium"


class Recompute(Enum):
    """Activation recomputation: nothing, the attention core, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass
class Parallel:
    """Megatron's parallel layout; data parallelism is what is left of the ranks."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    # Takes effect where tensor_model_parallel_size > 1.
    sequence_parallel: bool = True
    # Ranks among which each layer's experts are shared out; taken from the others of a pipeline stage, so that it needs
    # no more of them. An expert is never cut (expert tensor parallelism is 1).
    expert_model_parallel_size: int = 1


class Schedule(Enum):
    """How the learning rate falls from `lr` to `min_lr` after the warm-up: in half a cosine wave, in a line, or (`wsd`)
    not before the last `decay_steps`, then in a line."""

    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


@dataclass
class Phase:
    """A stretch of a training with settings of its own; null: the training's."""

    # How long it is: optimizer steps, or tokens, of which it takes as many as make whole steps. One of the two.
    max_steps: int | None = None
    tokens: int | None = None
    seq_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = placement(None)
    # The schedule runs over the phase's own steps, from this lr to this min_lr.
    lr: float | None = None
    min_lr: float | None = None
    # Null: the training's in the first phase, none in the later ones.
    warmup_steps: int | None = None
    # Of the data's sources by name, instead of those that `data.sources` gives; those left out are not read.
    weights: dict[str, float] | None = None


@dataclass
class WeightsAndBiases:
    """Also writes a training's figures to Weights & Biases. Its key comes from WANDB_API_KEY alone."""

    project: str = MISSING
    entity: str | None = None


@dataclass
class Mlflow:
    """Also writes a training's figures to MLflow. Its credentials come from MLflow's own environment variables."""

    tracking_uri: str = MISSING
    experiment: str = MISSING


@dataclass
class Training:
    """One training run through `prune_distill.training.training`. A step is one optimizer step of one global batch."""

    max_steps: int = MISSING
    seq_length: int = MISSING
    global_batch_size: int = MISSING
    micro_batch_size: int = placement(1)
    lr: float = MISSING
    min_lr: float = MISSING
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 0
    # Of schedule=wsd: the steps at the end, of each phase, in which the learning rate falls.
    decay_steps: int | None = None
    # Consecutive phases that together take max_steps. Each reads the data in its own order, so that a document may
    # come in several. Validation keeps to the training's own sizes throughout.
    phases: list[Phase] | None = None
    # Norms and biases have none.
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    precision: Precision = Precision.bf16
    # Matters where precision is fp32; see torch.set_float32_matmul_precision.
    float32_matmul_precision: MatmulPrecision = MatmulPrecision.highest
    parallel: Parallel = placement(Parallel)  # noqa: RUF009
    use_distributed_optimizer: bool = placement(True)
    overlap_grad_reduce: bool = placement(True)
    overlap_param_gather: bool = placement(True)
    recompute: Recompute = placement(Recompute.none)  # noqa: RUF009
    # A loss above so many times the median of the last ones stops the training, as a non-finite one always does;
    # null: however high it is.
    max_loss_ratio: float | None = placement(10.0)
    # Spans of steps, [first, last] counted from 1, whose batches are skipped: each takes a newly drawn one instead. A
    # step that is named again takes a further one.
    skip_steps: list[list[int]] = recorded(list)  # noqa: RUF009
    save_every_n_steps: int = recorded(100)
    # The newest ones, and, of those whose step was validated, the one with the lowest loss.
    keep_checkpoints: int = recorded(2)
    keep_best: bool = recorded(True)
    # Goes on training while a checkpoint is written.
    async_save: bool = placement(True)
    val_every_n_steps: int = recorded(100)
    # Global batches a validation takes, always the same ones; null: the whole validation set, once.
    val_batches: int | None = recorded(8)
    log_every_n_steps: int = recorded(10)
    wandb: WeightsAndBiases | None = placement(None)  # noqa: RUF009
    mlflow: Mlflow | None = placement(None)  # noqa: RUF009
    num_workers: int = placement(2)
