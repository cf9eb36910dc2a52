"""The time of an optimizer step and of a forward pass, from shapes, the parallel layout and the GPU's figures.

A roofline model: each operation takes the time of its arithmetic or of its memory traffic, whichever is longer;
collectives take the time of their bytes on the slowest link; what overlaps in Megatron overlaps here. Constants, here
and in `launch.planning.machine`, are the only assumptions. docs/planning.md compares the model with published runs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields

from launch.planning.machine import BF16_BYTES, COLLECTIVE_SECONDS, FP32_BYTES, KERNEL_SECONDS, Machine
from launch.planning.memory import Models
from prune_distill.model.model_size import rank_experts, rank_parameters
from prune_distill.schema import DistillConfig, Family, Loss, LossImplementation, Parallel, Recompute, Shape, Training
from prune_distill.schema.phases import training_phases

# FlashAttention-3 with causal masks, heads of 128, bf16 (arXiv 2407.08608, figures 5 and 6): 550 to 650 TFLOP/s
# forward and 400 to 550 backward for sequences of 4,096 and more.
ATTENTION_SHARE = {"forward": 0.55, "backward": 0.45}
# A backward pass computes the scores again: five products to the forward pass's two (FlashAttention, arXiv 2205.14135).
ATTENTION_BACKWARD = 2.5
# Bytes that the optimizer reads and writes for each parameter of its share: gradient, master weight and two moments
# are read (16), the last three and the bf16 weight written (14), and the gradient is read once more for its norm (4).
OPTIMIZER_BYTES = 34
# Bytes that are read and written for each logit of the student and, with a live teacher, of both models together, as
# counted in prune_distill/distillation/loss_chunk.py and loss_terms.py: for each model the product in fp32 (4), maximum
# and subtraction (12), exponentials and their sum (12); then differences, gradient, its bf16 copy.
LOSS_BYTES = {"ce": 50, "cached": 50, "live": 94}
# The same of the kernels in triton_chunk.py: logits written once and read twice, the bf16 gradient written.
TRITON_LOSS_BYTES = {"ce": 14, "live": 26}


@dataclass(frozen=True)
class Seconds:
    """Seconds on one rank, by what takes them.

    Attributes:
        products: matrix products, of both models and their output layers.
        attention: scores and their use with the values.
        elementwise: norms, rotations, activations and residual sums, which are limited by the memory's bandwidth.
        loss: the loss's work on logits, and its sums of the output weight's gradient.
        tensor_parallel, context_parallel, expert_parallel, data_parallel: exchanges that nothing hides.
        pipeline: waiting for other pipeline stages, and sending to them.
        optimizer: its update of the weights.
    """

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    loss: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    data_parallel: float = 0.0
    pipeline: float = 0.0
    optimizer: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(**{name: value + getattr(other, name) for name, value in self.parts.items()})

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(**{name: value * factor for name, value in self.parts.items()})


@dataclass(frozen=True)
class Pass:
    """Forward and backward passes of one model over a micro batch, on the ranks of a layout.

    Attributes:
        tokens: of the micro batch on one context-parallel rank.
        seq_length: of a whole sequence.
        fp8: whether the products of the layers are computed in FP8.
    """

    shape: Shape
    family: Family
    parallel: Parallel
    machine: Machine
    tokens: int
    seq_length: int
    fp8: bool = False

    @property
    def tensor(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def shared_tokens(self) -> float:
        """Tokens between the tensor-parallel parts of a layer on one rank."""
        return self.tokens / (self.tensor if self.parallel.sequence_parallel else 1)

    def layer_forward(self) -> Seconds:
        products = sum(
            count * self.machine.product(rows, inner, columns, fp8=self.fp8)
            for rows, inner, columns, count in self._products()
        )
        return Seconds(
            products=products + self._casts(),
            attention=self._attention("forward", 1.0),
            elementwise=self.machine.elementwise(BF16_BYTES * self._elements((10, 3, 4)), 12),
            tensor_parallel=4 * self._tensor_collective(),
            context_parallel=self._context(1),
            expert_parallel=2 * self._expert_exchange(),
        )

    def layer_backward(self) -> Seconds:
        """Gradients of the inputs and of the weights; the latter are summed in fp32 (gradient accumulation fusion)."""
        products = sum(
            count
            * (
                self.machine.product(rows, columns, inner, fp8=self.fp8)
                + self.machine.product(inner, rows, columns, 2 * FP32_BYTES, fp8=self.fp8)
            )
            for rows, inner, columns, count in self._products()
        )
        return Seconds(
            products=products + self._casts(),
            attention=self._attention("backward", ATTENTION_BACKWARD),
            elementwise=self.machine.elementwise(BF16_BYTES * self._elements((12, 5, 5)), 18),
            # The inputs of the column-parallel layers are gathered again while their gradients are computed
            # (megatron/core/tensor_parallel/layers.py:LinearWithGradAccumulationAndAsyncCommunication).
            tensor_parallel=4 * self._tensor_collective(),
            context_parallel=self._context(2),
            expert_parallel=2 * self._expert_exchange(),
        )

    def head_forward(self) -> Seconds:
        """The output layer: its product in bf16, and the gathering of its inputs."""
        columns = self.shape.vocab_size / self.tensor
        product = self.machine.product(self.tokens, self.shape.hidden_size, columns, FP32_BYTES + 2 * BF16_BYTES)
        return Seconds(products=product, tensor_parallel=self._tensor_collective())

    def head_backward(self) -> Seconds:
        columns, hidden = self.shape.vocab_size / self.tensor, self.shape.hidden_size
        products = self.machine.product(self.tokens, columns, hidden) + self.machine.product(
            hidden, self.tokens, columns
        )
        return Seconds(products=products, tensor_parallel=self._tensor_collective())

    def _products(self) -> list[tuple[float, float, float, int]]:
        """Rows, inner size, columns and count of a layer's products on one rank."""
        shape, hidden = self.shape, self.shape.hidden_size
        queries = shape.num_attention_heads * shape.kv_channels
        keys = shape.num_query_groups * shape.kv_channels
        attention = [
            (self.tokens, hidden, (queries + 2 * keys) / self.tensor, 1),
            (self.tokens, queries / self.tensor, hidden, 1),
        ]
        factors = 2 if self.family.traits.gated_mlp else 1
        if not shape.num_moe_experts:
            channels = shape.ffn_hidden_size / self.tensor
            return [*attention, (self.tokens, hidden, factors * channels, 1), (self.tokens, channels, hidden, 1)]
        # Routing is balanced: as many tokens come to a rank's experts as it sends to others'.
        experts = shape.num_moe_experts // self.parallel.expert_model_parallel_size
        rows = self._routed_tokens() / experts
        channels = shape.moe_ffn_hidden_size or 0
        return [
            *attention,
            (self.shared_tokens, hidden, shape.num_moe_experts, 1),
            (rows, hidden, factors * channels, experts),
            (rows, channels, hidden, experts),
        ]

    def _routed_tokens(self) -> float:
        return self.shared_tokens * (self.shape.moe_router_topk or 0)

    def _elements(self, counts: tuple[int, int, int]) -> float:
        """Elements that a layer's elementwise kernels read and write.

        Args:
            counts: how often the hidden states, the channels of the MLP, and queries and keys are read or written.
        """
        shape, (hidden, channels, heads) = self.shape, counts
        rotated = (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels
        if shape.num_moe_experts:
            # The copies of tokens for their experts are written in the experts' order, and summed again.
            routed = self._routed_tokens() * (channels * (shape.moe_ffn_hidden_size or 0) + 4 * shape.hidden_size)
        else:
            routed = self.tokens * channels * shape.ffn_hidden_size / self.tensor
        return self.shared_tokens * hidden * shape.hidden_size + self.tokens * heads * rotated / self.tensor + routed

    def _casts(self) -> float:
        """FP8: each product's input is read in bf16, and written in FP8 as it is and transposed."""
        if not self.fp8:
            return 0.0
        elements = sum(rows * inner * count for rows, inner, _, count in self._products())
        return self.machine.elementwise(elements * (BF16_BYTES + 2), 2 * len(self._products()))

    def _attention(self, direction: str, products: float) -> float:
        """Causal attention on one rank: the masked half is left out."""
        channels = self.shape.num_attention_heads * self.shape.kv_channels / self.tensor
        flops = 2 * self.seq_length * channels * self.tokens * products
        return flops / (ATTENTION_SHARE[direction] * self.machine.flops) + KERNEL_SECONDS

    def _tensor_collective(self) -> float:
        """One all-gather or reduce-scatter of the hidden states; without sequence parallelism, half an all-reduce."""
        return self.machine.gather(BF16_BYTES * self.tokens * self.shape.hidden_size, self.tensor, 1)

    def _context(self, times: int) -> float:
        """What is left of the ring exchange of keys and values where attention takes less time."""
        ranks = self.parallel.context_parallel_size
        if ranks == 1:
            return 0.0
        keys = 2 * self.shape.num_query_groups * self.shape.kv_channels / self.tensor
        sent = times * (ranks - 1) * BF16_BYTES * self.tokens * keys / self.machine.bandwidth(ranks, self.tensor)
        direction, products = ("forward", 1.0) if times == 1 else ("backward", ATTENTION_BACKWARD)
        # The first of the ring's steps works on the rank's own keys; each of the others hides the next step's exchange.
        hidden = self._attention(direction, products) * (ranks - 1) / ranks
        return max(0.0, sent - hidden) + (ranks - 1) * COLLECTIVE_SECONDS

    def _expert_exchange(self) -> float:
        size = BF16_BYTES * self._routed_tokens() * self.shape.hidden_size
        return self.machine.exchange(size, self.parallel.expert_model_parallel_size)


def training_seconds(training: Training, loss: Loss, models: Models, machine: Machine, ranks: int) -> float:
    """Seconds of all steps of a training, with the sizes of each phase; see `step_seconds`."""
    total = 0.0
    for phase in training_phases(training):
        sizes = {name: getattr(phase, name) for name in ("seq_length", "global_batch_size", "micro_batch_size")}
        step = dataclasses.replace(training, phases=None, **sizes)
        total += phase.steps * step_seconds(step, loss, models, machine, ranks).total
    return total


def step_seconds(training: Training, loss: Loss, models: Models, machine: Machine, ranks: int) -> Seconds:
    """Seconds of an optimizer step of a training without phases, or of a phase's sizes.

    Args:
        ranks: all of them; a multiple of the layout's tensor x pipeline x context parallel ranks.
    """
    parallel = training.parallel
    stages = parallel.pipeline_model_parallel_size
    replicas = ranks // (parallel.tensor_model_parallel_size * stages * parallel.context_parallel_size)
    micro_batches = training.global_batch_size // (training.micro_batch_size * replicas)
    student, teacher = _passes(training, models, machine)
    forward = [_stage_forward(training, loss, student, teacher, stage) for stage in range(stages)]
    backward = [_stage_backward(training, loss, student, stage) for stage in range(stages)]
    both = [first + second for first, second in zip(forward, backward, strict=True)]
    slowest = max(range(stages), key=lambda stage: both[stage].total)
    sent = _sends(training, models, machine, ranks) if stages > 1 else 0.0
    # 1F1B: one micro batch goes through all stages, and the others follow at the pace of the slowest stage.
    waiting = sum(stage.total for stage in both) - both[slowest].total
    pipeline = waiting + (micro_batches + stages - 1) * sent
    data, optimizer = _update(training, models, machine, ranks, forward[slowest].total, backward[slowest].total)
    return both[slowest] * micro_batches + Seconds(pipeline=pipeline, data_parallel=data, optimizer=optimizer)


def forward_seconds(shape: Shape, family: Family, training: Training, machine: Machine) -> list[float]:
    """Seconds that each pipeline stage takes for a model's forward pass over one micro batch, logits included."""
    passes, _ = _passes(training, Models(family, shape, None), machine)
    stages = training.parallel.pipeline_model_parallel_size
    layers = passes.layer_forward().total * shape.num_layers / stages
    # What reads the logits is like a cross-entropy's forward pass.
    logits = machine.copy(LOSS_BYTES["ce"] * passes.tokens * shape.vocab_size / passes.tensor)
    head = passes.head_forward().total + logits
    return [layers + (head if stage == stages - 1 else 0.0) for stage in range(stages)]


def _passes(training: Training, models: Models, machine: Machine) -> tuple[Pass, Pass | None]:
    tokens = training.micro_batch_size * training.seq_length // training.parallel.context_parallel_size
    fp8, sizes = training.fp8 is not None, (tokens, training.seq_length)
    student = Pass(models.student, models.family, training.parallel, machine, *sizes, fp8)
    if models.teacher is None:
        return student, None
    teacher_fp8 = isinstance(training, DistillConfig) and training.teacher_fp8
    teacher = dataclasses.replace(student, shape=models.teacher, family=models.teacher_family, fp8=teacher_fp8)
    return student, teacher


def _stage_forward(training: Training, loss: Loss, student: Pass, teacher: Pass | None, stage: int) -> Seconds:
    stages = training.parallel.pipeline_model_parallel_size
    time = student.layer_forward() * (student.shape.num_layers / stages)
    if teacher is not None:
        time += teacher.layer_forward() * (teacher.shape.num_layers / stages)
    if stage == stages - 1:
        time += student.head_forward()
        if teacher is not None:
            time += teacher.head_forward()
        time += Seconds(loss=_loss(training, loss, student, live=teacher is not None))
    return time


def _stage_backward(training: Training, loss: Loss, student: Pass, stage: int) -> Seconds:
    stages = training.parallel.pipeline_model_parallel_size
    layer = student.layer_backward()
    if training.recompute is Recompute.full:
        layer += student.layer_forward()
    elif training.recompute is Recompute.selective:
        layer += Seconds(attention=student.layer_forward().attention)
    time = layer * (student.shape.num_layers / stages)
    return time + student.head_backward() if stage == stages - 1 else time


def _loss(training: Training, loss: Loss, student: Pass, live: bool) -> float:
    """The loss's own memory traffic on one rank, products left out."""
    machine, tokens = student.machine, student.tokens
    columns = student.shape.vocab_size / student.tensor
    kind = "ce" if loss is Loss.ce else ("live" if live else "cached")
    if not isinstance(training, DistillConfig):
        return machine.copy(LOSS_BYTES[kind] * tokens * columns)
    triton = training.kd.implementation is LossImplementation.triton
    logits = machine.copy((TRITON_LOSS_BYTES if triton else LOSS_BYTES)[kind] * tokens * columns)
    # Of every chunk the output weight's gradient is written in fp32, read, and added to the sum. Newer versions of
    # PyTorch do it in one pass (`products.add_product`).
    chunks = -(-tokens // min(training.kd.chunk_tokens, tokens))
    gradient = machine.copy(4 * FP32_BYTES * columns * student.shape.hidden_size)
    sums = 2 * COLLECTIVE_SECONDS if student.tensor > 1 else 0.0
    return logits + chunks * (gradient + sums + 20 * KERNEL_SECONDS)


def _sends(training: Training, models: Models, machine: Machine, ranks: int) -> float:
    """What a pipeline stage hands on for a micro batch, both models' hidden states, and the gradient that it gets."""
    parallel = training.parallel
    stride = ranks // parallel.pipeline_model_parallel_size
    shared = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    tokens = training.micro_batch_size * training.seq_length / parallel.context_parallel_size / shared
    hidden = 2 * models.student.hidden_size + (models.teacher.hidden_size if models.teacher else 0)
    return BF16_BYTES * tokens * hidden / machine.bandwidth(2, stride) + COLLECTIVE_SECONDS


def _update(
    training: Training, models: Models, machine: Machine, ranks: int, forward: float, backward: float
) -> tuple[float, float]:
    """The exchange of gradients and parameters that nothing hides, and the optimizer's own work, on the first stage.

    Gradients are reduced during the backward pass of the last micro batch, and parameters are gathered during the
    forward pass of the first.
    """
    parallel = training.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    experts_over = parallel.expert_model_parallel_size
    held = rank_parameters(models.student, models.family, tensor, stages, 0, experts_over)
    experts = rank_experts(models.student, models.family, stages, experts_over)
    # Experts have replicas of their own.
    groups = [
        (held - experts, ranks // (tensor * stages), tensor),
        (experts, ranks // (stages * experts_over), experts_over),
    ]
    distributed = training.use_distributed_optimizer
    reduced = sum(
        machine.gather(FP32_BYTES * size, count, stride) * (1 if distributed else 2) for size, count, stride in groups
    )
    gathered = sum(machine.gather(BF16_BYTES * size, count, stride) for size, count, stride in groups if distributed)
    exposed = max(0.0, reduced - (backward if training.overlap_grad_reduce else 0.0)) + max(
        0.0, gathered - (forward if training.overlap_param_gather else 0.0)
    )
    updated = sum(size / (count if distributed else 1) for size, count, _ in groups)
    optimizer = machine.copy(OPTIMIZER_BYTES * updated + FP32_BYTES * held) + 100 * KERNEL_SECONDS
    return exposed, optimizer
