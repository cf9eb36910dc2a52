"""The plan of a run: published figures, sums by hand, layouts that hold, and what is printed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from launch import plan
from launch.planning import disk, hours
from launch.planning.automatic import compose
from launch.planning.output import summarize, to_table
from launch.planning.plan import Plan, make_plan
from prune_distill.config.composition import config_groups
from prune_distill.errors import ConfigError
from prune_distill.model.flops import training_flops
from prune_distill.schema import Family, Gpu, Loss, PruneConfig, Recompute, RunConfig, Shape, Training
from prune_distill.schema.phases import training_tokens
from prune_distill.units import GIB

# Qwen3-30B-A3B: 30.5 B parameters, of which a token meets 3.3 B by its model card.
MIXTURE = (
    *("model=local", "name=x", "model.name=x", "model.family=qwen3_moe", "model.hf_path=owner/name", "data=climbmix"),
    *("cluster=one_node", "distill=minitron", "distill.micro_batch_size=1", "prune.num_layers=32"),
    "model.shape={num_layers: 48, hidden_size: 2048, ffn_hidden_size: 6144, num_attention_heads: 32,"
    " num_query_groups: 4, kv_channels: 128, vocab_size: 151936, max_position_embeddings: 40960, num_moe_experts: 128,"
    " moe_ffn_hidden_size: 768, moe_router_topk: 8}",
    *("distill.parallel.tensor_model_parallel_size=1", "distill.parallel.expert_model_parallel_size=8"),
)
# Those that need nothing of the user's.
EXPERIMENTS = [name for name in config_groups()["experiment"] if name != "own"]
DEPTH = "experiment=qwen3_8b_to_6b_depth"
PUBLISHED, ONE_RANK = "layout=published", "distill.parallel.tensor_model_parallel_size=1"
# The share of the peak that the published run took: 90 B tokens in about 6,000 H100-hours.
AS_PUBLISHED = "cluster.gpu.mfu=0.21"
SMALL = "cluster.gpu.memory_gib=24"
TEACHER = Shape(4, 8, 16, 2, 1, 4, 32, 64, False)
STUDENT = dataclasses.replace(TEACHER, num_layers=2)


def planned(*overrides: str) -> Plan:
    return make_plan(compose([*overrides, PUBLISHED] if DEPTH in overrides else overrides))


def hours_by_stage(run_plan: Plan) -> dict[str, float | None]:
    return {row.stage: row.hours for row in run_plan.stages}


# Arithmetic.


def test_the_published_run_takes_its_published_hours() -> None:
    (row,) = [stage for stage in planned(DEPTH, AS_PUBLISHED).stages if stage.stage == "distill"]
    assert row.gpu_hours == pytest.approx(6000, rel=0.1)
    assert row.hours == row.gpu_hours / 8


def test_flops_by_hand() -> None:
    training = Training(max_steps=10, seq_length=16, global_batch_size=4)
    # Products: 576 a layer, 32 x 8 in the output layer. Attention: 2 x 16 x 8 a layer.
    student, teacher = 2 * (2 * 576 + 256) + 2 * 256, 2 * (4 * 576 + 256) + 4 * 256
    flops = training_flops(training, Loss.kd, Family.qwen3, STUDENT, TEACHER)
    assert (flops.student, flops.teacher, flops.recompute) == (3 * student, teacher, 0)
    assert flops.total == 3 * student + teacher
    assert training_flops(training, Loss.ce, Family.qwen3, STUDENT, TEACHER).total == 3 * student
    training.recompute = Recompute.full
    assert training_flops(training, Loss.kd, Family.qwen3, STUDENT, TEACHER).recompute == student - 2 * 256
    assert training_tokens(training) == 10 * 4 * 16
    prune = PruneConfig(calibration_samples=3, calibration_seq_length=16)
    assert hours.calibration_flops(prune, Family.qwen3, TEACHER) == 3 * 16 * teacher


def test_hours_by_hand() -> None:
    assert hours.seconds_at(0.5, 3.6e17 * 8, Gpu("g", 1.0, 100.0), 8) == pytest.approx(2.0 * 3600)
    assert set(hours_by_stage(planned(DEPTH, "cluster.gpu=null")).values()) == {None}
    assert set(hours_by_stage(planned(DEPTH, "cluster.gpu.memory_gbs=null")).values()) == {None}
    in_fp32 = hours_by_stage(planned(DEPTH, AS_PUBLISHED, "distill.precision=fp32"))
    assert in_fp32["distill"] is None


def test_flops_of_large_models_are_six_n() -> None:
    """Within a few percent FLOP a token are 6 x student + 2 x teacher: attention adds, the embedding takes away."""
    run_plan = planned(DEPTH)
    student, teacher = run_plan.student.parameters, run_plan.teacher.parameters
    assert run_plan.work.flops_a_token.total == pytest.approx(6 * student + 2 * teacher, rel=0.05)


def test_bytes_on_disk_by_hand(demo: Callable[..., RunConfig]) -> None:
    sizes = planned(DEPTH).disk.sizes
    student, teacher = 5_875_378_176, 8_190_735_360
    assert sizes["tokens"] == 4 * 28_600 * 768 * 4096
    assert sizes["teacher"] == 2 * teacher
    # Pruned, distilled, and both exported, in bf16; and one in FP8.
    assert sizes["students"] == (2 * 2 * 2 + 1) * student
    # The two newest, the best, and the one being written.
    assert sizes["checkpoints"] == 4 * 14 * student
    assert sizes["total"] == sum(sizes[kind] for kind in ("tokens", "teacher", "students", "checkpoints"))
    # The demo makes its teacher, in fp32 like all of it, and has a control; its tokens take two bytes.
    student, teacher = 3_279_616, 5_246_976
    cfg = demo()
    assert cfg.model.shape is not None
    assert disk.bytes_needed(cfg) == {
        "tokens": 2 * 160 * 4 * 256,
        "teacher": 3 * 4 * teacher,
        "students": 2 * 3 * 4 * student,
        "checkpoints": 2 * 4 * 16 * student + 4 * 16 * teacher,
    }


CORRECTION = (
    "distill.teacher_correction={max_steps: 10, seq_length: 4096, global_batch_size: 8, lr: 1e-5, min_lr: 1e-6, "
    "parallel: {tensor_model_parallel_size: 8}}"
)


def test_cached_logits_by_hand() -> None:
    live = planned(DEPTH, AS_PUBLISHED)
    stored = planned(DEPTH, AS_PUBLISHED, "distill.teacher_logits=cached", "distill.cached_logits_top_k=10")
    # Three bytes of an id below 2^24 and two of a log-probability, four of the tail.
    assert stored.disk.needed["signal"] == stored.signal.bytes == 28_600 * 768 * 4096 * (10 * 5 + 4)
    assert stored.disk.total == live.disk.total + stored.signal.bytes
    teacher_flops = live.work.flops_a_token.teacher
    assert stored.signal.flops_a_token == teacher_flops
    assert stored.work.flops_a_token.teacher == 0
    assert stored.signal.spared_share == teacher_flops / live.work.flops_a_token.total
    after = hours_by_stage(stored)
    assert after["cache_logits"] + after["distill"] == pytest.approx(hours_by_stage(live)["distill"])
    assert all(memory.teacher == 0 for memory in stored.memory["distill"])
    (signal,) = stored.memory["cache_logits"]
    assert signal.weights == live.memory["distill"][0].teacher
    # Whole bf16 logits of a micro batch of 2 x 4096, 3 copies in fp32 of 256 tokens; an eighth of the vocabulary.
    assert signal.loss == (2 * 2 * 4096 + 3 * 4 * 256) * 151_936 // 8
    assert "every further student of this run" in to_table(stored)
    assert "cache_logits" not in live.memory


OWN_TEACHER = (
    "teacher={hf_path: /models/teacher, family: llama, shape: {num_layers: 48, hidden_size: 5120, "
    "ffn_hidden_size: 14336, num_attention_heads: 40, num_query_groups: 8, kv_channels: 128, vocab_size: 151808, "
    "max_position_embeddings: 8192}}"
)


def test_a_teacher_of_its_own_by_hand() -> None:
    plain, own = planned(DEPTH, AS_PUBLISHED), planned(DEPTH, AS_PUBLISHED, OWN_TEACHER)
    # Llama's layers have no norms of queries and keys.
    hidden, ffn, queries, keys, ids = 5120, 14336, 40 * 128, 8 * 128, 151_808
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * ffn + 2 * hidden
    parameters = 48 * layer + 2 * ids * hidden + hidden
    assert own.teacher.parameters == parameters
    assert own.original is not None
    assert plain.original is None
    assert own.original.parameters == plain.teacher.parameters
    assert own.cut == plain.cut
    # A product takes two FLOP a weight, attention 2 x seq_length x queries a layer.
    products = 48 * (layer - 2 * hidden) + ids * hidden
    assert own.work.flops_a_token.teacher == 2 * products + 48 * 2 * 4096 * queries
    assert own.work.flops_a_token.student == plain.work.flops_a_token.student
    (memory,), (other,) = own.memory["distill"], plain.memory["distill"]
    # An eighth of its weights, each in two bytes, norms whole; and the output weight for the student's slice.
    norms = hidden * (2 * 48 + 1)
    assert memory.teacher == 2 * ((parameters - norms) // 8 + norms + 151_936 // 8 * hidden)
    # The loss has one more fp32 buffer of a chunk, as the student has ids that the teacher lacks. Both models' hidden
    # states are gathered.
    assert memory.loss - other.loss == 4 * 4096 * 151_936 // 8 + 2 * 2 * 4096 * (hidden - 4096)
    assert own.memory["prune"] == plain.memory["prune"]
    assert own.disk.needed["teacher"] == plain.disk.needed["teacher"] + 2 * parameters
    assert hours_by_stage(own)["distill"] > hours_by_stage(plain)["distill"]
    assert hours_by_stage(own)["importance"] == hours_by_stage(plain)["importance"]
    table = to_table(own)
    assert "original   8,190,735,360" in table
    assert "of the parameters of the original" in table
    assert "original" not in to_table(plain)
    stored = planned(DEPTH, AS_PUBLISHED, OWN_TEACHER, "distill.teacher_logits=cached")
    (signal,) = stored.memory["cache_logits"]
    assert signal.weights == 2 * ((parameters - norms) // 8 + norms)
    assert stored.signal.flops_a_token == own.work.flops_a_token.teacher


def test_the_teachers_cache_in_a_layout_of_its_own_by_hand() -> None:
    """A teacher that is cached with TP 4 and PP 2, while its student has the published TP 8."""
    cached = (DEPTH, AS_PUBLISHED, OWN_TEACHER, "distill.teacher_logits=cached")
    layout = "teacher.parallel={tensor_model_parallel_size: 4, pipeline_model_parallel_size: 2}"
    shared, own = planned(*cached), planned(*cached, layout, "teacher.micro_batch_size=1")
    assert own.memory["distill"] == shared.memory["distill"]
    hidden, ffn, queries, keys, ids = 5120, 14336, 40 * 128, 8 * 128, 151_808
    matrices = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * ffn
    # The last stage: half of the layers and the output weight, a quarter of each; norms whole.
    weights = 24 * (matrices // 4 + 2 * hidden) + ids * hidden // 4 + hidden
    (memory,) = own.memory["cache_logits"]
    assert memory.weights == 2 * weights
    # Whole bf16 logits of a micro batch of 1 x 4096, 3 copies in fp32 of 256 tokens; a quarter of the vocabulary.
    assert memory.loss == (2 * 4096 + 3 * 4 * 256) * ids // 4
    assert own.signal is not None
    assert (own.signal.tensor, own.signal.pipeline, own.signal.micro_batch_size) == (4, 2, 1)
    assert "the teacher runs once (TP 4, PP 2, micro batch 1)" in to_table(own)
    # At a stated share of the peak the same work takes the same time; the time model has fewer exchanges.
    assert hours_by_stage(own)["cache_logits"] == hours_by_stage(shared)["cache_logits"]
    modeled = [hours_by_stage(planned(DEPTH, *cached[2:], *more))["cache_logits"] for more in ((), (layout,))]
    assert modeled[1] < modeled[0]
    full = planned(*cached, "teacher.parallel={}", "cluster.gpu.memory_gib=28")
    assert full.fits is False
    assert "for cache_logits lower teacher.micro_batch_size, or raise teacher.parallel" in full.fix


def by_source(weights: tuple[int | None, int | None]) -> str:
    """A source `code` with a teacher of its own, half of `OWN_TEACHER`'s depth, and one, `web`, without."""
    teacher = OWN_TEACHER.removeprefix("teacher=").replace("num_layers: 48", "num_layers: 24")
    web, code = ("null" if weight is None else weight for weight in weights)
    return (
        f"data.sources={{web: {{files: [w.jsonl], weight: {web}}}, "
        f"code: {{files: [c.jsonl], weight: {code}, teacher: {teacher}}}}}"
    )


def test_teachers_of_sources_by_hand() -> None:
    cached = (DEPTH, AS_PUBLISHED, "distill.teacher_logits=cached", "distill.cached_logits_top_k=10", "data.train=null")
    plain = planned(*cached[:4])
    found = planned(*cached, by_source((3, 1)))
    hidden, ffn, queries, keys, ids = 5120, 14336, 40 * 128, 8 * 128, 151_808
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * ffn + 2 * hidden
    parameters = 24 * layer + 2 * ids * hidden + hidden
    own = found.source_teachers["source_teacher1"]
    assert (own.hf_path, own.sources, own.model.parameters) == ("/models/teacher", ["code"], parameters)
    assert found.teacher == plain.teacher
    assert found.original is None
    # An eighth of the weights, norms whole.
    norms = hidden * (2 * 24 + 1)
    (memory,) = found.memory["cache_logits.source_teacher1"]
    assert memory.weights == 2 * ((parameters - norms) // 8 + norms)
    assert found.memory["cache_logits"] == plain.memory["cache_logits"]
    # Each sequence is cached once, by a teacher that runs over its share.
    before, after = hours_by_stage(plain), hours_by_stage(found)
    flops = 2 * (24 * (layer - 2 * hidden) + ids * hidden) + 24 * 2 * 4096 * queries
    of_run = plain.signal.flops_a_token
    assert after["cache_logits"] == pytest.approx(before["cache_logits"] * 3 / 4)
    assert after["cache_logits.source_teacher1"] == pytest.approx(before["cache_logits"] / 4 * flops / of_run)
    assert found.signal.flops_a_token == round(3 / 4 * of_run + flops / 4)
    assert found.disk.needed["signal"] == plain.disk.needed["signal"]
    assert found.disk.needed["teacher"] == plain.disk.needed["teacher"] + 2 * parameters
    table = to_table(found)
    assert "source_teacher1: /models/teacher, for the sequences of code" in table
    assert "each teacher runs once over its sources" in table
    assert f"taught by {parameters / 1e9:.2f} B (code)" in summarize(found)[0]
    assert not [warning for warning in found.warnings if "upper limit" in warning]
    # Without weights the shares are not known.
    unknown = planned(*cached, by_source((None, None)))
    assert hours_by_stage(unknown)["cache_logits"] == before["cache_logits"]
    assert unknown.signal.flops_a_token == max(of_run, flops)
    (warning,) = [warning for warning in unknown.warnings if "upper limit" in warning]
    assert "the hours of cache_logits and cache_logits.source_teacher1 are those of all sequences" in warning


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    large = OWN_TEACHER.replace("num_layers: 48", "num_layers: 960")
    found = planned(DEPTH, AS_PUBLISHED, large)
    assert found.fits is False
    assert "distill needs" in found.impossible["distill"]
    with pytest.raises(ConfigError, match="distill needs .* GiB a GPU for its tensors alone"):
        found.refuse_impossible(["distill"])


@pytest.mark.parametrize(("vocab_size", "size"), [(256, 1), (257, 2), (65_536, 2), (65_537, 3), (151_936, 3)])
def test_bytes_of_a_cached_token(vocab_size: int, size: int) -> None:
    assert disk.cached_logits_bytes(7, vocab_size) == 7 * (size + 2) + 4


def test_a_corrected_teacher_by_hand() -> None:
    plain, corrected = planned(DEPTH, AS_PUBLISHED), planned(DEPTH, AS_PUBLISHED, CORRECTION)
    teacher = 8_190_735_360
    # Weights for NeMo and for Hugging Face; checkpoints (the two newest, the best, the one being written) of bf16
    # weights, fp32 weights and two moments.
    assert corrected.disk.needed["teacher"] == plain.disk.needed["teacher"] + 2 * 2 * teacher
    assert corrected.disk.needed["checkpoints"] == plain.disk.needed["checkpoints"] + 4 * 14 * teacher
    (row,) = [stage for stage in corrected.stages if stage.stage == "correct_teacher"]
    forward = plain.work.flops_a_token.teacher
    flops = 10 * 8 * 4096 * 3 * forward
    assert row.hours == pytest.approx(flops / (8 * 989.4e12 * 0.21 * 3600), rel=1e-3)
    (memory,) = corrected.memory["correct_teacher"]
    assert memory.weights == plain.memory["distill"][0].teacher
    assert memory.gradients == 2 * memory.weights
    assert memory.teacher == 0


def test_a_correction_that_does_not_fit_has_a_fix() -> None:
    plan = planned(DEPTH, CORRECTION, "distill.teacher_correction.micro_batch_size=8", "cluster.gpu.memory_gib=40")
    assert plan.fits is False
    assert "for correct_teacher raise the sizes of distill.teacher_correction.parallel" in plan.fix


@pytest.mark.parametrize(("vocab_size", "size"), [(1024, 2), (65_499, 2), (65_500, 4), (151_936, 4)])
def test_bytes_of_a_token_match_megatron(vocab_size: int, size: int) -> None:
    assert disk.token_bytes(vocab_size) == size


def test_existing_files_reduce_the_needed_disk(
    demo: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    cfg = demo()
    need = make_plan(cfg).disk.total
    monkeypatch.setattr("launch.planning.disk.free_bytes", lambda path: need - 100)
    (warning,) = make_plan(cfg).warnings
    assert f"{cfg.run_dir} has 0.8 GiB free" in warning
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_bytes(bytes(200))
    assert make_plan(cfg).warnings == []


# Layouts and the verdict.


@pytest.mark.parametrize("overrides", [[DEPTH], [DEPTH, SMALL], ["experiment=llama3_1_8b_to_4b_width"]])
def test_suggested_layouts_are_valid(overrides: list[str]) -> None:
    run_plan = planned(*overrides, PUBLISHED)
    assert run_plan.layouts
    for layout in run_plan.layouts:
        values = {
            "parallel.tensor_model_parallel_size": layout.tensor,
            "parallel.pipeline_model_parallel_size": layout.pipeline,
            "parallel.context_parallel_size": layout.context,
            "micro_batch_size": layout.micro_batch_size,
            "recompute": layout.recompute.value,
            # Chosen for the plan's layout; on its own, another layout may get another one.
            "kd.chunk_tokens": run_plan.loss_chunk,
        }
        again = planned(*overrides, PUBLISHED, *(f"distill.{key}={value}" for key, value in values.items()))
        assert again.layout == layout
        assert layout.peak <= run_plan.cluster.gpu.memory_gib * GIB
        assert layout.tensor * layout.pipeline * layout.context * layout.data == 8


def test_an_moe_model_is_planned_with_sharded_experts() -> None:
    run_plan = planned(*MIXTURE)
    teacher = run_plan.teacher
    assert (teacher.parameters, teacher.active_parameters) == (30_532_122_624, 3_353_032_704)
    assert run_plan.layout.expert == 8
    assert "EP 8" in to_table(run_plan)
    experts = {layout.expert for layout in run_plan.layouts}
    assert max(experts) == 8
    # A token's FLOP are those of the experts that it is sent to: twice the products, and attention.
    products = teacher.active_parameters - 151_936 * 2048
    assert run_plan.work.flops_a_token.teacher == pytest.approx(2 * products + 2 * 4096 * 48 * 4096, rel=1e-3)
    best = run_plan.layouts[0]
    again = planned(
        *MIXTURE,
        f"distill.parallel.tensor_model_parallel_size={best.tensor}",
        f"distill.parallel.expert_model_parallel_size={best.expert}",
        f"distill.parallel.context_parallel_size={best.context}",
        f"distill.parallel.pipeline_model_parallel_size={best.pipeline}",
        f"distill.micro_batch_size={best.micro_batch_size}",
        f"distill.kd.chunk_tokens={run_plan.loss_chunk}",
    )
    assert again.layout == best
    assert again.fits


def test_the_first_layout_is_the_fastest() -> None:
    seconds = [layout.seconds for layout in planned(DEPTH).layouts]
    assert seconds == sorted(seconds)


def test_where_the_speed_is_not_known_the_first_layout_communicates_least() -> None:
    layouts = planned(DEPTH, "cluster.gpu.memory_gbs=null").layouts
    without = [layout for layout in layouts if layout.recompute is Recompute.none]
    assert layouts[: len(without)] == without
    sizes = [layout.tensor * layout.pipeline * layout.context for layout in without]
    assert sizes == sorted(sizes)
    # One GPU has no room for a whole student in training beside its teacher.
    assert sizes[0] > 1


def test_indivisible_sizes_are_reported() -> None:
    run_plan = planned(DEPTH)
    assert run_plan.undivided == ["pipeline_model_parallel_size=8: does not divide the teacher's 36 layers"]
    odd = planned(DEPTH, "distill.global_batch_size=510")
    assert any(reason.startswith("global_batch_size=510: not divisible by 4") for reason in odd.undivided)


@pytest.mark.parametrize(
    "overrides",
    [
        [DEPTH, PUBLISHED, "distill.parallel.tensor_model_parallel_size=1"],
        [DEPTH, PUBLISHED, SMALL, "distill.parallel.tensor_model_parallel_size=2"],
        ["experiment=qwen3_0_6b_one_gpu", PUBLISHED, ONE_RANK, "distill.seq_length=8192"],
    ],
)
def test_the_fix_makes_it_fit(overrides: list[str]) -> None:
    run_plan = planned(*overrides)
    assert run_plan.fits is False
    changes = re.findall(r"distill\.\S+=\S+", run_plan.fix)
    assert changes
    assert planned(*overrides, *changes).fits is True


def test_where_nothing_fits() -> None:
    run_plan = planned("experiment=qwen3_0_6b_one_gpu", PUBLISHED, ONE_RANK, "cluster.gpu.memory_gib=4")
    assert run_plan.fits is False
    assert run_plan.fix.startswith("no layout of 1 ranks fits: take more GPUs")
    assert "raise prune.pipeline_model_parallel_size" in run_plan.fix
    with pytest.raises(ConfigError, match=r"distill needs .* GiB a GPU for its tensors alone") as caught:
        run_plan.refuse_impossible(["prune", "distill"])
    assert len(caught.value.faults) == 1
    run_plan.refuse_impossible(["prune", "evaluate"])


def test_the_one_gpu_experiment_fits_its_gpu() -> None:
    run_plan = planned("experiment=qwen3_0_6b_one_gpu")
    assert run_plan.fits is True
    assert run_plan.cluster.gpu.name == "RTX 4090 24GB"


def test_a_time_limit_cuts_a_stage_into_jobs() -> None:
    jobs = {stage.stage: stage.jobs for stage in planned(DEPTH, AS_PUBLISHED, "cluster.time_limit=1-00:00:00").stages}
    assert jobs["distill"] == 32  # 756 hours
    assert jobs["importance"] == 1
    assert jobs["prepare_data"] is None


def test_more_than_half_in_one_round_is_warned_about() -> None:
    assert planned(DEPTH, "run_dir=/x").cut == pytest.approx(0.283, abs=1e-3)
    warnings = planned(DEPTH, "prune.num_layers=12").warnings
    assert any("pruning removes 57% of the parameters in round 1 of 1" in warning for warning in warnings)
    assert not any("pruning removes" in warning for warning in planned(DEPTH).warnings)


# What is printed.


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_table_that_fits_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = plan.main([f"experiment={name}", "cluster.time_limit=4:00:00"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 110
    assert lines[-1].startswith("whether it fits is not known" if name == "demo" else "fits the GPU: ")
    assert any("assumption" in line or "assumed" in line for line in lines)
    assert name == "demo" or any("not measured" in line for line in lines)


def test_columns_are_aligned() -> None:
    lines = to_table(planned(DEPTH)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("GiB a rank"))
    heading, distill, prune = lines[start : start + 3]
    assert len(heading) == len(distill) == len(prune)
    assert re.findall(r"\S+", heading)[-2:] == ["reserve*", "total"]


def test_json_has_the_documented_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([DEPTH, "--json", "--what-if"]) == 0
    printed = json.loads(capsys.readouterr().out)
    documented = re.findall(r"^(\w+) {2,}\S", (plan.__doc__ or "").partition("`--json`")[2], flags=re.MULTILINE)
    assert set(documented) <= set(printed)
    assert set(printed) - set(documented) == {"undivided"}  # described beside `layouts`
    assert set(printed["memory"]["prune"]) == {
        *("weights", "gradients", "optimizer", "teacher", "activations", "loss", "reserve", "total")
    }
    for memory in [*printed["memory"]["distill"], printed["memory"]["prune"]]:
        assert memory.pop("total") == sum(memory.values())


def test_the_kv_cache_of_the_student() -> None:
    settings = ("benchmark.batch_size=2", "benchmark.prompt_tokens=96", "benchmark.new_tokens=32")
    run_plan = planned(DEPTH, "quantize.formats=[fp8]", "benchmark.enabled=true", *settings)
    shape, cache = run_plan.student.shape, run_plan.kv_cache
    assert cache is not None
    # Keys and values of two bytes.
    assert cache.token == shape.num_layers * 2 * shape.num_query_groups * shape.kv_channels * 2
    assert cache.longest == cache.token * shape.max_position_embeddings
    assert cache.benchmark == cache.token * 2 * 128
    text = " ".join(to_table(run_plan).split())
    assert f"KV cache takes {cache.token / 1024:.1f} KiB a token in 16 bits:" in text
    halved = planned(DEPTH, "quantize.formats=[fp8]", "quantize.fp8_kv_cache=true")
    assert "in 16 bits, half of that in the quantized formats:" in " ".join(to_table(halved).split())
    # No hours are claimed for these stages, of which parts are known.
    hours_found = hours_by_stage(run_plan)
    assert [hours_found[name] for name in ("quantize.fp8", "evaluate.fp8", "benchmark")] == [None] * 3
    assert planned(DEPTH, "quantize.formats=[]", "benchmark.enabled=false").kv_cache is None
    unmeasured = planned(DEPTH, "quantize.formats=[fp8]", "benchmark.enabled=false").kv_cache
    assert unmeasured is not None
    assert unmeasured.benchmark is None


def test_a_plan_without_a_gpu_has_no_reserve_for_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["experiment=demo", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    for rank in [*memory["distill"], memory["prune"]]:
        assert rank.pop("reserve") == 0
        assert rank.pop("total") == sum(rank.values()) > 0


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["experiment=qwen3_0_6b_one_gpu", PUBLISHED, ONE_RANK, "distill.micro_batch_size=8"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("does not fit the GPU: set distill.micro_batch_size=4")
    assert plan.main([DEPTH, "distill.parallel.tensor_model_parallel_size=3"]) == 2
    assert "with distill.parallel.tensor_model_parallel_size=3 divides" in capsys.readouterr().err


def test_the_short_form() -> None:
    lines = summarize(planned(DEPTH, AS_PUBLISHED, "cluster.time_limit=1-00:00:00"))
    assert lines[0] == "plan: 8.19 B -> 5.88 B parameters (-28%), 28,600 steps, 89.97 B tokens"
    assert re.fullmatch(
        r"plan: 22\.\d of 79\.1 GiB a GPU \(H100 SXM 80GB\), 7\d\d\.\d hours, 6,0\d\d\.\d GPU-hours at 21% of its"
        r" peak \(cluster.gpu.mfu\), at least 33 jobs of 1-00:00:00",
        lines[1],
    )
    assert lines[2].startswith("plan: 706.1 GiB on disk, ")


def test_a_budget_is_planned_by_its_largest_candidate() -> None:
    searched = planned(DEPTH, "prune.num_layers=null", "prune.budget.params_fraction=0.7")
    found, student = searched.candidates, searched.student
    assert found.most == student.parameters <= 0.7 * searched.teacher.parameters
    assert 1 < found.shapes <= 64
    assert found.least < found.most
    assert f"the largest of {found.shapes} candidates" in to_table(searched)
    assert "-> at most" in summarize(searched)[0]
    # The winner's steps are not taken again: what successive halving adds is those of the others.
    successive_halving = "prune.successive_halving.round_tokens=314572800"  # 100 steps
    fought = planned(DEPTH, "prune.num_layers=null", "prune.budget.params_fraction=0.7", successive_halving)
    before, after = hours_by_stage(searched), hours_by_stage(fought)
    assert after["distill"] == pytest.approx(before["distill"] * (28600 - 200) / 28600)
    assert after["successive_halving"] == pytest.approx(before["distill"] * (4 * 100 + 2 * 100) / 28600)
    assert fought.disk.needed["checkpoints"] == 5 * searched.disk.needed["checkpoints"]


def test_rounds_are_suggested_for_large_cuts() -> None:
    (warning,) = [text for text in planned(DEPTH, "prune.num_layers=12").warnings if "pruning removes" in text]
    assert "3 rounds that each leave 76% (76% -> 57% -> 43% of the parameters)" in warning


def test_rounds_are_planned_each_with_its_own_student() -> None:
    in_rounds = planned(DEPTH, "prune.num_layers=12", "prune.rounds=[{steps: 5000, num_layers: 24}]")
    # 36 -> 24 -> 12 layers: 28 %, and 40 % of what is left.
    assert not any("pruning removes" in warning for warning in in_rounds.warnings)
    after, alone = hours_by_stage(in_rounds), hours_by_stage(planned(DEPTH))
    assert after["distill.round1"] == pytest.approx(alone["distill"] * 5000 / 28600)
    assert after["importance"] < after["importance.round1"] == alone["importance"]
    assert in_rounds.memory["distill.round1"] == planned(DEPTH).memory["distill"]
    assert in_rounds.disk.needed["checkpoints"] > planned(DEPTH, "prune.num_layers=12").disk.needed["checkpoints"]
    assert "distill.round1" in to_table(in_rounds)


ON_POLICY = "distill.on_policy={rounds: 2, steps: 143, lr: 1e-5, prompts_per_round: 1000, samples_per_prompt: 4}"


def test_on_policy_rounds_are_planned_except_for_their_generation() -> None:
    without, rounds = planned(DEPTH), planned(DEPTH, ON_POLICY)
    hours_of = hours_by_stage(rounds)
    assert hours_of["distill.on_policy1"] == hours_of["distill.on_policy2"] == pytest.approx(hours_of["distill"] / 200)
    assert hours_of["generate.on_policy1"] is None
    assert rounds.memory["distill.on_policy2"] == without.memory["distill"]
    student = 5_875_378_176
    added = {kind: size - without.disk.needed.get(kind, 0) for kind, size in rounds.disk.needed.items()}
    assert added == {
        "tokens": 0,
        "teacher": 0,
        "students": 2 * 2 * 2 * student,
        "checkpoints": 2 * 4 * 14 * student,
        # 64 tokens of a prompt and 128 of a completion.
        "completions": 2 * 4000 * 192 * (9 + 4),
    }
    assert "generate.on_policy2" in to_table(rounds)


def test_on_policy_rounds_cache_the_logits_of_their_own_sequences() -> None:
    cached = planned(DEPTH, ON_POLICY, "distill.teacher_logits=cached")
    hours_of = hours_by_stage(cached)
    assert hours_of["cache_logits.on_policy1"] == pytest.approx(hours_of["cache_logits"] / 200)
    alone = planned(DEPTH, "distill.teacher_logits=cached").disk.needed["signal"]
    assert cached.disk.needed["signal"] == pytest.approx(alone * 1.01)


def test_completions_that_a_round_repeats_are_warned_about() -> None:
    def warned(*more: str) -> list[str]:
        warnings = planned(DEPTH, ON_POLICY, "run_dir=/x", *more).warnings
        return [text for text in warnings if "on-policy rounds read each completion" in text]

    # 143 steps of 768 sequences, half of them completions, of which 4000 fill 4000 x 193 / 4096 sequences.
    (warning,) = warned()
    assert f"{143 * 768 / 2 / (4000 * 193 / 4096):.1f} times or more" in warning
    assert warned("distill.on_policy.prompts_per_round=300000") == []
    assert warned("distill.on_policy.prompts=[a.jsonl]") == []
