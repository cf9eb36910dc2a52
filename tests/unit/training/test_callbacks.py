"""Callbacks of a training without NeMo: checkpoints, pauses, loss checks, metrics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prune_distill.errors import InputError
from prune_distill.pipeline.integrity import checkpoint_damage
from prune_distill.pipeline.metrics_file import loss_gain, read_metrics
from prune_distill.pipeline.names import find_checkpoints
from prune_distill.pipeline.outputs import digests
from prune_distill.schema import Phase, Training
from prune_distill.training import checkpoints, loss_guard, metrics, stop_file
from prune_distill.training.checkpoints import Checkpoints, _record, _writer_rank, resume_point
from prune_distill.training.loss_guard import MIN_LOSSES, WINDOW, LossGuard
from prune_distill.training.metrics import MetricsWriter
from prune_distill.training.stop_file import StopFile, is_pause_requested

CFG = Training(
    max_steps=10,
    seq_length=8,
    global_batch_size=4,
    lr=1.0,
    min_lr=0.1,
    save_every_n_steps=3,
    keep_checkpoints=2,
    async_save=False,
    log_every_n_steps=4,
    phases=[Phase(max_steps=6), Phase(max_steps=4, seq_length=16)],
)


class Trainer:
    """The part of Lightning's trainer that callbacks use; it saves a file of weights and a context."""

    def __init__(self, step: int = 0) -> None:
        self.global_step = step
        self.strategy = SimpleNamespace(barrier=lambda: None)
        self.callback_metrics: dict[str, float] = {}
        self.optimizers = [SimpleNamespace(param_groups=[{"lr": 0.25}])]
        self.should_stop = False
        self.val_check_batch = 5
        self.limit_val_batches = 1.0


def saver(tmp_path: Path, cfg: Training = CFG) -> Checkpoints:
    return Checkpoints(cfg, tmp_path / "checkpoints", tmp_path / "nemo", tmp_path / "metrics.jsonl")


def partial_of(target: Path) -> Path:
    """Write a checkpoint that is not declared yet."""
    partial = target.with_name(f".partial.{target.name}")
    (partial / "weights").mkdir(parents=True)
    (partial / "context").mkdir()
    (partial / "weights" / "__0_0.distcp").write_text(f"weights of {target.name}")
    (partial / "context" / "model.yaml").write_text("model")
    return partial


def declare(saves: Checkpoints, step: int) -> None:
    target = saves.folder / f"step={step}"
    saves._declare(Trainer(step), partial_of(target), target, weights_only=False)


@pytest.mark.parametrize(("keep_best", "kept"), [(True, [2, 6, 8]), (False, [6, 8])])
def test_keep_best_keeps_the_best_checkpoint(tmp_path: Path, keep_best: bool, kept: list[int]) -> None:
    losses = {2: 1.0, 4: 1.5, 6: 2.0, 8: 3.0}
    lines = [{"step": step, key: loss} for step, loss in losses.items() for key in ("val_loss", "loss")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    saves = saver(tmp_path, dataclasses.replace(CFG, keep_best=keep_best))
    for step in losses:
        declare(saves, step)
    assert list(find_checkpoints(saves.folder)) == kept


def test_a_declared_checkpoint_has_a_record_and_replaces_one_of_its_name(tmp_path: Path) -> None:
    saves = saver(tmp_path)
    declare(saves, 3)
    checkpoint = saves.folder / "step=3"
    (checkpoint / "stale").touch()
    declare(saves, 3)
    assert not (checkpoint / "stale").exists()
    assert checkpoint_damage(checkpoint) is None
    record = json.loads((checkpoint / "outputs.json").read_text())
    assert record == digests(checkpoint, ["context/model.yaml", "weights/__0_0.distcp"])
    assert [path.name for path in saves.folder.iterdir()] == ["step=3"]
    saves._declare(Trainer(10), partial_of(tmp_path / "nemo"), tmp_path / "nemo", weights_only=True)
    assert not (tmp_path / "nemo" / "outputs.json").exists()


def test_when_checkpoints_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, str, bool]] = []

    def write(self: Any, trainer: Any, target: Path, weights_only: bool) -> None:
        written.append((trainer.global_step, target.name, weights_only))

    monkeypatch.setattr(Checkpoints, "_write", write)
    saves, trainer = saver(tmp_path, dataclasses.replace(CFG, max_steps=9)), Trainer(3)
    saves.on_train_start(trainer, None)
    for step in (3, 4, 5, 6, 6, 9):  # resumed at step 3
        trainer.global_step = step
        saves.on_train_batch_end(trainer, None, None, None, 0)
    assert written == [(6, "step=6", False)]
    trainer.global_step = 8
    saves.on_train_end(trainer, None)  # paused
    assert len(written) == 1
    trainer.global_step = 9
    saves.on_train_end(trainer, None)
    assert written[1:] == [(9, "nemo", True)]


def test_leftovers_of_a_killed_training_are_removed(tmp_path: Path) -> None:
    saves = saver(tmp_path)
    declare(saves, 3)
    partial_of(saves.folder / "step=6")
    (saves.folder / ".removed.step=1").mkdir()
    (saves.folder / ".damaged.step=2").mkdir()
    saves.on_train_start(Trainer(3), None)
    assert sorted(path.name for path in saves.folder.iterdir()) == [".damaged.step=2", "step=3"]


def test_a_training_resumes_from_the_newest_undamaged_checkpoint(tmp_path: Path) -> None:
    saves = saver(tmp_path, dataclasses.replace(CFG, keep_checkpoints=9))
    assert resume_point(saves.folder) is None
    for step in (3, 6, 12):
        declare(saves, step)
    assert resume_point(saves.folder) == saves.folder / "step=12"
    for step in (6, 12):
        (saves.folder / f"step={step}" / "weights" / "__0_0.distcp").write_text("weights of sTep=6")
    assert resume_point(saves.folder) == saves.folder / "step=3"
    assert {path.name for path in saves.folder.iterdir()} == {"step=3", ".damaged.step=6", ".damaged.step=12"}
    (saves.folder / "step=3" / "context" / "model.yaml").unlink()
    with pytest.raises(InputError, match=r"step=3.*model\.yaml"):
        resume_point(saves.folder)
    assert (saves.folder / "step=3").exists()  # whether to lose it is the user's decision


def test_each_rank_records_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"weights/__0_0.distcp": 0, "weights/__12_1.distcp": 12, "__3_0.distcp": 3, "weights/.metadata": 0}
    names |= {"weights/x__1_0.distcp": 0, "weights/__1_0.distcp.tmp": 0, "context/io.json": 0}
    assert {name: _writer_rank(name) for name in names} == names
    for name in ("weights/__0_0.distcp", "weights/__1_0.distcp", "context"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    monkeypatch.setattr(checkpoints, "rank", lambda: 1)
    assert list(_record(tmp_path)) == ["weights/__1_0.distcp"]
    monkeypatch.setattr(checkpoints, "rank", lambda: 0)
    assert list(_record(tmp_path)) == ["context", "weights/__0_0.distcp"]


def test_a_stop_file_saves_and_ends_the_training(tmp_path: Path) -> None:
    saved: list[int] = []
    stop = StopFile(tmp_path, 10, lambda trainer: saved.append(trainer.global_step))
    trainer = Trainer(4)
    stop.on_train_batch_end(trainer, None, None, None, 0)
    assert (saved, trainer.should_stop) == ([], False)
    assert not is_pause_requested(tmp_path)
    (tmp_path / "stop").touch()
    assert is_pause_requested(tmp_path)
    stop.on_train_batch_end(trainer, None, None, None, 0)
    assert (saved, trainer.should_stop, trainer.limit_val_batches) == ([4], True, 0)
    due = Trainer(5)
    stop.on_train_batch_end(due, None, None, None, 0)
    assert (due.should_stop, due.limit_val_batches) == (True, 1.0)  # a validation is due
    last = Trainer(10)
    stop.on_train_batch_end(last, None, None, None, 0)
    assert (saved, last.should_stop) == ([4, 5], False)


@pytest.mark.parametrize(("step", "state"), [(9, "paused"), (10, "done"), (11, "done")])
def test_the_state_file_of_a_training(tmp_path: Path, step: int, state: str) -> None:
    (tmp_path / "stop").touch()
    StopFile(tmp_path, 10, lambda trainer: None).on_train_end(Trainer(step), None)
    assert json.loads((tmp_path / "state.json").read_text()) == {"state": state, "step": step}
    assert not (tmp_path / "stop").exists()


def test_only_the_first_rank_looks_for_the_stop_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stop").touch()
    monkeypatch.setattr(stop_file, "rank", lambda: 1)
    assert not is_pause_requested(tmp_path)
    StopFile(tmp_path, 10, lambda trainer: None).on_train_end(Trainer(10), None)
    assert (tmp_path / "stop").exists()
    assert not (tmp_path / "state.json").exists()


def guard(tmp_path: Path, documents: Callable[[int], list[int]] = lambda step: [step, 7], **changes: Any) -> LossGuard:
    batches: Any = SimpleNamespace(documents=documents, data=SimpleNamespace(folder=tmp_path / "data"))
    return LossGuard(dataclasses.replace(CFG, max_loss_ratio=2.0, **changes), batches, tmp_path, "distill")


def test_a_bad_loss_stops_training_and_names_its_documents(tmp_path: Path) -> None:
    judge, trainer = guard(tmp_path, skip_steps=[[2, 3]]), Trainer(0)

    def step(loss: float) -> None:
        trainer.global_step += 1
        trainer.callback_metrics["reduced_train_loss"] = loss
        judge.on_train_batch_end(trainer, None, None, None, 0)

    for _ in range(MIN_LOSSES - 1):
        step(1.0)
    step(99.0)  # too few losses before it
    with pytest.raises(InputError) as caught:
        step(2.1)
    output = str(caught.value)
    assert output.startswith("step 11: the loss is 2.1")
    assert "2 training documents" in output
    assert ": 10, 7 (" in output  # those of the step, counted from 0
    assert "distill.skip_steps='[[2,3],[11,11]]'" in output
    assert "from the start" in output
    (tmp_path / "checkpoints" / "step=9").mkdir(parents=True)
    assert "from step=9" in str(judge.error(3, "x"))
    many = str(guard(tmp_path, lambda step: list(range(101))).error(0, "x"))
    assert "99 and more" in many
    assert "100 (" not in many
    exact = str(guard(tmp_path, lambda step: list(range(100))).error(0, "x"))
    assert "and more" not in exact
    with pytest.raises(InputError, match="loss is nan"):
        step(math.nan)
    resumed = guard(tmp_path)
    resumed.load_state_dict(judge.state_dict())
    assert list(resumed.losses) == [1.0] * (MIN_LOSSES - 1) + [99.0]
    assert resumed.losses.maxlen == WINDOW


def test_other_ranks_do_not_check_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_guard, "rank", lambda: 1)
    trainer = Trainer(1)
    trainer.callback_metrics["reduced_train_loss"] = math.nan
    guard(tmp_path).on_train_batch_end(trainer, None, None, None, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_lines_of_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    asked: list[tuple[float, int]] = []
    meter: Any = SimpleNamespace(utilization=lambda speed, length: asked.append((speed, length)) or 0.123456)
    writer, trainer = MetricsWriter(CFG, tmp_path, meter), Trainer(0)
    total: list[str] = []
    reduction = SimpleNamespace(reset=lambda: total.append("reset"), mean=lambda where: 1.5)
    model = SimpleNamespace(loss_parts=lambda: {"kd_loss": 0.5}, validation_loss_reduction=reduction)
    writer.on_train_start(trainer, model)
    trainer.callback_metrics["reduced_train_loss"] = 2.0
    for step in range(1, 11):
        trainer.global_step = step
        clock.now += 0.5
        writer.on_train_batch_end(trainer, model, None, None, 0)
        if step == 8:
            writer.on_validation_start(trainer, model)
            clock.now += 1000  # validation time does not count
            writer.on_validation_end(trainer, model)
    writer.on_train_end(trainer, model)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], "val_loss" in line) for line in lines] == [(4, False), (8, False), (8, True), (10, False)]
    first, second, validation, last = lines
    # Six steps of 32 tokens, then four of 64.
    assert first == {
        "step": 4,
        "max_steps": 10,
        "tokens": 128,
        "loss": 2.0,
        "kd_loss": 0.5,
        "lr": 0.25,
        "tokens_per_second": 64.0,
        "mfu": 0.1235,
        "seconds_left": 5.0,
    }
    assert (second["tokens"], second["tokens_per_second"], second["seconds_left"]) == (320, 96.0, round(128 / 96, 1))
    assert validation == {"step": 8, "val_loss": 1.5}
    assert (last["tokens"], last["tokens_per_second"], last["seconds_left"]) == (448, 128.0, 0.0)
    assert asked == [(64.0, 8), (96.0, 16), (128.0, 16)]
    assert total == ["reset"]


def test_trackers_get_every_line_and_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    tracked = SimpleNamespace(
        write=lambda values, step: done.append((step, values)), close=lambda: done.append("closed")
    )
    monkeypatch.setattr(metrics, "Trackers", lambda cfg, out, step: tracked)
    writer, trainer = MetricsWriter(CFG, tmp_path, None), Trainer(0)
    writer.on_train_start(trainer, None)
    model = SimpleNamespace(validation_loss_reduction=SimpleNamespace(mean=lambda where: 1.5))
    writer.on_validation_end(trainer, model)
    writer.on_train_end(trainer, None)
    assert done == [(0, {"val_loss": 1.5}), "closed"]


def test_other_ranks_write_no_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "rank", lambda: 1)
    writer, trainer = MetricsWriter(CFG, tmp_path, None), Trainer(4)
    writer.on_train_start(trainer, None)
    writer.on_train_batch_end(trainer, SimpleNamespace(), None, None, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_training_removes_later_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"step": 5, "loss": 1.0}\n')
    MetricsWriter(CFG, tmp_path, None).on_train_start(Trainer(4), None)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [4]


def test_the_gain_of_a_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val_loss": 3.0}\n{"step": 9, "val_loss": 2.25}\n{"step": 4, "val_loss": 2.5}\n')
    assert loss_gain(path) == {"val_loss_before": 3.0, "val_loss_after": 2.25, "val_loss_gain": 0.75}
