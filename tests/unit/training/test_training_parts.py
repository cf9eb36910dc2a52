"""Learning rates, loss checks, checkpoints, tokenizers, trackers and utilization, without NeMo."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.config.values import utilization_meter
from prune_distill.data.folder import DataFolder
from prune_distill.errors import InputError
from prune_distill.model.flops import Meter, sequence_flops
from prune_distill.model.tokenizer_check import check_tokenizers
from prune_distill.schema import Family, Loss, Mlflow, Phase, Recompute, Schedule, Shape, Training, WeightsAndBiases
from prune_distill.schema.schedules import learning_rate
from prune_distill.training.checkpoints import newest_checkpoint, select_superfluous
from prune_distill.training.loss_guard import MIN_LOSSES, find_loss_fault
from prune_distill.training.trackers import Trackers


def rates(**values: Any) -> list[float]:
    sizes: dict[str, Any] = {"max_steps": 10, "seq_length": 8, "global_batch_size": 4, "lr": 1.0, "min_lr": 0.1}
    cfg = Training(**{**sizes, **values})
    return [learning_rate(cfg, step) for step in range(cfg.max_steps + 1)]


def test_the_cosine_schedule_matches_nemo() -> None:
    def nemo(step: int) -> float:  # nemo/core/optim/lr_scheduler.py:361-390, with 2 steps of warm-up
        return (step + 1) / 3 if step <= 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2

    assert rates(warmup_steps=2) == pytest.approx([nemo(step) for step in range(11)])


def test_the_linear_schedule() -> None:
    expected = [1.0, 0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19, 0.1]
    assert rates(schedule=Schedule.linear) == pytest.approx(expected)


def test_the_wsd_schedule() -> None:
    expected = [0.5, *[1.0] * 6, 0.775, 0.55, 0.325, 0.1]
    assert rates(schedule=Schedule.wsd, warmup_steps=1, decay_steps=4) == pytest.approx(expected)


def test_a_phase_has_a_schedule_of_its_own() -> None:
    phases = [Phase(max_steps=4), Phase(max_steps=6, lr=0.4, min_lr=0.4)]
    expected = [1.0, 0.775, 0.55, 0.325, *[0.4] * 7]
    assert rates(schedule=Schedule.linear, phases=phases) == pytest.approx(expected)


def test_losses_that_stop_a_training() -> None:
    usual = deque([2.0, 1.0, *[1.5] * MIN_LOSSES])
    assert find_loss_fault(14.9, usual, 10.0) is None
    assert find_loss_fault(15.1, usual, 10.0) == "the loss is 15.1, more than 10 times the median of the last 12, 1.5"
    assert find_loss_fault(1e9, usual, None) is None
    assert find_loss_fault(1e9, deque([1.5] * (MIN_LOSSES - 1)), 10.0) is None  # too few to tell
    for loss in (math.nan, math.inf):
        assert find_loss_fault(loss, deque(), None) == f"the loss is {loss}"


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step={step}").mkdir()
    (tmp_path / ".partial.step=12").mkdir()
    (tmp_path / "step=99").touch()

    def kept(keep: int, val_losses: dict[int, float]) -> set[int]:
        gone = select_superfluous(tmp_path, keep, val_losses)
        return {2, 4, 6, 8, 10} - {int(folder.name[5:]) for folder in gone}

    assert newest_checkpoint(tmp_path) == tmp_path / "step=10"
    assert kept(1, {}) == {10}
    assert kept(2, {3: 0.1, 4: 0.5, 8: 0.7}) == {4, 8, 10}  # step 3 was validated, but not saved
    assert kept(1, {4: 0.5, 10: 0.4}) == {10}
    assert kept(9, {4: 0.5}) == {2, 4, 6, 8, 10}


def _checkpoint(folder: Path, vocab: Any, merges: Any, added: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir()
    content = {"model": {"vocab": vocab, "merges": merges}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_tokenizers_are_compared_by_content(tmp_path: Path) -> None:
    student = _checkpoint(tmp_path / "student", {"a": 0, "b": 1, "ab": 2}, ["a b"])
    check_tokenizers(student, _checkpoint(tmp_path / "same", {"ab": 2, "b": 1, "a": 0}, [["a", "b"]], []))
    for name, other in {
        "swapped": _checkpoint(tmp_path / "swapped", {"a": 1, "b": 0, "ab": 2}, ["a b"]),
        "more": _checkpoint(tmp_path / "more", {"a": 0, "b": 1, "ab": 2}, ["a b"], [{"content": "<e>", "id": 3}]),
    }.items():
        with pytest.raises(InputError, match=rf"{name} \(teacher\) differ in the ids"):
            check_tokenizers(student, other)
    with pytest.raises(InputError, match="in their merges"):
        check_tokenizers(student, _checkpoint(tmp_path / "merges", {"a": 0, "b": 1, "ab": 2}, []))


def test_phase_weights_are_divided_among_the_parts_of_a_source() -> None:
    parts = [
        {"prefix": "a-0", "source": "a", "tokens": 30, "documents": 3, "weight": 1.0},
        {"prefix": "a-1", "source": "a", "tokens": 10, "documents": 1, "weight": 1.0},
        {"prefix": "b-0", "source": "b", "tokens": 50, "documents": 5, "weight": 1.0},
    ]
    totals = {"a": {"tokens": 40}, "b": {"tokens": 50}}
    folder = DataFolder(Path("x"), 10, 0, parts, 1, 1, 1, totals, {})
    assert folder.weighted({"a": 2.0, "b": 1.0}).train_paths == ["1.5", "x/a-0", "0.5", "x/a-1", "1.0", "x/b-0"]
    assert folder.weighted({"b": 1.0, "a": 0.0}).train_paths == ["x/b-0"]


def test_tensorboard_and_a_resume_after_a_kill(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed = Trackers(Training(), tmp_path, step=0)
    for step in (1, 2, 3):
        killed.write({"loss": float(step)}, step)
    resumed = Trackers(Training(), tmp_path, step=1)
    resumed.write({"loss": 20.0}, 2)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_weights_and_biases_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finished")
    )
    service = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", service)
    folder = tmp_path / "run" / "distill-1"
    trackers = Trackers(Training(wandb=WeightsAndBiases(project="p")), folder, step=0)
    trackers.write({"loss": 1.0}, 5)
    trackers.close()
    asked, *rest = calls
    assert (asked["project"], asked["id"], asked["resume"]) == ("p", "run-distill-1", "allow")
    assert rest == [({"loss": 1.0}, 5), "finished"]


def test_mlflow_resumes_the_same_run_and_survives_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []

    def start_run(run_id: str | None, run_name: str | None) -> Any:
        calls.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def log_metrics(values: dict[str, float], step: int) -> None:
        raise ConnectionError("no such host")

    names = {"set_tracking_uri": calls.append, "set_experiment": calls.append, "end_run": lambda: None}
    service = SimpleNamespace(start_run=start_run, log_metrics=log_metrics, **names)
    monkeypatch.setitem(sys.modules, "mlflow", service)
    cfg = Training(mlflow=Mlflow(tracking_uri="http://localhost:1", experiment="e"))
    for _ in range(2):
        trackers = Trackers(cfg, tmp_path / "run" / "distill-1", step=0)
        trackers.write({"loss": 1.0}, 5)
        trackers.close()
    assert calls == ["http://localhost:1", "e", (None, "run-distill-1"), "http://localhost:1", "e", ("abc", None)]
    assert "metrics of step 5 were not written" in caplog.text


def test_utilization_is_model_flops_over_peak() -> None:
    shape = Shape(2, 8, 16, 2, 1, 4, 32, 64, False)
    flops = sequence_flops(16, Recompute.none, Loss.kd, Family.qwen3, shape, shape).total
    meter = Meter(Loss.kd, Family.qwen3, shape, shape, peak=100.0 * flops)
    assert meter.utilization(50.0, 16) == pytest.approx(0.5)
    assert utilization_meter(compose(["experiment=demo"])) is None
    cfg = compose(["experiment=qwen3_8b_to_6b_depth", "cluster.devices_per_node=8"])
    known = utilization_meter(cfg)
    assert known is not None
    assert cfg.cluster.gpu is not None
    assert known.peak == 8e12 * cfg.cluster.gpu.bf16_tflops
