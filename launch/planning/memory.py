"""What distillation and pruning keep in the memory of one rank, part by part, estimated from shapes alone.

The method is that of "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198, section 4:
count what each operation of a layer keeps for the backward pass) and, for weights and optimizer, of Megatron-LM's
training/theoretical_memory_usage.py. The paper's layer has as many key heads as query heads, a plain MLP, dropout and
stored attention scores: 34 + 5 a s / h bytes a token and hidden unit. `_layer_elements` counts ours: grouped-query
attention by a kernel that stores no scores, a gated MLP, no dropout. Some bytes a token (statistics of norms and
softmax) are left out. tests/integration/test_plan_memory.py compares with the tensors of real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from prune_distill.config.values import caching_layout
from prune_distill.model.model_size import rank_experts, rank_parameters, rank_product_weights
from prune_distill.model.student import runs_teacher, student_shape
from prune_distill.schema import (
    DistillConfig,
    Family,
    KdConfig,
    Loss,
    LossImplementation,
    Precision,
    PruneConfig,
    QuantFormat,
    Recompute,
    RunConfig,
    Shape,
    TeacherConfig,
    Training,
)
from prune_distill.schema.phases import phase_sizes
from prune_distill.units import GIB

FP32_BYTES = 4
# Adam's two moments (megatron/core/optimizer/__init__.py); in bf16 a master copy of the weights joins them.
MOMENTS = 2
# Assumptions, not measured: CUDA context, NCCL's buffers, cuBLAS and Transformer Engine workspaces; and what the
# allocator cannot use for being in pieces, as a share of what is allocated.
CONTEXT_BYTES = 2 * GIB
FRAGMENTATION = 0.05
# Tokens whose logits are worked on in fp32 at a time, and the copies that there are then: the logits, scaled, and what
# top-k sorts (prune_distill/distillation/teacher_forward.py).
TOP_K_CHUNK = 256
TOP_K_COPIES = 3
# FP8 copies of each weight of the layers' products, next to the weight in bf16, which Transformer Engine keeps from one
# micro batch to the next (transformer_engine/pytorch/module/base.py:get_weight_workspace): as it is and, for the
# gradient of the input, transposed (module/linear.py: columnwise_usage), which Blackwell does without
# (pytorch/utils.py:is_non_tn_fp8_gemm_supported). The teacher has no gradients.
FP8_COPIES_OF_STUDENT = 2
FP8_COPIES_OF_TEACHER = 1
# Values a token and expert that a router keeps: logits, scores, probabilities (megatron's transformer/moe/router.py).
ROUTER_ELEMENTS = 4


@dataclass(frozen=True)
class Models:
    """The models that a training run holds.

    Attributes:
        family: the student's.
        teacher: None where the run trains on the data alone.
        own_family: the teacher's, where it is a model of its own; None: the student's.
    """

    family: Family
    student: Shape
    teacher: Shape | None
    own_family: Family | None = None

    @property
    def teacher_family(self) -> Family:
        return self.own_family or self.family


def distilled_models(cfg: RunConfig) -> Models:
    """The student of the last distillation and, where it runs beside it, its teacher."""
    teacher = cfg.teacher_shape if cfg.distill.runs_teacher else None
    return Models(cfg.model.family, student_shape(cfg), teacher, cfg.teacher_family)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step.

    Attributes:
        weights: the model that is trained or calibrated, in the training precision, and its FP8 copies.
        gradients: the buffer that they are summed and reduced in, always fp32.
        optimizer: fp32 master weights and Adam's moments, this rank's share of them.
        teacher: its weights, and their FP8 copies.
        activations: what is kept for the backward pass, of all micro batches in flight.
        loss: both models' logits, whole or in chunks, the loss's own tensors of the vocabulary's size, and the
            gradient of the output weight where the loss makes it.
        reserve: an assumption; see CONTEXT_BYTES and FRAGMENTATION.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    activations: int = 0
    loss: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by attribute, without the reserve."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def tensors(self) -> int:
        return sum(self.parts.values())

    @property
    def reserve(self) -> int:
        return CONTEXT_BYTES + round(FRAGMENTATION * self.tensors)

    @property
    def total(self) -> int:
        return self.tensors + self.reserve


def fullest(memory: Sequence[Memory]) -> Memory:
    return max(memory, key=lambda rank: rank.total)


def training_memory(training: Training, loss: Loss, models: Models, ranks: int) -> list[Memory]:
    """The memory of a rank of each pipeline stage.

    Args:
        ranks: all of them; a multiple of the layout's tensor x pipeline x context parallel ranks.
    """
    # Each phase has the optimizer and the weights of the others: the fullest one counts.
    runs = [replace(training, **phase_sizes(training, phase)) for phase in training.phases or ()]
    return [
        fullest([_stage(run, loss, models, ranks, stage) for run in runs or [training]])
        for stage in range(_pipeline(training))
    ]


def _stage(training: Training, loss: Loss, models: Models, ranks: int, stage: int) -> Memory:
    parallel, stages = training.parallel, _pipeline(training)
    tensor = parallel.tensor_model_parallel_size
    # The optimizer's state is shared out over data- and context-parallel ranks
    # (megatron/core/optimizer/__init__.py:get_megatron_optimizer, with_context_parallel=True).
    replicas = ranks // (tensor * stages)
    experts_over = parallel.expert_model_parallel_size
    width = FP32_BYTES if training.precision is Precision.fp32 else 2
    student = rank_parameters(models.student, models.family, tensor, stages, stage, experts_over)
    experts = rank_experts(models.student, models.family, stages, experts_over)
    # Experts have optimizers of their own, shared out over the ranks that have the same ones
    # (megatron/core/optimizer/__init__.py:620).
    shares = (replicas, ranks // (stages * experts_over)) if training.use_distributed_optimizer else (1, 1)
    state = FP32_BYTES * (MOMENTS + (0 if width == FP32_BYTES else 1))
    teacher = fp8_student = fp8_teacher = 0
    if models.teacher is not None:
        teacher = rank_parameters(models.teacher, models.teacher_family, tensor, stages, stage, experts_over)
        student_ids, teacher_ids = models.student.vocab_size, models.teacher.vocab_size
        if stage == stages - 1 and (student_ids > teacher_ids or (tensor > 1 and student_ids < teacher_ids)):
            # Its output weight once more, in the student's slices (prune_distill/distillation/loss_chunk.py:
            # slice_rows).
            teacher += models.student.vocab_size // tensor * models.teacher.hidden_size
        if isinstance(training, DistillConfig) and training.teacher_fp8:
            fp8_teacher = rank_product_weights(models.teacher, models.teacher_family, tensor, stages, experts_over)
    if training.fp8 is not None:
        fp8_student = rank_product_weights(models.student, models.family, tensor, stages, experts_over)
    tokens = training.micro_batch_size * training.seq_length // parallel.context_parallel_size
    kept = _kept(training, models, ranks, stage, tokens) * width
    loss_memory = _loss(training, loss, models, tokens, width) if stage == stages - 1 else 0
    # The loss is behind when the backward pass comes to the layers: only the larger of the two counts.
    working = _working(training, models, tokens) * width
    return Memory(
        weights=width * student + FP8_COPIES_OF_STUDENT * fp8_student,
        gradients=FP32_BYTES * student,
        optimizer=state * (student - experts) // shares[0] + state * experts // shares[1],
        teacher=width * teacher + FP8_COPIES_OF_TEACHER * fp8_teacher,
        activations=kept + max(0, working - loss_memory),
        loss=loss_memory,
    )


def _loss(training: Training, loss: Loss, models: Models, tokens: int, width: int) -> int:
    """Bytes of the loss and of what it makes, on the last pipeline stage."""
    tensor = training.parallel.tensor_model_parallel_size
    vocabulary = models.student.vocab_size // tensor
    if not isinstance(training, DistillConfig) or training.kd.implementation is LossImplementation.upstream:
        return tokens * vocabulary * loss_bytes(loss, tensor, width)
    live = loss is Loss.kd and models.teacher is not None
    gathered = tokens * (models.student.hidden_size + (models.teacher.hidden_size if live and models.teacher else 0))
    chunk_tokens = min(training.kd.chunk_tokens, tokens)
    chunk = chunked_loss_bytes(training.kd, loss, live, chunk_tokens, vocabulary, width)
    if live and models.teacher and models.teacher.vocab_size < models.student.vocab_size:
        chunk += FP32_BYTES * chunk_tokens * vocabulary  # MassOutside
    output_weight = vocabulary * models.student.hidden_size
    return (
        # The output weight's gradient in fp32. The backward pass adds it to Megatron's buffer, when the chunk's buffers
        # are free, and returns a tensor of the weight's type that nobody reads.
        FP32_BYTES * output_weight
        + max(chunk, width * output_weight)
        + width * tokens * models.student.hidden_size  # the hidden states' gradient
        + (width * gathered if _sequence_share(training) > 1 else 0)
    )


def chunked_loss_bytes(kd: KdConfig, loss: Loss, live: bool, chunk: int, vocabulary: int, width: int) -> int:
    """Bytes of a chunk's `[chunk, V / tensor]` buffers in `prune_distill/distillation/loss_chunk.py`.

    In fp32 the student's logits; with a live teacher its logits, and their difference unless only the top k count;
    exponentials for the cross-entropy. In bf16 the gradient's copy. The kernels of `triton_chunk.py` need the logits
    and the gradient alone.
    """
    if kd.implementation is LossImplementation.triton:
        return chunk * vocabulary * ((2 if live else 1) * FP32_BYTES + width)
    buffers = 1
    if live:
        buffers += 1 if kd.top_k is not None else 2
    if loss is Loss.ce or kd.lm_weight:
        buffers += 1
    return chunk * vocabulary * (buffers * FP32_BYTES + (width if width < FP32_BYTES else 0))


def loss_bytes(loss: Loss, tensor: int, width: int) -> int:
    """Bytes an element of `[s, b, V / tensor]` that are alive at once when the loss is computed.

    For KD, of LogitsKLLoss.forward (nemo/collections/llm/modelopt/distill/loss.py:163, as in ModelOpt's
    modelopt/torch/distill/plugins/megatron.py:300), within `kl_div`: both models' logits, and in fp32 both divided by
    the temperature (kept by name), then
    - alone: log-softmax of the student, softmax of the teacher, and kl_div's two terms and their difference: 7;
    - tensor parallel: the student's exponentials (kept for the backward pass), both log-probabilities, and kl_div's
      exponential, difference and product: 8.
    For CE, of megatron/core/tensor_parallel/cross_entropy.py: the logits and, unless they are fp32 themselves, an fp32
    copy that becomes the softmax and then the gradient in place.
    """
    if loss is Loss.ce:
        return width if width == FP32_BYTES else width + FP32_BYTES
    return 2 * width + FP32_BYTES * (7 if tensor == 1 else 8)


def _kept(training: Training, models: Models, ranks: int, stage: int, tokens: int) -> int:
    """Elements kept for the backward pass at the fullest moment: all layers of the stage and micro batches in flight.

    The schedule is 1F1B without interleaving, which distillation requires: stage i of p starts with p - i micro
    batches (megatron/core/pipeline_parallel/schedules.py).
    """
    parallel, stages, student = training.parallel, _pipeline(training), models.student
    replicas = ranks // (parallel.tensor_model_parallel_size * stages * parallel.context_parallel_size)
    micro_batches = training.global_batch_size // (training.micro_batch_size * replicas)
    shared = _sequence_share(training)
    if training.recompute is Recompute.full:
        layer_elements = tokens * student.hidden_size // shared
    else:
        # `selective` recomputes the attention core, of which a kernel without stored scores keeps next to nothing.
        layer_elements = _layer_elements(training, models, tokens) + _rounded_elements(training, student, tokens)
    kept = student.num_layers // stages * layer_elements
    if stages > 1:
        # What the stages hand on, student and teacher side by side, and, where it is received, its gradient
        # (nemo/collections/llm/modelopt/distill/utils.py:223).
        both = student.hidden_size + (models.teacher.hidden_size if models.teacher else 0)
        kept += (1 if stage == 0 else 2) * tokens * both // shared
    if stage == stages - 1:
        kept += 2 * tokens * student.hidden_size // shared  # the final norm's input and output
    return kept * min(stages - stage, micro_batches)


def _layer_elements(training: Training, models: Models, tokens: int) -> int:
    """Elements that one layer keeps for its backward pass: what its operations read and have to read again.

    Both norms' inputs and outputs are cut over the tensor-parallel ranks under sequence parallelism, the rest by its
    heads and channels always. With FP8, inputs of products are kept in FP8, half an element each
    (transformer_engine/pytorch/module/linear.py:353, layernorm_linear.py:433), except attention's output, which
    attention keeps itself (megatron/core/transformer/attention.py:213).
    """
    shape, tensor = models.student, training.parallel.tensor_model_parallel_size
    spared = 0.5 if training.fp8 is not None else 0.0
    queries = shape.num_attention_heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    attention = (queries + 2 * keys) + (queries + keys) + queries  # QKV as projected; rotated q and k; the output
    if models.family.traits.qk_norm:
        # Their inputs: q and k lie in pieces, and Transformer Engine's RMSNorm makes copies in one (pytorch/ops/basic).
        attention += queries + keys
    share = _sequence_share(training)
    if shape.num_moe_experts:
        # The router keeps the output of the norm before it in bf16.
        norms = (4 - spared) * shape.hidden_size / share
        return round(tokens * (norms + attention // tensor + _expert_elements(shape, spared) / share))
    norms = (4 - 2 * spared) * shape.hidden_size / share
    # Gate and up, and the down projection's input: the fused SwiGLU (prune_distill/nemo/nemo_api.py) keeps its
    # input alone. Without a gate: what the squared ReLU keeps, its rectified input, and the down projection's input.
    channels = ((3 if models.family.traits.gated_mlp else 2) - spared) * shape.ffn_hidden_size
    return round(tokens * (norms + (attention + channels) / tensor))


def _expert_elements(shape: Shape, spared: float) -> float:
    """Elements a token that a mixture keeps for its backward pass, where routing is balanced: as many tokens come to a
    rank's experts as it sends to others'.

    Of each chosen expert the copy of the token that is its input, gate and up, and the down projection's input
    (megatron/core/fusions/fused_bias_swiglu.py:WeightedSwiGLUFunction); of the router its probabilities.

    Args:
        spared: the share of an input that FP8 saves.
    """
    chosen, experts = shape.moe_router_topk or 0, shape.num_moe_experts or 0
    inputs = shape.hidden_size + (shape.moe_ffn_hidden_size or 0)
    return chosen * ((1 - spared) * inputs + 2 * (shape.moe_ffn_hidden_size or 0)) + ROUTER_ELEMENTS * experts


def _working(training: Training, models: Models, tokens: int) -> int:
    """Elements that come and go in one layer's backward pass, and the layer itself where it is computed again.

    The most is in the MLP: the gradients of its output and of the two factors of the down projection's input. Of a
    mixture those of the chosen experts, and of what they are sent, before and after the exchange between ranks. With
    FP8, the former also in FP8, as they are and transposed: as much again as in bf16.
    """
    shape, tensor = models.student, training.parallel.tensor_model_parallel_size
    copies = 2 if training.fp8 is not None else 1
    gradients = tokens * (2 * copies * shape.ffn_hidden_size // tensor + shape.hidden_size)
    if shape.num_moe_experts:
        expert_elements = 2 * copies * (shape.moe_ffn_hidden_size or 0) + 2 * shape.hidden_size
        gradients = (
            tokens * ((shape.moe_router_topk or 0) * expert_elements + shape.hidden_size) // _sequence_share(training)
        )
    if training.recompute is not Recompute.full:
        return gradients
    return gradients + _layer_elements(training, models, tokens) + _rounded_elements(training, shape, tokens)


def _rounded_elements(training: Training, shape: Shape, tokens: int) -> int:
    """Elements that fake quantization (`distill.quantize`) adds to what a layer keeps for its backward pass.

    Linear layers keep their rounded factors (megatron/core/tensor_parallel/layers.py:
    LinearWithGradAccumulationAndAsyncCommunication), so each micro batch in flight keeps a copy of the weights. Rounded
    inputs replace the inputs, except for that of the output projection, which the attention kernel keeps too.
    """
    if not isinstance(training, DistillConfig) or training.quantize is None:
        return 0
    queries, keys = (heads * shape.kv_channels for heads in (shape.num_attention_heads, shape.num_query_groups))
    # As if there were a gate.
    weights = shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.ffn_hidden_size)
    inputs = 0 if training.quantize is QuantFormat.int4 else tokens * queries
    return (weights + inputs) // training.parallel.tensor_model_parallel_size


def prune_memory(prune: PruneConfig, teacher: Shape, family: Family, width: int) -> Memory:
    """The memory of pruning and of what goes before it, importance and search: of its fullest rank.

    The teacher runs forward: its weights, one layer's work, and the validation loss over whole logits. Where all that
    is dropped are layers that are named, it does not run.
    """
    stages, tensor = prune.pipeline_model_parallel_size, prune.tensor_model_parallel_size
    # Layers that cannot be shared out evenly: the fullest stage has those that an even share rounds up to.
    rounded_up = replace(teacher, num_layers=-(-teacher.num_layers // stages) * stages)
    weights = width * max(rank_parameters(rounded_up, family, tensor, stages, stage) for stage in range(stages))
    if not runs_teacher(prune):
        return Memory(weights=weights)
    tokens = prune.micro_batch_size * prune.calibration_seq_length
    layer = Training(seq_length=prune.calibration_seq_length, micro_batch_size=prune.micro_batch_size)
    return Memory(
        weights=weights,
        activations=width * _layer_elements(layer, Models(family, teacher, None), tokens),
        loss=tokens * teacher.vocab_size * loss_bytes(Loss.ce, 1, width),
    )


def cached_logits_memory(own: TeacherConfig, distill: DistillConfig, teacher: Shape, family: Family) -> Memory:
    """The memory of caching a teacher's logits, of the fullest rank: its forward pass in its layout, whole logits of a
    micro batch, and some of them in fp32 as well.

    Args:
        own: the teacher's settings, whose shape and family may be those of the model that is pruned.
    """
    layout = caching_settings(own, distill)
    parallel = layout.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    width = FP32_BYTES if distill.precision is Precision.fp32 else 2
    tokens = layout.micro_batch_size * distill.seq_length
    logits = width * tokens + TOP_K_COPIES * FP32_BYTES * min(TOP_K_CHUNK, distill.seq_length)
    weights = width * max(rank_parameters(teacher, family, tensor, stages, stage) for stage in range(stages))
    if distill.teacher_fp8:
        weights += FP8_COPIES_OF_TEACHER * rank_product_weights(teacher, family, tensor, stages)
    return Memory(
        weights=weights,
        activations=width * _layer_elements(layout, Models(family, teacher, None), tokens),
        loss=logits * teacher.vocab_size // tensor,
    )


def caching_settings(own: TeacherConfig, distill: DistillConfig) -> DistillConfig:
    """The distillation's settings with the layout and the precision in which a teacher's logits are cached."""
    parallel, micro_batch_size = caching_layout(own, distill)
    parallel = replace(parallel, context_parallel_size=1, sequence_parallel=False, expert_model_parallel_size=1)
    return replace(distill, parallel=parallel, micro_batch_size=micro_batch_size, fp8=distill.fp8_of_teacher)


def _pipeline(training: Training) -> int:
    return training.parallel.pipeline_model_parallel_size


def _sequence_share(training: Training) -> int:
    """Ranks that share the sequence between the tensor-parallel parts."""
    parallel = training.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
