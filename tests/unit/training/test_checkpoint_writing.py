"""The steps in which a checkpoint is written: folder, files, record, rename."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prune_distill.nemo import backend

backend.activate()

import nemo.lightning.io.pl as nemo_io  # noqa: E402

from prune_distill.pipeline.names import CONTEXT, OUTPUTS, checkpoint_name  # noqa: E402
from prune_distill.schema import Training  # noqa: E402
from prune_distill.training import checkpoints  # noqa: E402
from prune_distill.training.checkpoints import Checkpoints  # noqa: E402


class Trainer:
    """Records what a trainer is asked to write, and writes a file for it; `pending`: what a wait finalizes."""

    def __init__(self, step: int, asynchronous: bool) -> None:
        self.global_step, self.current_epoch = step, 0
        self.written: list[tuple[str, dict[str, Any] | None]] = []
        self.waits: list[bool] = []
        self.barriers = 0
        self.pending: list[Any] = []
        self.asynchronous = asynchronous
        self.strategy = SimpleNamespace(
            barrier=self._barrier,
            save_checkpoint=self._save_model,
            checkpoint_io=SimpleNamespace(maybe_finalize_save_checkpoint=self._wait),
        )

    def _barrier(self) -> None:
        self.barriers += 1

    def _wait(self, blocking: bool) -> None:
        self.waits.append(blocking)
        for finalize in self.pending:
            finalize()
        self.pending = []

    def _write(self, path: Path, options: dict[str, Any] | None) -> None:
        assert path.is_dir()
        (path / "weights").mkdir()
        (path / "weights" / "__0_0.distcp").write_bytes(b"weights")
        if options is not None:
            self.pending.append(options["finalize_fn"])

    def save_checkpoint(self, path: Path, storage_options: dict[str, Any] | None) -> None:
        self.written.append(("training", None))
        self._write(path, storage_options)

    def _save_model(self, description: dict[str, Any], path: Path, options: dict[str, Any] | None) -> None:
        self.written.append(("model", description))
        self._write(path, options)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is written to disk for good, in order; contexts are a text."""
    names: list[str] = []
    monkeypatch.setattr(checkpoints, "sync", lambda path: names.append(Path(path).name))

    def dump(folder: Path, yaml_attrs: list[str]) -> None:
        folder.mkdir()
        (folder / "io.json").write_text("{}")

    context = SimpleNamespace(from_trainer=lambda trainer: SimpleNamespace(io_dump=dump))
    monkeypatch.setattr(nemo_io, "TrainerContext", context)
    return names


@contextmanager
def as_rank(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "rank", lambda: number)
        yield


def saver(tmp_path: Path, asynchronous: bool) -> Checkpoints:
    cfg = Training(max_steps=10, save_every_n_steps=2, async_save=asynchronous, keep_best=False)
    return Checkpoints(cfg, tmp_path / "checkpoints", tmp_path / "nemo", tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(
    asynchronous: bool, tmp_path: Path, synced: list[str]
) -> None:
    trainer, saves = Trainer(4, asynchronous), saver(tmp_path, asynchronous)
    saves.save(trainer)
    target = tmp_path / "checkpoints" / checkpoint_name(4)
    if asynchronous:
        assert not target.exists()
        assert synced == []
        saves._finish(trainer)
        # Both waits block: the one before a checkpoint is written, and this one.
        assert trainer.waits == [True, True]
    assert trainer.written == [("training", None)]
    assert {path.name for path in target.iterdir()} == {"weights", CONTEXT, OUTPUTS}
    assert not target.with_name(f".partial.{target.name}").exists()
    # Every file and folder, the folder itself, and at last the folder that has the new name in it.
    assert {"__0_0.distcp", "weights", "io.json", CONTEXT, OUTPUTS} < set(synced)
    assert synced[-2:] == [f".partial.{target.name}", "checkpoints"]
    assert trainer.barriers == 3
    # The same step is not written again.
    saves.save(trainer)
    assert len(trainer.written) == 1


def test_what_an_earlier_attempt_left_is_replaced(tmp_path: Path, synced: list[str]) -> None:
    trainer, saves = Trainer(4, False), saver(tmp_path, False)
    for name in (checkpoint_name(4), f".partial.{checkpoint_name(4)}"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "old").write_text("")
    saves.save(trainer)
    assert not (tmp_path / "checkpoints" / checkpoint_name(4) / "old").exists()


def test_the_final_model_is_written_without_the_training(tmp_path: Path, synced: list[str]) -> None:
    trainer, saves = Trainer(10, False), saver(tmp_path, False)
    saves.on_train_end(trainer, None)
    ((kind, description),) = trainer.written
    assert kind == "model"
    assert description is not None
    assert set(description) == {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops"}
    assert description["loops"] == {"fit_loop": {"epoch_loop.batch_progress": {"total": {"completed": 10}}}}
    # The stage's own record covers it.
    assert {path.name for path in (tmp_path / "nemo").iterdir()} == {"weights", CONTEXT}
    unfinished = Trainer(8, True)
    saver(tmp_path, True).on_train_end(unfinished, None)
    assert (unfinished.written, unfinished.waits) == ([], [True])


def test_other_ranks_write_their_part_only(tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    saves, target = saver(tmp_path, False), tmp_path / "checkpoints" / checkpoint_name(4)
    partial = target.with_name(f".partial.{target.name}")
    partial.mkdir(parents=True)  # by rank 0
    (partial / "of rank 0").write_text("")
    trainer = Trainer(4, False)
    with as_rank(1, monkeypatch):
        saves.save(trainer)
    assert (partial / "of rank 0").exists()
    assert not (partial / CONTEXT).exists()
    assert not target.exists()
    assert synced == []
    assert trainer.barriers == 3
