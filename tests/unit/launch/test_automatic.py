"""Settings that are `auto`: what is chosen, what is kept, and where nothing fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launch import plan
from launch.planning import automatic
from launch.planning.automatic import CHUNK_TOLERANCE, CHUNKS, MARGIN, USUAL_CHUNK, compose
from launch.planning.memory import fullest
from launch.planning.output import summarize, to_table
from launch.planning.plan import make_plan, stage_memory
from launch.planning.what_if import what_if, with_tokens
from prune_distill.config import load
from prune_distill.config.load import save_resolved
from prune_distill.errors import ConfigError
from prune_distill.pipeline.names import RESOLVED
from prune_distill.schema import Parallel, Recompute, RunConfig
from prune_distill.schema.phases import training_tokens
from prune_distill.schema.run import AUTOMATIC, LAYOUT
from prune_distill.units import GIB

DEPTH, ONE_GPU = "experiment=qwen3_8b_to_6b_depth", "experiment=qwen3_0_6b_one_gpu"
TWO_DISTILLATIONS = ("prune.num_layers=12", "prune.rounds=[{steps: 5000, num_layers: 30}]")
CORRECTION = (
    "distill.teacher_correction={max_steps: 10, seq_length: 4096, global_batch_size: 8, lr: 1e-5, min_lr: 1e-6}"
)
# Eight data-parallel ranks, and any micro batch.
ALL_DATA = ("distill.parallel.tensor_model_parallel_size=1", "distill.micro_batch_size=auto")


def limit(cfg: RunConfig) -> float:
    assert cfg.cluster.gpu is not None
    return cfg.cluster.gpu.memory_gib * GIB * (1 - MARGIN)


def fault_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    (fault,) = caught.value.faults
    assert fault.rule == "launch.layout"
    return fault.message


@pytest.mark.parametrize(
    "overrides",
    [
        (DEPTH,),
        (DEPTH, "cluster.gpu=l40s"),
        (DEPTH, "cluster.nodes=4"),
        (DEPTH, *TWO_DISTILLATIONS),
        (DEPTH, "distill.teacher_logits=cached"),
        ("experiment=llama3_1_8b_to_4b_width",),
        (ONE_GPU,),
    ],
    ids=" ".join,
)
def test_the_fastest_layout_that_fits_is_chosen(overrides: tuple[str, ...]) -> None:
    cfg = compose(overrides)
    assert set(cfg.automatic) == {key for key in AUTOMATIC if "teacher" not in key}
    assert all(fullest(memory).total <= limit(cfg) for memory in stage_memory(cfg).values())
    chosen = make_plan(cfg)
    assert chosen.layout.seconds is not None
    # Whatever is faster leaves less of the memory free, in this stage or in another that has its layout.
    for layout in chosen.layouts:
        if layout.seconds is not None and layout.seconds < chosen.layout.seconds:
            other = compose([*overrides, *(f"{key}={value}" for key, value in layout.overrides.items())])
            assert any(fullest(memory).total > limit(cfg) for memory in stage_memory(other).values())


def test_what_is_set_is_kept() -> None:
    cfg = compose([DEPTH, "distill.parallel.tensor_model_parallel_size=4", "distill.recompute=full"])
    assert cfg.distill.parallel.tensor_model_parallel_size == 4
    assert cfg.distill.recompute is Recompute.full
    assert "distill.parallel.tensor_model_parallel_size" not in cfg.automatic
    assert "distill.parallel.context_parallel_size" in cfg.automatic
    published = compose([DEPTH, "layout=published"])
    assert (published.distill.parallel, published.distill.micro_batch_size) == (Parallel(8), 2)
    assert published.automatic == ["distill.kd.chunk_tokens"]


def test_a_group_may_be_automatic_as_a_whole() -> None:
    cfg = compose(["experiment=demo", "distill.parallel=auto"])
    assert cfg.automatic == [f"distill.{key}" for key in LAYOUT if key.startswith("parallel.")]
    # The GPU is not stated: the least parallelism.
    assert cfg.distill.parallel == compose(["experiment=demo"]).distill.parallel
    with pytest.raises(ConfigError, match=r"model.demo.training.micro_batch_size=auto: not a whole number"):
        compose(["experiment=demo", "model.demo.training.micro_batch_size=auto"])
    with pytest.raises(ConfigError, match=r"distill.micro_batch_size=auto: not a whole number"):
        load.compose([DEPTH, "distill.micro_batch_size=auto"])


def test_the_correction_of_the_teacher_has_a_layout_of_its_own() -> None:
    cfg = compose([DEPTH, CORRECTION, "distill.teacher_correction.parallel=auto"])
    correction = cfg.distill.teacher_correction
    assert correction is not None
    # Trained whole, the teacher of 8 B parameters takes more than one GPU.
    assert correction.parallel != Parallel()
    assert fullest(stage_memory(cfg)["correct_teacher"]).total <= limit(cfg)
    assert not any(key.startswith("distill.teacher_correction.micro") for key in cfg.automatic)


# 72 B parameters as of Qwen2.5-72B, whose weights alone are 135 GiB.
LARGE_TEACHER = (
    "teacher={hf_path: owner/large, family: qwen2, shape: {num_layers: 80, hidden_size: 8192, ffn_hidden_size: 29568, "
    "num_attention_heads: 64, num_query_groups: 8, kv_channels: 128, vocab_size: 152064, "
    "max_position_embeddings: 32768}}"
)


def test_a_cache_in_a_layout_of_its_own_does_not_limit_the_students() -> None:
    cached = (DEPTH, "distill.teacher_logits=cached")
    alone = compose(cached).distill
    shared = compose([*cached, LARGE_TEACHER])
    assert shared.distill.parallel.tensor_model_parallel_size * shared.distill.parallel.pipeline_model_parallel_size > 2
    cfg = compose([*cached, LARGE_TEACHER, "teacher.parallel=auto", "teacher.micro_batch_size=auto"])
    assert (cfg.distill.parallel, cfg.distill.micro_batch_size) == (alone.parallel, alone.micro_batch_size)
    assert cfg.distill.kd.chunk_tokens == alone.kd.chunk_tokens
    assert cfg.teacher.parallel is not None
    # 68 GiB of weights on each of two GPUs leave room for the logits of a micro batch.
    sizes = cfg.teacher.parallel.tensor_model_parallel_size, cfg.teacher.parallel.pipeline_model_parallel_size
    assert sizes == (2, 1)
    assert fullest(stage_memory(cfg)["cache_logits"]).total <= limit(cfg)
    assert {key for key in cfg.automatic if "teacher" in key} == {
        key for key in AUTOMATIC if key.startswith("teacher.")
    }
    # What is set stays, although it does not fit.
    full = compose([*cached, LARGE_TEACHER, "teacher.parallel={}"])
    assert full.distill.parallel == alone.parallel
    assert make_plan(full).fits is False


def test_a_cache_for_which_no_layout_fits() -> None:
    cached = (DEPTH, "layout=published", "distill.teacher_logits=cached", LARGE_TEACHER, "cluster.gpu.memory_gib=16")
    fault = fault_of(*cached, "teacher.parallel=auto")
    assert fault.startswith("teacher.parallel.tensor_model_parallel_size=auto: cache_logits needs at least ")
    with pytest.raises(ConfigError, match=r"teacher.parallel: one model takes 5 ranks"):
        compose([*cached, "teacher.parallel=auto", "teacher.parallel.pipeline_model_parallel_size=5"])
    with pytest.raises(ConfigError, match=r"set distill.teacher_logits=cached, or teacher.micro_batch_size=null"):
        compose([DEPTH, "layout=published", "teacher.micro_batch_size=auto"])


def test_the_chunk_of_the_loss_is_the_smallest_that_is_nearly_as_fast_as_any() -> None:
    cfg = compose([DEPTH])
    chosen = make_plan(cfg)
    seconds = {
        tokens: make_plan(compose([DEPTH, f"distill.kd.chunk_tokens={tokens}"])).layout.seconds or 0.0
        for tokens in CHUNKS
    }
    # Two context-parallel ranks have 2,048 tokens of a sequence each: larger chunks change nothing.
    assert (chosen.loss_chunk, seconds[2048]) == (2048, seconds[8192])
    assert seconds[1024] > (1 + CHUNK_TOLERANCE) * seconds[2048]
    assert "of 2,048 tokens at a time (chosen)" in to_table(chosen)
    # In a layout that is set, what fits: at TP 1 and without recomputation the smaller memory leaves less to the loss.
    layout = ["distill.parallel.context_parallel_size=2", "distill.parallel.tensor_model_parallel_size=1"]
    small = compose(
        [DEPTH, *layout, "distill.micro_batch_size=1", "distill.recompute=none", "cluster.gpu.memory_gib=77.5"]
    )
    assert small.distill.kd.chunk_tokens == 1024
    assert fullest(stage_memory(small)["distill"]).total <= limit(small)
    # Where speed is not known, and where nothing fits.
    assert compose([DEPTH, "cluster.gpu=null"]).distill.kd.chunk_tokens == USUAL_CHUNK
    assert compose([DEPTH, "layout=published", "cluster.gpu.memory_gib=9"]).distill.kd.chunk_tokens == CHUNKS[0]
    with pytest.raises(ConfigError, match=r"distill.kd.chunk_tokens=auto: not a whole number"):
        load.compose([DEPTH, "distill.kd.chunk_tokens=auto", "layout=published"])


def test_pruning_takes_as_few_pipeline_stages_as_fit() -> None:
    assert compose([DEPTH]).prune.pipeline_model_parallel_size == 1
    small = compose([DEPTH, "cluster.gpu.memory_gib=18", "cluster.nodes=2", "distill.seq_length=1024"])
    assert small.prune.pipeline_model_parallel_size > 1
    assert fullest(stage_memory(small)["prune"]).total <= limit(small)
    fewer = dataclasses.replace(
        small.prune, pipeline_model_parallel_size=small.prune.pipeline_model_parallel_size // 2, micro_batch_size=1
    )
    assert fullest(stage_memory(dataclasses.replace(small, prune=fewer))["prune"]).total > limit(small)


def test_a_choice_is_kept_on_the_same_gpus(tmp_path: Path) -> None:
    overrides = [DEPTH, f"run_dir={tmp_path}"]
    first = compose(overrides)
    other = dataclasses.replace(
        first, distill=dataclasses.replace(first.distill, parallel=Parallel(4), micro_batch_size=2)
    )
    save_resolved(other, tmp_path / RESOLVED)
    assert compose(overrides).distill.parallel == Parallel(4)
    assert compose([*overrides, "cluster.gpu.cost_per_hour=2"]).distill.parallel == Parallel(4)
    # Another machine, a choice that no longer fits or divides, and what was set by hand.
    assert compose([*overrides, "cluster.gpu=h200"]).distill.parallel != Parallel(4)
    assert compose([*overrides, "cluster.devices_per_node=2"]).distill.parallel != Parallel(4)
    assert compose([*overrides, "distill.seq_length=32768"]).distill.parallel != Parallel(4)
    assert compose([*overrides, "distill.global_batch_size=1"]).distill.parallel != Parallel(4)
    save_resolved(dataclasses.replace(other, automatic=[]), tmp_path / RESOLVED)
    assert compose(overrides).distill == first.distill
    (tmp_path / RESOLVED).write_text("{")
    assert compose(overrides).distill == first.distill


def test_where_nothing_fits_the_nearest_is_named() -> None:
    message = fault_of(DEPTH, "cluster.gpu=rtx_4090", "cluster.devices_per_node=2")
    assert message.startswith("distill.parallel=auto: no layout fits RTX 4090 24GB with 5% to spare; the nearest (")
    assert "GiB too much" in message
    assert "take more GPUs, or GPUs of more memory" in message
    shorter = fault_of(ONE_GPU, "distill.seq_length=32768", "cluster.gpu.memory_gib=13")
    assert "no layout fits sequences of 32768 tokens: set distill.seq_length=" in shorter
    pruning = fault_of(DEPTH, "cluster.gpu=rtx_4090", "prune.calibration_seq_length=32768")
    assert pruning.startswith("prune.pipeline_model_parallel_size=auto: pruning needs at least")


def test_a_plan_shows_the_nearest_layout_where_none_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([ONE_GPU, "distill.seq_length=32768", "cluster.gpu.memory_gib=13"]) == 1
    assert "does not fit the GPU: no layout fits sequences of 32768 tokens: set" in capsys.readouterr().out


def test_where_nothing_divides_the_reasons_are_named() -> None:
    message = fault_of(DEPTH, "distill.global_batch_size=767", "layout=published", *ALL_DATA)
    assert "distill.parallel.tensor_model_parallel_size=1" in message
    assert "divides the model and the batch; global_batch_size=767: not divisible by 8" in message


def test_the_choice_is_printed_with_its_reason_and_the_runners_up() -> None:
    lines = summarize(make_plan(compose([DEPTH])))
    (chosen,) = [line for line in lines if "chosen:" in line]
    assert "the fastest estimate of those that leave 5 % of the memory free" in chosen
    assert sum("other layouts:" in line for line in lines) == 2
    assert not any("chosen" in line for line in summarize(make_plan(compose([DEPTH, "layout=published"]))))
    assert "cluster.gpu is not stated" in " ".join(summarize(make_plan(compose([DEPTH, "cluster.gpu=null"]))))


# GPUs by name, and plans without a site.


def test_gpus_by_name() -> None:
    cfg = compose([DEPTH, "cluster.gpu=a100_40", "cluster.gpu.cost_per_hour=1.5"])
    assert cfg.cluster.gpu is not None
    assert (cfg.cluster.gpu.name, cfg.cluster.gpu.fp8_tflops) == ("A100 SXM 40GB", None)
    assert cfg.cluster.gpu.cost_per_hour == 1.5
    local = compose(["experiment=demo", "cluster.gpu=rtx_4090"])
    assert local.cluster.gpu is not None
    assert compose(["experiment=demo", "cluster/gpu=rtx_4090"]).cluster == local.cluster
    with pytest.raises(ConfigError, match=r"cluster.gpu=h100_sx: not a known GPU \(did you mean h100_sxm") as caught:
        compose([DEPTH, "cluster.gpu=h100_sx"])
    assert caught.value.faults[0].rule == "cluster.gpu"
    with pytest.raises(ConfigError, match=r"cluster.gpu=\[1\]: not a GPU; set cluster.gpu to one of a100_40,"):
        compose([DEPTH, "cluster.gpu=[1]"])
    with pytest.raises(ConfigError, match=r"prune=auto: does not exist"):
        compose([DEPTH, "prune=auto"])


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "cluster" / "gpu").mkdir(parents=True)
    (tmp_path / "cluster" / "gpu" / "mine.yaml").write_text("name: Mine\nmemory_gib: 90\nbf16_tflops: 500\n")
    cfg = compose([DEPTH, "cluster.gpu=mine"], config_dir=tmp_path)
    # Nothing is left of the GPU that the cluster states.
    assert cfg.cluster.gpu is not None
    assert (cfg.cluster.gpu.name, cfg.cluster.gpu.memory_gbs) == ("Mine", None)
    inline = compose([DEPTH, "cluster.gpu={name: Mine, memory_gib: 90, bf16_tflops: 500}"])
    assert inline.cluster.gpu == cfg.cluster.gpu


def test_nodes_without_a_network_figure() -> None:
    with pytest.raises(ConfigError, match=r"cluster.gpu.network_gbs=null: the time of 2 nodes depends") as caught:
        compose([DEPTH, "cluster.nodes=2", "cluster.gpu=l40s"])
    assert caught.value.faults[0].rule == "cluster.network"
    assert compose([DEPTH, "cluster.nodes=2", "cluster.gpu=l40s", "cluster.gpu.network_gbs=25"]).cluster.nodes == 2
    assert compose([DEPTH, "cluster.nodes=2", "cluster.gpu=l40s", "cluster.gpu.mfu=0.3"]).cluster.nodes == 2


def test_a_plan_needs_no_partition(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([DEPTH, "cluster=slurm"]) == 0
    assert "jobs of 4:00:00" in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        compose([DEPTH, "cluster=slurm"])
    assert len(caught.value.faults) == 3


# Costs and variants.


def test_costs_are_gpu_hours_times_the_price() -> None:
    of_plan = make_plan(compose([DEPTH, "cluster.gpu.cost_per_hour=2.5"]))
    (row,) = [stage for stage in of_plan.stages if stage.stage == "distill"]
    assert row.gpu_hours is not None
    assert row.cost == pytest.approx(2.5 * row.gpu_hours)
    assert ", cost " in " ".join(summarize(of_plan))
    assert "cost" in to_table(of_plan)
    assert all(stage.cost is None for stage in make_plan(compose([DEPTH])).stages)


def test_other_lengths_and_variants() -> None:
    cfg = compose([DEPTH, "cluster.gpu.cost_per_hour=2"])
    variants = {variant.name: variant for variant in what_if(cfg)}
    assert set(variants) == {*("as configured", "18 layers", "cached logits"), "FP8 teacher", "FP8 teacher, student"}
    own = variants["as configured"]
    assert [cell.tokens for cell in own.cells] == [10e9, 30e9, training_tokens(cfg.distill)]
    (distill,) = [stage for stage in make_plan(cfg).stages if stage.stage == "distill"]
    assert distill.gpu_hours is not None
    assert own.cells[-1].gpu_hours == pytest.approx(distill.gpu_hours, rel=1e-3)
    assert own.cells[0].gpu_hours == pytest.approx(distill.gpu_hours / 9, rel=1e-2)
    assert own.cells[0].cost == pytest.approx(2 * own.cells[0].gpu_hours)
    assert variants["18 layers"].cells[0].gpu_hours < own.cells[0].gpu_hours
    names = ("FP8 teacher, student", "FP8 teacher", "as configured")
    both, teacher, plain = (variants[name].cells[0].gpu_hours for name in names)
    assert both < teacher < plain
    # The teacher runs over the data once either way.
    assert variants["cached logits"].cells[0].gpu_hours == pytest.approx(own.cells[0].gpu_hours, rel=0.1)


def test_variants_that_cannot_be_estimated() -> None:
    on_a100 = {variant.name for variant in what_if(compose([DEPTH, "cluster.gpu=a100_80"]))}
    assert on_a100 == {"as configured", "18 layers", "cached logits"}
    own = {variant.name for variant in what_if(compose([DEPTH, "distill.fp8=hybrid", "distill.teacher_fp8=true"]))}
    assert own == on_a100
    named = {variant.name: variant for variant in what_if(compose([DEPTH, "distill.loss=ce"]))}
    assert set(named) == {"as configured", "18 layers"}
    # The FP8 copies of the teacher's weights, 6.5 GiB, are more than what TP 1 leaves free.
    full = {variant.name: variant.fits for variant in what_if(compose([DEPTH]))}
    assert (full["as configured"], full["FP8 teacher"]) == (True, False)
    unknown = what_if(compose([DEPTH, "cluster.gpu=null"]))
    assert all(variant.why_not and not variant.cells for variant in unknown)


def test_phases_keep_their_shares() -> None:
    phases = "distill.phases=[{max_steps: 1000, seq_length: 2048}, {max_steps: 3000}]"
    cfg = compose([DEPTH, "distill.max_steps=4000", phases])
    half = with_tokens(cfg, training_tokens(cfg.distill) / 2)
    assert [phase.max_steps for phase in half.distill.phases or ()] == [500, 1500]
    assert half.distill.max_steps == 2000
    assert training_tokens(half.distill) == training_tokens(cfg.distill) / 2


def test_the_table_of_variants_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([DEPTH, "--what-if", "cluster.gpu.cost_per_hour=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("GPU-hours"))
    assert [line.split("  ")[0] for line in lines[start : start + 7]] == [
        *("GPU-hours", "as configured", "18 layers", "cached logits", "FP8 teacher", "FP8 teacher, student", "cost")
    ]


def test_the_margin_is_what_messages_say() -> None:
    assert f"{MARGIN:.0%}" == "5%"
    assert automatic.MARGIN == 0.05
