"""A training run: steps, learning rate, parallelism, checkpoints and trackers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from prune_distill.schema.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    ShareBelowOne,
    Steps,
    hashed_if,
    placement,
    recorded,
)


class Precision(Enum):
    """Training precision. `bf16`: NeMo's bf16-mixed, weights in bf16 with fp32 master weights. `fp32`: all in fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class Fp8(Enum):
    """The layers' matrix products in FP8, by Transformer Engine. `hybrid`: e4m3 for inputs and weights, e5m2 for
    gradients, one scale per tensor. `blockwise`: e4m3, one scale per 128 elements of inputs and gradients and per
    128 x 128 elements of weights."""

    hybrid = "hybrid"
    blockwise = "blockwise"


class MatmulPrecision(Enum):
    """How fp32 matrix products are computed, by the names of torch.set_float32_matmul_precision: in fp32 (`highest`),
    or with TF32 (`high`) or bf16 (`medium`) allowed."""

    highest = "highest"
    high = "high"
    medium = "medium"


class Recompute(Enum):
    """What the backward pass computes again instead of storing it: nothing (`none`), the attention core (`selective`),
    or whole layers (`full`)."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass
class Parallel:
    """Megatron's parallel layout. The remaining ranks are used for data parallelism."""

    # Ranks that share each layer's matrices.
    tensor_model_parallel_size: PositiveInt = 1
    # Pipeline stages, among which the layers are divided.
    pipeline_model_parallel_size: PositiveInt = 1
    # Ranks that share each sequence.
    context_parallel_size: PositiveInt = 1
    # Whether tensor-parallel ranks also share the activations between matrices, along the sequence; has no effect with
    # tensor_model_parallel_size=1.
    sequence_parallel: bool = True
    # Ranks that share the experts of each layer. They are among the other ranks of a pipeline stage, so that no more
    # ranks are needed. An expert itself is never divided (expert tensor parallelism is 1).
    expert_model_parallel_size: PositiveInt = 1


class Schedule(Enum):
    """How the learning rate falls from `lr` to `min_lr` after the warm-up: along half a cosine wave (`cosine`),
    linearly (`linear`), or linearly in the last `decay_steps` only (`wsd`, warmup-stable-decay)."""

    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


class Packing(Enum):
    """How documents fill the training's sequences. `concatenated`: one after the other, cut where a sequence ends;
    attention reaches back into earlier documents. `documents`: only whole documents, as many as fit, and padding;
    attention stays within a document. It needs one sequence per forward pass and no context parallelism."""

    concatenated = "concatenated"
    documents = "documents"


@dataclass
class Phase:
    """A part of a training with its own settings; null takes the training's."""

    # Length in optimizer steps; null: the length is given in tokens. Exactly one of the two is set.
    max_steps: Steps | None = None
    # Length in tokens, rounded up to whole steps; null: the length is given in steps.
    tokens: PositiveInt | None = None
    # Tokens per sequence; null: the training's.
    seq_length: PositiveInt | None = None
    # Sequences per step; null: the training's.
    global_batch_size: PositiveInt | None = None
    # Sequences per forward pass on a rank; null: the training's.
    micro_batch_size: PositiveInt | None = placement(None)
    # Learning rate after the warm-up; null: the training's. The schedule runs over the steps of the phase.
    lr: PositiveFloat | None = None
    # Learning rate at the end of the phase; null: the training's.
    min_lr: NonNegativeFloat | None = None
    # Steps of warm-up; null: the training's in the first phase, and none in later ones.
    warmup_steps: NonNegativeInt | None = None
    # Weights of the data's sources by name, instead of those in `data.sources`; a source that is not named is not read.
    # Null: the weights in `data.sources`.
    weights: dict[str, float] | None = None


@dataclass
class WeightsAndBiases:
    """Also logs a training's metrics to Weights & Biases. The API key comes from WANDB_API_KEY only."""

    # Project that receives the run.
    project: str = MISSING
    # User or team that owns the project; null: the default of the API key.
    entity: str | None = None


@dataclass
class Mlflow:
    """Also logs a training's metrics to MLflow. Credentials come from MLflow's environment variables."""

    # URI of the tracking server, or a local folder.
    tracking_uri: str = MISSING
    # Name of the experiment that receives the run.
    experiment: str = MISSING


@dataclass
class Training:
    """A training run. A step is one optimizer step on one global batch."""

    # Number of optimizer steps.
    max_steps: Steps = MISSING
    # Tokens per sequence.
    seq_length: PositiveInt = MISSING
    # Sequences per step, over all ranks.
    global_batch_size: PositiveInt = MISSING
    packing: Packing = hashed_if(Packing.concatenated, lambda training: training.packing is not Packing.concatenated)
    # Sequences per forward pass on a rank.
    micro_batch_size: PositiveInt = placement(1)
    # Learning rate after the warm-up.
    lr: PositiveFloat = MISSING
    # Learning rate at the end.
    min_lr: NonNegativeFloat = MISSING
    schedule: Schedule = Schedule.cosine
    # Steps in which the learning rate rises linearly to `lr`.
    warmup_steps: NonNegativeInt = 0
    # Steps at the end of each phase in which the learning rate falls, for schedule=wsd; null: another schedule.
    decay_steps: PositiveInt | None = None
    # Consecutive phases that together take max_steps; null: one phase with the training's settings. Each phase reads
    # the data in its own order, so that a document may occur in several phases. Validation always uses the training's
    # sizes.
    phases: list[Phase] | None = None
    # Weight decay (AdamW). Norms and biases have none.
    weight_decay: NonNegativeFloat = 0.1
    # Whether the embedding has weight decay.
    decay_embeddings: bool = True
    # Decay of Adam's running mean of gradients.
    adam_beta1: ShareBelowOne = 0.9
    # Decay of Adam's running mean of squared gradients.
    adam_beta2: ShareBelowOne = 0.95
    # Norm to which gradients are clipped.
    clip_grad: PositiveFloat = 1.0
    precision: Precision = Precision.bf16
    # FP8 for the matrix products of the layers of the model that is trained, forward and backward; needs
    # precision=bf16. Attention, embedding, output layer, loss and stored weights stay in bf16; null: no FP8.
    fp8: Fp8 | None = None
    # Takes effect with precision=fp32 only.
    float32_matmul_precision: MatmulPrecision = MatmulPrecision.highest
    parallel: Parallel = placement(Parallel)
    # Whether data-parallel ranks share the optimizer's state.
    use_distributed_optimizer: bool = placement(True)
    # Whether gradients are reduced while the backward pass still runs.
    overlap_grad_reduce: bool = placement(True)
    # Whether parameters are gathered while the forward pass already runs; needs use_distributed_optimizer.
    overlap_param_gather: bool = placement(True)
    recompute: Recompute = placement(Recompute.none)
    # Stops the training at a loss above so many times the median of the latest losses; null: no limit. A non-finite
    # loss always stops it.
    max_loss_ratio: Annotated[float, Range(above=1, problem="would stop at a usual loss")] | None = placement(10.0)
    # Spans of steps, [first, last] counted from 1, whose batches are replaced by newly drawn ones. A step that is named
    # twice takes a further new batch.
    skip_steps: list[list[int]] = recorded(list)
    # Steps between checkpoints.
    save_every_n_steps: PositiveInt = recorded(100)
    # Number of newest checkpoints to keep.
    keep_checkpoints: PositiveInt = recorded(2)
    # Whether the checkpoint with the lowest validation loss is kept as well, among those whose step was validated.
    keep_best: bool = recorded(True)
    # Whether training continues while a checkpoint is written.
    async_save: bool = placement(True)
    # Steps between validations.
    val_every_n_steps: PositiveInt = recorded(100)
    # Global batches per validation, always the same ones; null: the whole validation set once.
    val_batches: PositiveInt | None = recorded(8)
    # Steps between lines of metrics.
    log_every_n_steps: PositiveInt = recorded(10)
    # Logging to Weights & Biases; null: none.
    wandb: WeightsAndBiases | None = placement(None)
    # Logging to MLflow; null: none.
    mlflow: Mlflow | None = placement(None)
    # Processes per rank that load data; 0: the training process loads it itself.
    num_workers: NonNegativeInt = placement(2)
