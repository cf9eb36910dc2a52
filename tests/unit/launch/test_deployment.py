"""The parts of quantization, evaluation and benchmark whose time a config determines, compared with manual sums."""

from __future__ import annotations

import math

import pytest

from launch.planning import deployment
from launch.planning.automatic import compose
from launch.planning.deployment import PartialTime, estimate_parts
from launch.planning.machine import MEMORY_SHARE
from launch.planning.output import to_table
from launch.planning.plan import make_plan
from prune_distill.config.values import replace_values
from prune_distill.schema import QuantFormat

# 24 of Qwen3-8B's 36 layers.
BASE = ("experiment=qwen3_8b_to_6b_depth", "layout=published", "cluster.gpu.mfu=0.21")
SERVED = ("benchmark.enabled=true", "benchmark.engine=vllm")
PEAK = 0.21 * 989.4e12
HIDDEN, FFN, QUERIES, KEYS, VOCABULARY = 4096, 12288, 4096, 1024, 151_936
# Weights of a layer by their output channels.
LAYER = {"qo": 2 * HIDDEN * QUERIES, "kv": 2 * HIDDEN * KEYS, "gate_up": 2 * HIDDEN * FFN, "down": FFN * HIDDEN}


def forward(layers: int, length: int) -> int:
    """FLOP a token: two a weight, and attention's 2 x length x queries a layer."""
    return 2 * (layers * sum(LAYER.values()) + VOCABULARY * HIDDEN) + layers * 2 * length * QUERIES


def parts(*overrides: str) -> dict[str, PartialTime]:
    return {part.stage: part for part in estimate_parts(compose([*BASE, *overrides]))}


def test_a_quantization_by_hand() -> None:
    found = parts("quantize.formats=[fp8,fp8_tensor]")
    flops = forward(24, 512)
    # Two sequences of 512 tokens check the result; fp8_tensor also takes 512 for its ranges.
    for name, sequences in (("fp8", 2), ("fp8_tensor", 514)):
        part = found[f"quantize.{name}"]
        assert (part.ranks, part.bound) == (1, "at least")
        assert part.seconds == pytest.approx(sequences * 512 * flops / PEAK, rel=1e-9)
    quantized = 24 * sum(LAYER.values())
    size = 2 * 5_875_378_176 - quantized
    assert f"; 10.9 -> {size / 2**30:.1f} GiB" in found["quantize.fp8"].work


@pytest.mark.parametrize(
    ("settings", "sequences"),
    [
        (["quantize.formats=[int8]"], 0),
        (["quantize.formats=[int8]", "quantize.fp8_kv_cache=true"], 512),
        (["quantize.formats=[int4]"], 32),
        # 171 batches of 3, of which each sixth is used.
        (["quantize.formats=[int4]", "quantize.micro_batch_size=3"], 3 * len(range(171)[::6])),
        (["quantize.formats=[int4]", "quantize.calibration_samples=5"], 5),
        (["quantize.formats=[int4]", "distill.quantize=int4"], 0),
        (["quantize.formats=[int4]", "distill.quantize=int4", "quantize.fp8_kv_cache=true"], 512),
    ],
)
def test_sequences_of_a_calibration(settings: list[str], sequences: int) -> None:
    assert deployment.calibration_sequences(compose([*BASE, *settings])) == sequences


def test_the_search_of_int4_by_hand() -> None:
    cfg = compose([*BASE, "quantize.formats=[int4]"])
    # In each of 32 passes, each weight is read and written with 11 ranges once for each 1,024 output channels, and
    # multiplied by 16 tokens 12 times; two bytes each.
    parts_of_1024 = {"qo": 4, "kv": 1, "gate_up": 12, "down": 4}
    accesses = 24 * sum(LAYER[name] * (11 * count + 12 * 16) for name, count in parts_of_1024.items())
    assert deployment.awq_bytes(cfg) == 32 * 2 * 2 * accesses
    (part,) = [part for part in estimate_parts(cfg) if part.stage == "quantize.int4"]
    passes = 34 * 512 * forward(24, 512) / PEAK
    assert part.seconds == pytest.approx(passes + 32 * 4 * accesses / (MEMORY_SHARE * 3352e9), rel=1e-3)
    kept = replace_values(cfg, {"quantize.keep": ["*.self_attn.*"]})
    assert deployment.quantized_bytes(kept) > deployment.quantized_bytes(cfg)
    # A bf16 scale for each 128 weights of half a byte; embedding, output layer and norms stay in bf16.
    quantized = 24 * sum(LAYER.values())
    assert deployment.quantized_bytes(cfg) == 2 * (5_875_378_176 - quantized) + quantized // 2 + quantized // 64
    learned = compose([*BASE, "quantize.formats=[int4]", "distill.quantize=int4"])
    (part,) = [part for part in estimate_parts(learned) if part.stage == "quantize.int4"]
    assert part.seconds == pytest.approx(2 * 512 * forward(24, 512) / PEAK, rel=1e-9)


def test_held_out_losses_by_hand() -> None:
    settings = ("evaluate.max_sequences=1000", "evaluate.seq_length=1024", "quantize.formats=[fp8]")
    found = parts(*settings, "distill.controls=[ce]")
    tokens, student, teacher = 1000 * 1024, forward(24, 1024), forward(36, 1024)
    # The teacher alone; the pruned model and the student, each with the teacher.
    seconds = tokens * (teacher + 2 * (student + teacher)) / (8 * PEAK)
    assert found["evaluate"].seconds == pytest.approx(seconds, rel=1e-9)
    assert (found["evaluate"].ranks, found["evaluate"].bound) == (8, "about")
    assert "3 models, at most 1,000 sequences" in found["evaluate"].work
    for name in ("ce", "fp8"):
        assert found[f"evaluate.{name}"].seconds == pytest.approx(tokens * (student + teacher) / (8 * PEAK), rel=1e-9)
    recovery = parts(*settings, "evaluate.recovery=true")["evaluate"]
    # The two newest checkpoints and the best.
    assert recovery.seconds - seconds == pytest.approx(3 * tokens * (student + teacher) / (8 * PEAK), rel=1e-9)
    # The number of held-out tokens is not known.
    assert "evaluate" not in parts("evaluate.max_sequences=null")
    assert not any("evaluate" in name for name in parts("convert.export_dtype=fp32"))


def test_a_benchmark_takes_the_time_of_its_requests() -> None:
    settings = (*SERVED, "benchmark.requests=30", "benchmark.rounds=2", "quantize.formats=[fp8]")
    part = parts(*settings, "benchmark.request_rates=[0.5,3,null]")["benchmark"]
    # Teacher, student and student_fp8.
    assert (part.bound, part.seconds) == ("at least", 3 * 2 * (30 / 0.5 + 30 / 3))
    assert "benchmark" not in parts(*settings, "benchmark.request_rates=[null]")
    assert "benchmark" not in parts("benchmark.enabled=true", "benchmark.engine=transformers")
    without_gpu = compose(["experiment=demo", *SERVED, "benchmark.request_rates=[2]", "benchmark.requests=30"])
    (part,) = estimate_parts(without_gpu)
    assert math.isclose(part.seconds, (2 + len(without_gpu.quantize.formats)) * without_gpu.benchmark.rounds * 15)
    assert "known in part" in to_table(make_plan(without_gpu))


def test_parts_are_in_no_sum() -> None:
    formats = f"quantize.formats=[{','.join(name.value for name in QuantFormat if name is not QuantFormat.nvfp4)}]"
    cfg = compose([*BASE, formats, *SERVED, "benchmark.request_rates=[1]"])
    run_plan = make_plan(cfg)
    hours = {stage.stage: stage.hours for stage in run_plan.stages}
    assert [part.stage for part in run_plan.partial] == [
        *(f"quantize.{name.value}" for name in cfg.quantize.formats),
        *("evaluate", *(f"evaluate.{name.value}" for name in cfg.quantize.formats), "benchmark"),
    ]
    assert {hours[part.stage] for part in run_plan.partial} == {None}
    table = to_table(run_plan)
    assert "rounding and files of quantize, tasks and samples of evaluate, generation of benchmark" in " ".join(
        table.split()
    )
    assert max(map(len, table.splitlines())) <= 110
