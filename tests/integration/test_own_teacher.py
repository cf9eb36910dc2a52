"""A teacher of another family, size and vocabulary than the model that is pruned, through the real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prune_distill.pipeline.artifact import read_manifest
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import METRICS
from tests.helpers import teachers, tiny, tolerance
from tests.helpers.teachers import Models

TWO_RANKS = "cluster.devices_per_node=2"
TP2 = (TWO_RANKS, "distill.parallel.tensor_model_parallel_size=2")
PP2 = (TWO_RANKS, "distill.parallel.pipeline_model_parallel_size=2")
TOP_K = 16
CACHED = ("distill.teacher_logits=cached", f"distill.cached_logits_top_k={TOP_K}")
PAIRS = "distill.kd.intermediate_pairs=[{student: 1, teacher: 4}, {student: 2, teacher: 6}]"
CORRECTION = (
    "distill.teacher_correction={max_steps: 12, seq_length: 128, global_batch_size: 8, micro_batch_size: 4, lr: 1e-3, "
    "min_lr: 1e-4, warmup_steps: 2, precision: fp32, save_every_n_steps: 10, val_every_n_steps: 12, val_batches: 4, "
    "log_every_n_steps: 1, num_workers: 0}"
)


@pytest.fixture(scope="module")
def models(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A Qwen3 model of 540 ids and a deeper and wider Llama of 530, both trained, with the demo's tokenizer."""
    demo = tiny.stages(finished, *tiny.DEPTH)["demo_model"].folder
    return teachers.train_models(demo, tmp_path_factory.mktemp("own_teacher"))


@pytest.fixture(scope="module")
def complete(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a complete run that prunes the Qwen3 model, taught by the Llama."""
    run_dir = tmp_path_factory.mktemp("complete") / "run"
    arguments = teachers.overrides(run_dir, models.qwen, models.corpus, f"teacher.hf_path={models.llama}")
    teachers.launch(arguments)
    return arguments


def copy(arguments: list[str], target: Path, *more: str) -> list[str]:
    """Copy a run without its distillation, and return its command line with more overrides."""
    (source,) = [Path(value.partition("=")[2]) for value in arguments if value.startswith("run_dir=")]
    tiny.copy_run(source, target)
    return [*(value for value in arguments if not value.startswith("run_dir=")), f"run_dir={target}", *more]


def distill(arguments: list[str]) -> list[float]:
    teachers.launch(arguments, "--until", "distill")
    return tiny.losses(teachers.stages(arguments)["distill"].folder)


def test_the_report_has_a_row_of_both_models(complete: list[str]) -> None:
    located = teachers.stages(complete)
    run_dir = located["report"].folder.parent
    report = tiny.report(run_dir)
    assert list(report["models"]) == ["teacher", "original", "pruned", "student"]
    teacher, original, student = (report["models"][name] for name in ("teacher", "original", "student"))
    assert (teacher["num_layers"], teacher["hidden_size"], teacher["num_attention_heads"]) == (6, 160, 10)
    assert (original["num_layers"], original["hidden_size"], student["num_layers"]) == (4, 128, 2)
    assert "agreement" not in teacher
    assert all(0 < report["models"][name]["agreement"]["kl"] < 5 for name in ("original", "pruned", "student"))
    assert student["agreement"]["kl"] < report["models"]["pruned"]["agreement"]["kl"]
    for check in ("import", "teacher_import", "export"):
        assert report["checks"][f"{check}_max_abs_logit_diff"] < tolerance.LOGITS
    assert list(report["benchmark"]["models"]) == ["original", "student"]
    page = (run_dir / "report" / "index.html").read_text()
    assert f"The student keeps {100 * student['params'] / original['params']:.0f} % of the original model" in page
    for other, whose in ((original, "the original model"), (teacher, "the teacher")):
        difference = student["val_loss"] - other["val_loss"]
        assert f"{abs(difference):.3f} {'above' if difference >= 0 else 'below'} {whose}" in page
    assert "Changes are relative to the original model." in page
    assert "The teacher is " in page
    card = (run_dir / student["hf_path"] / "README.md").read_text()
    assert "The teacher was " in card


def test_layouts_give_the_losses_of_one_rank(complete: list[str], tmp_path: Path) -> None:
    """Slices of 270 and 265 rows with tensor parallelism; hidden states of both widths between pipeline stages."""
    one_rank = tiny.losses(teachers.stages(complete)["distill"].folder)
    for name, layout in {"tp2": TP2, "pp2": PP2}.items():
        assert distill(copy(complete, tmp_path / name, *layout)) == pytest.approx(one_rank, abs=tolerance.LOSS), name


def test_a_teacher_with_more_ids(models: Models, tmp_path: Path) -> None:
    arguments = teachers.overrides(tmp_path / "run", models.llama, models.corpus, f"teacher.hf_path={models.qwen}")
    one_rank = distill(arguments)
    assert distill(copy(arguments, tmp_path / "tp2", *TP2)) == pytest.approx(one_rank, abs=tolerance.LOSS)
    assert one_rank[-1] < one_rank[0]


def test_cached_logits_give_the_losses_of_the_live_teacher(complete: list[str], tmp_path: Path) -> None:
    """Made on one rank or on two, and read on two, where the student's slices are not those of the teacher."""
    live = distill(copy(complete, tmp_path / "live", f"distill.kd.top_k={TOP_K}"))
    # fp16 moves a log-probability by 5e-4 nats in the mean, to both sides.
    for layout in ((), TP2):
        cached = distill(copy(complete, tmp_path / f"cached{len(layout)}", *CACHED, *layout))
        assert cached == pytest.approx(live, rel=0, abs=1e-4)


def test_the_cache_is_made_in_the_teachers_layout(complete: list[str], tmp_path: Path) -> None:
    """Two data-parallel ranks train the student on the cache of a teacher that both ranks share."""
    live = distill(copy(complete, tmp_path / "live", f"distill.kd.top_k={TOP_K}"))
    layouts = {
        "tp2": ("teacher.parallel.tensor_model_parallel_size=2",),
        # Micro batches of 5 do not divide a shard of 12.
        "pp2": ("teacher.parallel.pipeline_model_parallel_size=2", "teacher.micro_batch_size=5"),
    }
    for name, layout in layouts.items():
        two_shards = (TWO_RANKS, "distill.cached_logits_shard_sequences=12")
        arguments = copy(complete, tmp_path / name, *CACHED, *two_shards, *layout)
        assert distill(arguments) == pytest.approx(live, rel=0, abs=1e-4), name
        # Two replicas would make both shards at the same time.
        folder = teachers.stages(arguments)["cache_logits"].folder
        assert [line["step"] for line in read_metrics(folder / METRICS)] == [12, 24], name


def test_pairs_of_layers_project_the_students_width(complete: list[str], tmp_path: Path) -> None:
    arguments = copy(complete, tmp_path / "run", PAIRS)
    losses = distill(arguments)
    plain = tiny.losses(teachers.stages(complete)["distill"].folder)
    # 1 - cosine similarity of a random projection is about 1.
    assert losses[0] == pytest.approx(plain[0] + 1, abs=0.2)
    folder = teachers.stages(arguments)["distill"].folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    hidden = [line["hidden_loss"] for line in lines if "hidden_loss" in line]
    assert hidden[-1] < hidden[0] - 0.01
    outside = [*arguments, PAIRS.replace("teacher: 6", "teacher: 7")]
    refused = teachers.launch(outside, check=False)
    assert refused.returncode == 2
    assert "the teacher has no layers [7]" in refused.stderr


@pytest.mark.usefixtures("real_start")
def test_a_killed_training_resumes(complete: list[str], tmp_path: Path) -> None:
    arguments = copy(complete, tmp_path / "run", *TP2)
    folder = teachers.kill_and_resume(arguments)
    one_rank = tiny.losses(teachers.stages(complete)["distill"].folder)
    assert tiny.losses(folder) == pytest.approx(one_rank, abs=tolerance.LOSS)


def test_a_corrected_teacher_is_exported_as_itself(complete: list[str], tmp_path: Path) -> None:
    arguments = copy(complete, tmp_path / "run", CORRECTION, "distill.swap_teacher_at_step=3")
    teachers.launch(arguments, "--until", "evaluate")
    located = teachers.stages(arguments)
    plain = tiny.losses(teachers.stages(complete)["distill"].folder)
    swapped = tiny.losses(located["distill"].folder)
    assert swapped[:3] == pytest.approx(plain[:3], rel=0, abs=tolerance.RESUMED)
    assert abs(swapped[3] - plain[3]) > 1e-3
    found = (read_manifest(located["evaluate"].folder) or {})["metrics"]
    assert list(found) == ["teacher", "original", "corrected_teacher", "pruned", "student"]
    assert found["corrected_teacher"]["params"] == found["teacher"]["params"]
    assert found["corrected_teacher"]["val_loss"] < found["teacher"]["val_loss"]
    config = json.loads((located["nemo_to_hf.teacher"].folder / "corrected_teacher" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llama", 530)


def test_a_chain_prunes_the_student_with_the_first_teacher(complete: list[str], models: Models, tmp_path: Path) -> None:
    student = teachers.stages(complete)["nemo_to_hf"].folder / "student"
    arguments = teachers.overrides(
        tmp_path / "run", student, models.corpus, f"teacher.hf_path={models.llama}", "prune.num_layers=1"
    )
    teachers.launch(arguments)
    found = tiny.report(tmp_path / "run")["models"]
    assert [found[name]["num_layers"] for name in ("teacher", "original", "student")] == [6, 2, 1]
    first = tiny.report(teachers.stages(complete)["report"].folder.parent)["models"]
    assert found["original"]["val_loss"] == pytest.approx(first["student"]["val_loss"], abs=tolerance.LOSS)


def test_bad_teachers_are_refused_before_anything_starts(models: Models, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(models.llama, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (token for token, id_ in vocabulary.items() if id_ in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    cases = {
        f"teacher.hf_path={other}": "differ in the ids 300 (",
        f"teacher.hf_path={models.llama} teacher.family=qwen3": "set teacher.family=llama",
        f"teacher.hf_path={tmp_path}/nowhere": "teacher.hf_path",
        f"teacher.hf_path={models.llama} distill.loss=ce": "set teacher.hf_path=null",
        f"teacher.hf_path={models.llama} distill.kd.implementation=triton": "set distill.kd.implementation=chunked",
        f"teacher.hf_path={models.llama} distill.kd.top_k=530": "covers the whole vocabulary of 530",
        f"teacher.hf_path={models.llama} {TWO_RANKS} distill.parallel.tensor_model_parallel_size=4": "tensor_model",
    }
    for more, expected in cases.items():
        arguments = teachers.overrides(tmp_path / "run", models.qwen, models.corpus, *more.split())
        refused = teachers.launch(arguments, check=False)
        assert refused.returncode == 2, more
        assert expected in refused.stderr, more
        assert not (tmp_path / "run").exists()
