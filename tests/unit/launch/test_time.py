"""The time model: published runs, sums by hand, and how it behaves where layouts and GPUs differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from launch.planning import machine as figures
from launch.planning import time
from launch.planning.machine import Machine, describe_machine
from launch.planning.memory import Models
from launch.planning.time import Pass, Seconds, forward_seconds, step_seconds
from prune_distill.config.composition import CONFIG_DIR
from prune_distill.model.flops import sequence_flops
from prune_distill.schema import (
    ClusterConfig,
    DistillConfig,
    Family,
    Fp8,
    Gpu,
    KdConfig,
    Loss,
    Parallel,
    Recompute,
    Shape,
    Training,
)

QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 128, 151_936, 40_960)
QWEN3_6B = dataclasses.replace(QWEN3_8B, num_layers=24)
LLAMA3_8B = Shape(32, 4096, 14336, 32, 8, 128, 128_256, 131_072)
LLAMA3_70B = Shape(80, 8192, 28672, 64, 8, 128, 128_256, 131_072)
QWEN3_30B_A3B = Shape(
    48, 2048, 6144, 32, 4, 128, 151_936, 40_960, num_moe_experts=128, moe_ffn_hidden_size=768, moe_router_topk=8
)
BF16, FP8 = None, Fp8.hybrid


def gpu(name: str) -> Gpu:
    return Gpu(**yaml.safe_load((CONFIG_DIR / "cluster" / "gpu" / f"{name}.yaml").read_text()))


def machine(name: str = "h100_sxm", nodes: int = 1, devices: int = 8) -> Machine:
    found = describe_machine(ClusterConfig(name="x", nodes=nodes, devices_per_node=devices, gpu=gpu(name)))
    assert found is not None
    return found


def training(seq_length: int, batch: int, micro: int, tp: int = 1, pp: int = 1, ep: int = 1) -> Training:
    return Training(
        max_steps=1,
        seq_length=seq_length,
        global_batch_size=batch,
        micro_batch_size=micro,
        parallel=Parallel(tp, pp, expert_model_parallel_size=ep),
    )


def distillation(micro: int = 2, **parallel: Any) -> DistillConfig:
    return DistillConfig(
        max_steps=1,
        seq_length=4096,
        global_batch_size=768,
        micro_batch_size=micro,
        parallel=Parallel(**parallel),
        kd=KdConfig(chunk_tokens=1024),
    )


def speed(run: Training, shape: Shape, family: Family, at: Machine, ranks: int, fp8: Fp8 | None) -> float:
    """Tokens a second and GPU of a pretraining."""
    run = dataclasses.replace(run, fp8=fp8)
    seconds = step_seconds(run, Loss.ce, Models(family, shape, None), at, ranks).total
    return run.global_batch_size * run.seq_length / seconds / ranks


def kd_step(run: DistillConfig, ranks: int = 8) -> Seconds:
    return step_seconds(run, Loss.kd, Models(Family.qwen3, QWEN3_6B, QWEN3_8B), machine(), ranks)


# Tokens a second and GPU, published in NVIDIA-NeMo/Megatron-Bridge: docs/performance-summary.md (25.11 container),
# docs/performance-summary-archive.md (26.02) and examples/model_verification_cards/qwen3-8b/card.yaml.
@pytest.mark.parametrize(
    ("published", "run", "shape", "family", "at", "ranks", "fp8", "ratio"),
    [
        # Those that the constants are fitted to.
        (10_456, training(4096, 1024, 1), QWEN3_8B, Family.qwen3, machine(nodes=2), 16, BF16, (0.95, 1.05)),
        (14_451, training(8192, 128, 1), LLAMA3_8B, Family.llama, machine(), 8, FP8, (0.95, 1.05)),
        # Fine-tuning at TP 4, of sequences of 8,192 tokens packed from documents of about 2,000.
        (8_083, training(2048, 32, 4, tp=4), QWEN3_8B, Family.qwen3, machine(devices=4), 4, BF16, (0.85, 1.15)),
        (30_624, training(8192, 128, 2), LLAMA3_8B, Family.llama, machine("b200"), 8, FP8, (0.85, 1.15)),
        # This run overlaps tensor-parallel collectives with products and interleaves pipeline stages, which ours don't.
        (1_621, training(8192, 256, 1, tp=4, pp=8), LLAMA3_70B, Family.llama, machine(nodes=8), 64, FP8, (0.75, 1.0)),
        # Mixtures stay far below the estimate, and the plan says so.
        (
            5_113,
            training(4096, 1024, 1, pp=2, ep=8),
            QWEN3_30B_A3B,
            Family.qwen3_moe,
            machine(nodes=2),
            16,
            FP8,
            (2.0, 2.5),
        ),
    ],
    ids=["qwen3_8b", "llama3_8b", "qwen3_8b_tp4", "llama3_8b_b200", "llama3_70b", "qwen3_30b_a3b"],
)
def test_published_runs(
    published: float,
    run: Training,
    shape: Shape,
    family: Family,
    at: Machine,
    ranks: int,
    fp8: Fp8 | None,
    ratio: tuple[float, float],
) -> None:
    low, high = ratio
    assert low <= speed(run, shape, family, at, ranks, fp8) / published <= high


def test_the_published_layout_against_two_tensor_parallel_ranks() -> None:
    """By hand, for 8,192 tokens on eight H100s: products 86 ms at 600 TFLOP/s; collectives 61 ms at TP 8, 9 ms at TP 2.

    The estimate may differ by a fifth: it knows that small products are slower, and the collectives of the loss.
    """
    eight, two = (
        kd_step(distillation(tensor_model_parallel_size=8)),
        kd_step(distillation(tensor_model_parallel_size=2)),
    )
    share = 8192 / (768 * 4096)
    assert eight.products * share == pytest.approx(0.086, rel=0.2)
    assert two.products * share == pytest.approx(0.086, rel=0.2)
    assert eight.tensor_parallel * share == pytest.approx(0.061, rel=0.2)
    assert two.tensor_parallel * share == pytest.approx(0.009, rel=0.2)
    assert two.total / eight.total == pytest.approx((86 + 9) / (86 + 61), rel=0.2)


def test_a_large_product_by_hand() -> None:
    at = Machine(flops=1e15, fp8_flops=2e15, memory=1e12, link=1e11, network=None, devices=8)
    seconds = at.product(8192, 4096, 8192)
    assert seconds == pytest.approx(2 * 8192 * 4096 * 8192 / (figures.PRODUCT_SHARE * 1e15) + figures.PRODUCT_SECONDS)
    in_fp8 = at.product(8192, 4096, 8192, fp8=True)
    assert in_fp8 - figures.PRODUCT_SECONDS == pytest.approx(
        2 * 8192 * 4096 * 8192 / (figures.FP8_PRODUCT_SHARE * 2e15)
    )
    # A few rows: the weight is read once.
    few = at.product(8, 4096, 8192)
    assert few == pytest.approx(
        2 * (8 * 4096 + 4096 * 8192 + 8 * 8192) / (figures.MEMORY_SHARE * 1e12) + figures.PRODUCT_SECONDS
    )


def test_the_efficiency_of_products_falls_with_their_size() -> None:
    at = machine()
    rates = [2 * 4096 * 4096 * columns / at.product(4096, 4096, columns) for columns in (512, 2048, 12288)]
    assert rates == sorted(rates)
    assert rates[0] < 0.9 * rates[-1]


def test_collectives_by_hand() -> None:
    one, two = machine(), machine(nodes=2)
    assert one.gather(450e9, 1, 1) == 0.0
    assert one.gather(450e9, 8, 1) == pytest.approx(7 / 8 / figures.LINK_SHARE, rel=1e-3)
    # A ring over both nodes uses the network card of each of its ranks in a node.
    assert two.bandwidth(16, 1) == pytest.approx(min(450e9 * figures.LINK_SHARE, 8 * 50e9 * figures.NETWORK_SHARE))
    assert two.bandwidth(2, 8) == pytest.approx(50e9 * figures.NETWORK_SHARE)
    assert two.bandwidth(8, 1) == one.bandwidth(8, 1)
    # Of an exchange over both nodes, eight sixteenths leave the node.
    assert two.exchange(1e9, 16) == pytest.approx(
        1e9 * 7 / 16 / (450e9 * figures.LINK_SHARE)
        + 1e9 * 8 / 16 / (50e9 * figures.NETWORK_SHARE)
        + figures.COLLECTIVE_SECONDS
    )


def test_attention_by_hand() -> None:
    one = Pass(QWEN3_8B, Family.qwen3, Parallel(), machine(), tokens=4096, seq_length=4096)
    # Causal: half of 4 x 4096 x 4096 x 4096 FLOP.
    assert one.layer_forward().attention == pytest.approx(
        2 * 4096**3 / (time.ATTENTION_SHARE["forward"] * 989.4e12) + figures.KERNEL_SECONDS
    )
    halves = dataclasses.replace(one, parallel=Parallel(tensor_model_parallel_size=2)).layer_forward().attention
    assert halves - figures.KERNEL_SECONDS == pytest.approx(
        (one.layer_forward().attention - figures.KERNEL_SECONDS) / 2
    )


def test_the_products_of_a_layer_by_hand() -> None:
    """Tokens, inner size and columns of QKV, the attention's output, gate and up, and the down projection."""
    one = Pass(QWEN3_8B, Family.qwen3, Parallel(), machine(), tokens=2048, seq_length=4096)
    layer = [
        (2048, 4096, 4096 + 2 * 1024, 1),
        (2048, 4096, 4096, 1),
        (2048, 4096, 2 * 12288, 1),
        (2048, 12288, 4096, 1),
    ]
    assert one._products() == layer
    halves = dataclasses.replace(one, parallel=Parallel(tensor_model_parallel_size=2))
    assert halves._products() == [
        *((2048, 4096, 3072, 1), (2048, 2048, 4096, 1), (2048, 4096, 12288, 1), (2048, 6144, 4096, 1))
    ]
    # Of 128 experts each of 8 ranks has 16, to which 8 x 2,048 tokens come.
    experts = Pass(QWEN3_30B_A3B, Family.qwen3_moe, Parallel(expert_model_parallel_size=8), machine(), 2048, 4096)
    assert experts._products()[2:] == [(2048, 2048, 128, 1), (1024, 2048, 2 * 768, 16), (1024, 768, 2048, 16)]


def test_a_forward_pass_ends_with_the_logits_and_what_reads_them() -> None:
    run, at = training(4096, 8, 1, pp=2), machine()
    first, last = forward_seconds(QWEN3_8B, Family.qwen3, run, at)
    one = Pass(QWEN3_8B, Family.qwen3, run.parallel, at, 4096, 4096)
    assert first == pytest.approx(18 * one.layer_forward().total)
    read = at.copy(time.LOSS_BYTES["ce"] * 4096 * 151_936)
    assert last - first == pytest.approx(one.head_forward().total + read)


def test_products_count_the_flops_of_the_models() -> None:
    """Products and attention at the peak itself: the FLOP that the rest of the plan counts."""
    run, at = distillation(micro=1), dataclasses.replace(machine(), memory=1e20, link=1e20)
    step = step_seconds(run, Loss.kd, Models(Family.qwen3, QWEN3_6B, QWEN3_8B), at, 8)
    flops = sequence_flops(4096, Recompute.none, Loss.kd, Family.qwen3, QWEN3_6B, QWEN3_8B).total
    attention = step.attention * time.ATTENTION_SHARE["forward"]
    counted = (step.products * figures.PRODUCT_SHARE + attention) * 8 * 989.4e12 / (768 * 4096)
    # The start of each product is no FLOP; attention's backward pass computes the scores again, at another share.
    assert counted == pytest.approx(flops, rel=0.06)


def test_a_pipeline_waits_once_a_step() -> None:
    step = {
        batch: step_seconds(training(4096, batch, 1, pp=4), Loss.ce, Models(Family.qwen3, QWEN3_8B, None), machine(), 8)
        for batch in (8, 16)
    }
    # Two data-parallel replicas: 4 and 8 micro batches.
    assert step[16].products == pytest.approx(2 * step[8].products)
    sends = step[16].pipeline - step[8].pipeline
    assert 0 < sends < 0.2 * step[8].pipeline
    assert step[8].pipeline > 2 * step[8].total / (4 + 3) * 0.7


def test_recomputation_costs_a_forward_pass() -> None:
    plain = kd_step(distillation(tensor_model_parallel_size=2))
    full = kd_step(dataclasses.replace(distillation(tensor_model_parallel_size=2), recompute=Recompute.full))
    selective = kd_step(dataclasses.replace(distillation(tensor_model_parallel_size=2), recompute=Recompute.selective))
    # Of 24 + 36 forward layers and 48 backward ones (in forward's time) the student's 24 again.
    assert full.products / plain.products == pytest.approx(1 + 24 / (24 * 3 + 36), rel=0.06)
    assert full.tensor_parallel > plain.tensor_parallel
    assert plain.products == selective.products
    assert plain.attention < selective.attention < full.attention * 1.001


def test_what_gradients_take_is_hidden_behind_the_backward_pass() -> None:
    run = training(4096, 16, 1)
    alone = dataclasses.replace(run, overlap_grad_reduce=False, overlap_param_gather=False)
    two = machine(nodes=2)
    models = Models(Family.qwen3, QWEN3_8B, None)
    hidden, exposed = (step_seconds(item, Loss.ce, models, two, 16).data_parallel for item in (run, alone))
    # 8.19 B gradients of 4 bytes and parameters of 2, 15 of 16 parts of them, at the link's 324 GB/s.
    assert exposed == pytest.approx(8.19e9 * 6 * 15 / 16 / min(450e9 * 0.72, 400e9 * 0.8), rel=0.01)
    assert 0 <= hidden < exposed
    sliced = dataclasses.replace(run, use_distributed_optimizer=False, overlap_param_gather=False)
    whole = step_seconds(sliced, Loss.ce, models, two, 16)
    assert whole.optimizer > 4 * step_seconds(run, Loss.ce, models, two, 16).optimizer


def test_small_chunks_of_the_loss_cost_memory_traffic() -> None:
    small = dataclasses.replace(distillation(), kd=KdConfig(chunk_tokens=128))
    assert kd_step(small).loss > 2 * kd_step(distillation()).loss


def test_a_teacher_in_fp8_is_faster_and_the_student_is_not() -> None:
    models, run = Models(Family.qwen3, QWEN3_6B, QWEN3_8B), distillation()
    in_fp8 = dataclasses.replace(run, teacher_fp8=True)
    runs = (run, in_fp8, dataclasses.replace(in_fp8, fp8=Fp8.hybrid))
    plain, teacher, both = (step_seconds(each, Loss.kd, models, machine(), 8).total for each in runs)
    assert both < teacher < plain
    # The teacher's layers are a third of the FLOP; FP8 at most halves them.
    assert 1 - teacher / plain < 1 / 6
    assert step_seconds(in_fp8, Loss.kd, models, machine("a100_80"), 8).products >= (
        step_seconds(run, Loss.kd, models, machine("a100_80"), 8).products
    )


def test_figures_that_are_not_stated() -> None:
    def found(nodes: int, devices: int, **changes: None) -> Machine | None:
        card = dataclasses.replace(gpu("h100_sxm"), **changes)
        return describe_machine(ClusterConfig(name="x", nodes=nodes, devices_per_node=devices, gpu=card))

    assert found(1, 1, link_gbs=None, network_gbs=None) is not None
    assert found(1, 8, network_gbs=None) is not None
    assert found(1, 8, link_gbs=None) is None
    assert found(2, 8, network_gbs=None) is None
    assert found(1, 1, memory_gbs=None) is None
    assert describe_machine(ClusterConfig(name="x", nodes=1, devices_per_node=1)) is None
