"""Evaluation and benchmark of a tiny run's models, through the real command lines."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prune_distill.config.values import OWN_TASK
from prune_distill.pipeline.artifact import read_manifest, update_record
from tests.helpers import tiny

# Models by stage: a control has its own stage.
MODELS = {"evaluate": ("teacher", "pruned", "student"), "evaluate.ce": ("ce",)}
# Tolerance for another order of sums over ranks.
SHARED = 1e-9


def strict(path: Path) -> Any:
    """Read a JSON file; reject NaN and Infinity, which are not JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path}: {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=tiny.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without measurements."""
    run_dir = tmp_path / "run"
    shutil.copytree(
        finished, run_dir, symlinks=True, ignore=shutil.ignore_patterns("evaluate*", "benchmark*", "report", ".lock")
    )
    resolved = yaml.safe_load((run_dir / "resolved.yaml").read_text())
    (run_dir / "resolved.yaml").write_text(yaml.safe_dump({**resolved, "run_dir": str(run_dir)}))
    return run_dir


def test_the_entry_of_a_model(finished: Path) -> None:
    evaluation: dict[str, Any] = {}
    for stage, models in MODELS.items():
        folder = tiny.stages(finished, *tiny.DEPTH)[stage].folder
        measured = strict(folder / "evaluation.json")
        assert tuple(measured) == models
        assert (read_manifest(folder) or {})["metrics"] == measured
        evaluation |= measured
        samples = strict(folder / "samples.json")
        assert len(samples) == 2
        assert all(set(sample["texts"]) == {*models} and sample["prompt"] and sample["reference"] for sample in samples)
    for name, model in evaluation.items():
        assert model["perplexity"] == pytest.approx(math.exp(model["val_loss"]))
        assert ("agreement" in model) == (name != "teacher")
        assert model["tasks"][OWN_TASK]["samples"] == 12
        for metric in ("acc", "acc_norm", "acc_mutual_info"):
            score = model["tasks"][OWN_TASK][metric]
            assert 0 <= score["value"] <= 1
            assert score["stderr"] > 0 or score["value"] in (0, 1)
    # KL(teacher || model) and cross-entropies use the same tokens, and training reduced the divergence.
    assert 0 < evaluation["student"]["agreement"]["kl"] < evaluation["pruned"]["agreement"]["kl"]
    assert 0 < evaluation["pruned"]["agreement"]["top1"] < evaluation["student"]["agreement"]["top1"] < 1


def test_the_recovery_curve_starts_at_the_pruned_model_and_ends_at_the_student(finished: Path) -> None:
    stages = tiny.stages(finished, *tiny.DEPTH)
    evaluation = strict(stages["evaluate"].folder / "evaluation.json")
    curve = strict(stages["evaluate"].folder / "recovery.json")
    kept = sorted(int(path.name.partition("=")[2]) for path in (stages["distill"].folder / "checkpoints").iterdir())
    assert [point["step"] for point in curve] == [0, *kept, tiny.DISTILL["max_steps"]]
    assert [point["tokens"] for point in curve] == [point["step"] * 4 * 128 for point in curve]
    for point, name in ((curve[0], "pruned"), (curve[-1], "student")):
        assert {key: point[key] for key in ("val_loss", "agreement", "tasks")} == {
            key: evaluation[name][key] for key in ("val_loss", "agreement", "tasks")
        }
    assert list((stages["evaluate"].folder / "recovery").iterdir()) == []


def test_scores_equal_those_of_the_plain_harness(finished: Path) -> None:
    """On the same exported model and task with the same batch size, exactly."""
    located = tiny.stages(finished, *tiny.DEPTH)
    folder, batch_size = located["evaluate"].folder, located["evaluate"].cfg.evaluate.task_batch_size
    model = located["nemo_to_hf"].folder / "student"
    done = python("tests.helpers.harness_directly", model, folder / "tasks", OWN_TASK, str(batch_size))
    assert done.returncode == 0, done.stderr[-3000:]
    directly = json.loads(done.stdout.splitlines()[-1])
    ours = strict(folder / "evaluation.json")["student"]["tasks"][OWN_TASK]
    for metric in ("acc", "acc_norm"):
        assert ours[metric] == {"value": directly[f"{metric},none"], "stderr": directly[f"{metric}_stderr,none"]}


def test_a_killed_evaluation_resumes_with_missing_measurements(
    finished: Path, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed on one rank, it goes on with two, which share the work: the results are those of one. Of two tasks in the
    user's folder one has no data, and of the models one has a non-finite weight."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = _task_folder(tmp_path / "mine", finished)
    more = (*tiny.DEPTH, f"evaluate.task_folder={tasks}", "evaluate.tasks=[with_data, without_data]")
    _spoil(tiny.stages(run_copy, *more)["nemo_to_hf"].folder, "student/model.safetensors")
    folder = tiny.stages(run_copy, *more)["evaluate"].folder
    killed = subprocess.Popen(
        tiny.command(run_copy, *more, "--until", "evaluate"),
        env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    tiny.wait_for("measured/teacher/held_out.json", folder, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (folder / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("measured/*/*.json")}
    tiny.launch(run_copy, *more, "cluster.devices_per_node=2", "--until", "evaluate")
    assert before == {path: path.stat().st_mtime_ns for path in before}

    unbroken = strict(tiny.stages(finished, *tiny.DEPTH)["evaluate"].folder / "evaluation.json")
    evaluation = strict(folder / "evaluation.json")
    for name in ("teacher", "pruned"):
        ours, theirs = evaluation[name], unbroken[name]
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=SHARED)
        if name != "teacher":
            assert ours["agreement"] == pytest.approx(theirs["agreement"], rel=SHARED)
        assert ours["tasks"][OWN_TASK] == theirs["tasks"][OWN_TASK]
        assert ours["tasks"]["with_data"]["samples"] == 12
        assert set(ours["tasks_failed"]) == {"without_data"}
        assert "download the data set to the Hub's cache or " in ours["tasks_failed"]["without_data"]
    assert evaluation["student"]["val_loss"] is None
    assert evaluation["student"]["agreement"]["kl"] is None


def _task_folder(folder: Path, finished: Path) -> Path:
    """Two tasks like the run's own, of data sets as they are on the Hub; one data set is there."""
    own = tiny.stages(finished, *tiny.DEPTH)["evaluate"].folder / "tasks"
    definition = yaml.safe_load((own / f"{OWN_TASK}.yaml").read_text())
    del definition["dataset_kwargs"]
    (folder / "somebody" / "with_data").mkdir(parents=True)
    shutil.copyfile(own / f"{OWN_TASK}.jsonl", folder / "somebody" / "with_data" / "test.jsonl")
    for name in ("with_data", "without_data"):
        text = yaml.safe_dump({**definition, "task": name, "dataset_path": f"somebody/{name}"})
        (folder / f"{name}.yaml").write_text(text)
    return folder


def _spoil(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / name)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / name, metadata={"format": "pt"})
    update_record(folder, [name])


def test_every_checkpoint_is_measured_during_training(finished: Path, tmp_path: Path) -> None:
    """The training keeps the newest and the best checkpoint; the watcher measures all, each once."""
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    for left_over in (*run_dir.glob("evaluate*"), *run_dir.glob("benchmark*")):
        shutil.rmtree(left_over)
    command = [sys.executable, "-m", "recipes.recovery", str(run_dir), "--watch", "--seconds", "0.05"]
    watcher = subprocess.Popen(
        command, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert watcher.stdout is not None
    first = watcher.stdout.readline()
    assert "watching" in first, first + watcher.stdout.read()
    tiny.launch(run_dir, *tiny.DEPTH, "--until", "distill")
    output, _ = watcher.communicate(timeout=600)  # it gives way to all other processes
    assert watcher.returncode == 0, output
    stages = tiny.stages(run_dir, *tiny.DEPTH)
    curve = strict(stages["evaluate"].folder / "recovery.json")
    assert [point["step"] for point in curve] == [0, 2, 4, 6], output
    assert [output.count(f"recovery/step={step}: held-out loss") for step in (2, 4)] == [1, 1]
    unbroken = strict(tiny.stages(finished, *tiny.DEPTH)["evaluate"].folder / "recovery.json")
    ends = {point["step"]: point["val_loss"] for point in unbroken if point["step"] in (0, 6)}
    assert {point["step"]: point["val_loss"] for point in curve if point["step"] in ends} == pytest.approx(
        ends, abs=1e-5
    )


Benchmark = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def benchmark(finished: Path, tmp_path: Path) -> Benchmark:
    """`python -m recipes.benchmark` on the finished run's teacher and student."""
    models = tiny.report(finished)["models"]
    named = [f"{name}={finished / models[name]['hf_path']}" for name in ("teacher", "student")]
    return lambda *more: python("recipes.benchmark", "--models", *named, "--out", tmp_path / "out", *more)


def test_benchmark_of_two_models(finished: Path, benchmark: Benchmark, tmp_path: Path) -> None:
    sizes = ("--batch-size", "2", "--prompt-tokens", "16", "--new-tokens", "4", "--rounds", "2")
    done = benchmark(*sizes, "--cost-per-hour", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    by_itself = strict(tmp_path / "out" / "benchmark.json")
    stage_run_folder = strict(tiny.stages(finished, *tiny.DEPTH)["benchmark"].folder / "benchmark.json")
    assert set(by_itself) == set(stage_run_folder)
    assert str(finished) not in json.dumps(stage_run_folder)
    for result in (by_itself, stage_run_folder):
        assert list(result["models"]) == ["teacher", "student"]
        for layers, model in zip((4, 2), result["models"].values(), strict=True):
            spreads = [value for value in model.values() if isinstance(value, dict)]
            assert len(spreads) == 3
            assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in spreads)
            # Keys and values in fp32 of two sequences; the last token is not in the cache.
            assert model["kv_cache_bytes"] == layers * 2 * 2 * 48 * 4 * 2 * (16 + 4 - 1)
            assert model["peak_memory_bytes"] > model["weights_bytes"] + model["kv_cache_bytes"]
        ratio = result["ratios"]["student"]
        assert ratio["memory"] < 1
        assert ratio["prefill"]["median"] > 0
    cost = by_itself["models"]["teacher"]["cost_per_million_tokens"]
    assert cost > 0
    assert stage_run_folder["models"]["teacher"]["cost_per_million_tokens"] is None
    assert stage_run_folder["models"]["teacher"]["weights_bytes"] == by_itself["models"]["teacher"]["weights_bytes"]


@pytest.mark.parametrize(
    ("option", "output"),
    [
        (("--batch-size", "10000000"), "GiB are needed (teacher "),
        (("--prompt-tokens", "4000"), "exceeds the 2048 tokens of teacher"),
        (("--new-tokens", "1"), "leaves nothing to time"),
    ],
)
def test_faults_of_a_benchmark_are_one_line(benchmark: Benchmark, option: tuple[str, str], output: str) -> None:
    done = benchmark(*option)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(("error:", "  - "))
    assert output in done.stderr
