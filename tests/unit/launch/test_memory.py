"""The memory of a rank by part, compared with manual sums."""

from __future__ import annotations

import dataclasses

import pytest

from launch.planning.memory import Memory, Models, cached_logits_memory, prune_memory, training_memory
from prune_distill.model.model_size import parameters
from prune_distill.schema import (
    DistillConfig,
    Family,
    Fp8,
    KdConfig,
    Loss,
    LossImplementation,
    Parallel,
    Precision,
    PruneConfig,
    Recompute,
    Shape,
    TeacherConfig,
    Training,
)
from prune_distill.units import GIB

TEACHER = Shape(4, 8, 16, 2, 1, 4, 32, 64, False)
STUDENT = dataclasses.replace(TEACHER, num_layers=2)
EP_OF_2 = Parallel(expert_model_parallel_size=2)
QWEN3 = Models(Family.qwen3, STUDENT, TEACHER)
# Parameters: 600 a layer (test_model_size.py), 520 in embeddings and the final norm.
STUDENT_PARAMS, TEACHER_PARAMS = 1720, 2920
TRAINING = Training(
    max_steps=1, seq_length=16, global_batch_size=8, micro_batch_size=1, precision=Precision.bf16, parallel=Parallel()
)
# Elements a token that a layer keeps: norms' inputs and outputs 4 x 8; QKV 16, rotated q and k 12, the output 8 and the
# QK-norms' copies of q and k 12; FFN 3 x 16.
LAYER = 32 + 48 + 48
NORM = 2 * 8


def one(training: Training, ranks: int = 1, models: Models = QWEN3, loss: Loss = Loss.kd) -> Memory:
    (memory,) = training_memory(training, loss, models, ranks)
    return memory


def test_data_parallelism_only_shards_the_optimizer() -> None:
    assert one(TRAINING, ranks=2) == Memory(
        weights=2 * STUDENT_PARAMS,
        gradients=4 * STUDENT_PARAMS,
        optimizer=12 * STUDENT_PARAMS // 2,
        teacher=2 * TEACHER_PARAMS,
        activations=2 * 16 * (2 * LAYER + NORM),
        # Two logits in bf16 and seven fp32 tensors.
        loss=16 * 32 * (2 * 2 + 7 * 4),
    )
    whole = dataclasses.replace(TRAINING, use_distributed_optimizer=False)
    assert one(whole, ranks=2) == dataclasses.replace(one(TRAINING, ranks=2), optimizer=12 * STUDENT_PARAMS)


def test_fp32_has_no_master_weights() -> None:
    memory = one(dataclasses.replace(TRAINING, precision=Precision.fp32))
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        4 * STUDENT_PARAMS,
        4 * STUDENT_PARAMS,
        8 * STUDENT_PARAMS,
    )
    assert memory.activations == 2 * one(TRAINING).activations
    assert memory.loss == 16 * 32 * (2 * 4 + 7 * 4)


@pytest.mark.parametrize(("sequence_parallel", "norms"), [(True, 16), (False, 32)])
def test_tensor_parallelism_shards_all_but_norms(sequence_parallel: bool, norms: int) -> None:
    memory = one(dataclasses.replace(TRAINING, parallel=Parallel(2, 1, 1, sequence_parallel)), ranks=2)
    rank_parameters = 2 * (576 // 2 + 24) + 520 // 2 + 4
    assert memory.weights == 2 * rank_parameters
    assert memory.optimizer == 12 * rank_parameters
    assert memory.activations == 2 * 16 * (2 * (norms + (48 + 48) // 2) + NORM * norms // 32)
    # One fp32 tensor more, of half the vocabulary.
    assert memory.loss == 16 * 16 * (2 * 2 + 8 * 4)


def test_context_parallelism_shards_tokens_and_optimizer() -> None:
    memory, whole = one(dataclasses.replace(TRAINING, parallel=Parallel(1, 1, 2)), ranks=2), one(TRAINING)
    assert (memory.activations * 2, memory.loss * 2) == (whole.activations, whole.loss)
    assert (memory.weights, memory.optimizer * 2) == (whole.weights, whole.optimizer)


def test_pipeline_stages_differ() -> None:
    first, last = training_memory(dataclasses.replace(TRAINING, parallel=Parallel(1, 2, 1)), Loss.kd, QWEN3, 2)
    assert (first.weights, last.weights) == (2 * (600 + 256), 2 * (600 + 8 + 256))
    assert (first.loss, last.loss) == (0, 16 * 32 * 32)
    # Two micro batches are under way in the first, each with the 8 + 8 that it hands on; no loss covers the gradients
    # of the MLP there (2 x 16 + 8).
    assert first.activations == 2 * 16 * (2 * (LAYER + 16) + 40)
    assert last.activations == 2 * 16 * (LAYER + 2 * 16 + NORM)
    # With one micro batch a step there is no second one.
    single = dataclasses.replace(TRAINING, parallel=Parallel(1, 2, 1), global_batch_size=1)
    assert training_memory(single, Loss.kd, QWEN3, 2)[0].activations == 2 * 16 * (LAYER + 16 + 40)


def test_recomputation() -> None:
    full = one(dataclasses.replace(TRAINING, recompute=Recompute.full))
    assert full.activations == 2 * 16 * (2 * 8 + NORM)
    # Attention without stored scores leaves `selective` nothing to save.
    assert one(dataclasses.replace(TRAINING, recompute=Recompute.selective)) == one(TRAINING)
    # With a small loss, the peak is at the recomputed layer.
    few = dataclasses.replace(STUDENT, vocab_size=2)
    small = one(
        dataclasses.replace(TRAINING, recompute=Recompute.full),
        models=Models(Family.qwen3, few, dataclasses.replace(TEACHER, vocab_size=2)),
    )
    assert small.activations + small.loss == 2 * 16 * (2 * 8 + NORM + LAYER + 40)


def test_llama_has_no_qk_norm() -> None:
    memory = one(TRAINING, models=Models(Family.llama, STUDENT, TEACHER))
    assert memory.activations == 2 * 16 * (2 * (32 + 36 + 48) + NORM)


def test_without_a_teacher() -> None:
    memory = one(TRAINING, models=Models(Family.qwen3, STUDENT, None), loss=Loss.ce)
    assert memory.teacher == 0
    assert memory.loss == 16 * 32 * (2 + 4)


def test_pruning() -> None:
    prune = PruneConfig(calibration_seq_length=16, micro_batch_size=2)
    memory = prune_memory(prune, TEACHER, Family.qwen3, 2)
    assert memory == Memory(weights=2 * TEACHER_PARAMS, activations=2 * 32 * LAYER, loss=32 * 32 * 6)
    prune.pipeline_model_parallel_size = 2
    assert prune_memory(prune, TEACHER, Family.qwen3, 2).weights == 2 * (2 * 600 + 8 + 256)
    prune.drop_layers = [2]
    assert prune_memory(prune, TEACHER, Family.qwen3, 2) == Memory(weights=2 * (2 * 600 + 8 + 256))


def test_the_reserve_is_added() -> None:
    memory = Memory(weights=50 * GIB, teacher=50 * GIB)
    assert memory.tensors == 100 * GIB
    assert memory.reserve == 7 * GIB
    assert memory.total == 107 * GIB


def test_the_chunked_loss_grows_with_the_chunk_and_not_with_the_tokens() -> None:
    distill = DistillConfig(**vars(TRAINING), kd=KdConfig(chunk_tokens=4))
    vocabulary, hidden = QWEN3.student.vocab_size, QWEN3.student.hidden_size
    # Student, teacher and their difference in fp32, the gradient in bf16 too; the weight's gradient in fp32.
    parts = 4 * vocabulary * (3 * 4 + 2) + vocabulary * hidden * 4
    assert one(distill).loss == parts + 2 * 16 * hidden
    twice = dataclasses.replace(distill, micro_batch_size=2 * distill.micro_batch_size)
    assert one(twice).loss == parts + 2 * 32 * hidden
    kernels = dataclasses.replace(distill, kd=KdConfig(chunk_tokens=4, implementation=LossImplementation.triton))
    assert one(kernels).loss == 4 * vocabulary * (2 * 4 + 2) + vocabulary * hidden * 4 + 2 * 16 * hidden
    # With a small chunk the most is needed when the gradient is added to Megatron's, where autograd gets one in bf16.
    small = dataclasses.replace(distill, kd=KdConfig(chunk_tokens=1))
    assert one(small).loss == max(vocabulary * 14, vocabulary * hidden * 2) + vocabulary * hidden * 4 + 2 * 16 * hidden
    upstream = dataclasses.replace(distill, kd=KdConfig(implementation=LossImplementation.upstream))
    assert one(upstream).loss == one(TRAINING).loss


def test_experts_and_their_optimizer_are_sharded() -> None:
    mixture = dataclasses.replace(STUDENT, num_moe_experts=4, moe_ffn_hidden_size=12, moe_router_topk=2)
    models = Models(Family.qwen3_moe, mixture, None)
    whole = one(TRAINING, models=models, loss=Loss.ce)
    half = one(dataclasses.replace(TRAINING, parallel=EP_OF_2), ranks=4, models=models, loss=Loss.ce)
    experts = 2 * 4 * 288
    rest = parameters(mixture, Family.qwen3_moe) - experts
    assert (whole.weights, whole.optimizer) == (2 * (rest + experts), 12 * (rest + experts))
    assert half.weights == 2 * (rest + experts // 2)
    # Four ranks have the rest, two have the same experts.
    assert half.optimizer == 12 * rest // 4 + 12 * (experts // 2) // 2
    # With balanced routing a rank's experts are sent as many tokens as it has: norms, attention, and of two experts the
    # token itself, gate, up and the down projection's input; four values of each expert's router.
    per_layer = 4 * 8 + 48 + 2 * (8 + 3 * 12) + 4 * 4
    assert half.activations == whole.activations
    assert whole.activations == 2 * 16 * (2 * per_layer + NORM)


def test_fp8_keeps_copies_of_weights_and_smaller_inputs() -> None:
    """Of 576 weights a layer in products; inputs of 8, 8 and 16 channels a token take one byte instead of two."""
    fp8 = dataclasses.replace(TRAINING, fp8=Fp8.hybrid)
    plain, student = one(TRAINING), one(fp8)
    assert student.weights == plain.weights + 2 * 2 * 576
    assert student.activations == 2 * 16 * (2 * (LAYER - 16) + NORM)
    assert (student.teacher, student.optimizer, student.loss) == (plain.teacher, plain.optimizer, plain.loss)
    both = one(DistillConfig(**vars(fp8), teacher_fp8=True))
    assert both.teacher == plain.teacher + 4 * 576
    assert both.weights == student.weights
    halves = one(dataclasses.replace(fp8, parallel=Parallel(2)), ranks=2)
    assert halves.weights - one(dataclasses.replace(TRAINING, parallel=Parallel(2)), ranks=2).weights == 2 * 2 * 288


def test_fp8_of_experts() -> None:
    mixture = dataclasses.replace(STUDENT, num_moe_experts=4, moe_ffn_hidden_size=12, moe_router_topk=2)
    models = Models(Family.qwen3_moe, mixture, None)
    plain, fp8 = (one(dataclasses.replace(TRAINING, fp8=fp8), 1, models, Loss.ce) for fp8 in (None, Fp8.blockwise))
    # Attention's 192 weights, and four experts of 288.
    assert fp8.weights == plain.weights + 2 * 2 * (192 + 4 * 288)
    # Half of one norm's output and of the inputs of two experts; the output before the router stays in bf16.
    saved = 2 * 16 * 2 * (8 + 2 * (8 + 12)) // 2
    # Gradients of gate and up in bf16 and as much in FP8, of what is sent, and of the layer; the loss covers a part.
    gradients = 2 * 16 * (2 * (2 * 2 * 12 + 2 * 8) + 8) - fp8.loss
    assert fp8.activations == plain.activations - saved + gradients


def test_cached_logits_of_a_teacher_in_fp8() -> None:
    distill = DistillConfig(**vars(TRAINING))
    plain, fp8 = (
        cached_logits_memory(
            TeacherConfig(), dataclasses.replace(distill, teacher_fp8=teacher_fp8), TEACHER, Family.qwen3
        )
        for teacher_fp8 in (False, True)
    )
    assert fp8.weights == plain.weights + 4 * 576
