"""Checkpoints that are whole or not there: which are kept, and how they are written while training goes on."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from conf.schema import Training
from recipes.artifact import remove_folder, sync
from recipes.runtime.metrics_file import read_metrics
from recipes.runtime.stage_main import rank


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The complete checkpoint of the highest step (`step=N` under `checkpoints`), or None."""
    return max(_complete(checkpoints), key=_step_of, default=None)


def superfluous(checkpoints: Path, keep: int, val_losses: dict[int, float]) -> list[Path]:
    """The complete checkpoints that may go: all but the newest `keep` and the best of those that were validated.

    Args:
        val_losses: validation losses by step; empty: no best one is kept.
    """
    complete = sorted(_complete(checkpoints), key=_step_of)
    validated = [folder for folder in complete if _step_of(folder) in val_losses]
    best = min(validated, key=lambda folder: val_losses[_step_of(folder)], default=None)
    return [folder for folder in complete[:-keep] if folder != best]


def _complete(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob("step=*") if folder.is_dir()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("=")[2])


class Checkpoints(Callback):
    """Saves NeMo checkpoints that are either whole or not there, and the final model.

    NeMo's `ModelCheckpoint` writes under the final name with a marker file beside it, writes `-last` a second time, and
    keeps none with `save_top_k=1, save_last=False` (nemo/lightning/pytorch/callbacks/model_checkpoint.py). Here a
    checkpoint is written under a hidden name and renamed once every rank is done: with `cfg.async_save` a few steps
    later, at most one being under way (NeMo's AsyncFinalizerCallback asks after every step whether it is).

    Args:
        folder: takes `step=N`, the newest `cfg.keep_checkpoints` of them and the best, with the optimizer's state.
        final: takes the model after the last step and its validation, weights only.
        metrics: the file with the validation losses.
    """

    def __init__(self, cfg: Training, folder: Path, final: Path, metrics: Path) -> None:
        self.cfg = cfg
        self.folder = folder
        self.final = final
        self.metrics = metrics
        self.saved = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.saved = trainer.global_step
        if rank() == 0:
            for left in self.folder.glob(".partial.*"):
                remove_folder(left)
            for left in self.folder.glob(".removed.*"):
                shutil.rmtree(left, ignore_errors=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.cfg.save_every_n_steps == 0 and step < self.cfg.max_steps:
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        """Has a checkpoint written of the step that has just ended."""
        step = trainer.global_step
        # Not by looking at the disk, which two nodes may see differently.
        if step == self.saved:
            return
        self.saved = step
        self._write(trainer, self.folder / f"step={step}", weights_only=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step >= self.cfg.max_steps:
            with getattr(pl_module, "student_only", nullcontext)():
                self._write(trainer, self.final, weights_only=True)
        self._finish(trainer)

    def _write(self, trainer: Any, target: Path, weights_only: bool) -> None:
        from nemo.lightning.io.pl import TrainerContext

        self._finish(trainer)
        partial = target.with_name(f".partial.{target.name}")
        if rank() == 0:
            if partial.exists():
                remove_folder(partial)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        if rank() == 0:
            TrainerContext.from_trainer(trainer).io_dump(partial / "context", yaml_attrs=["model"])

        def declare() -> None:
            self._declare(trainer, partial, target)

        if self.cfg.async_save:
            trainer.save_checkpoint(partial, weights_only, storage_options={"finalize_fn": declare})
        else:
            trainer.save_checkpoint(partial, weights_only)
            declare()

    def _finish(self, trainer: Any) -> None:
        """Waits, on every rank, until nothing is being written any more."""
        if self.cfg.async_save:
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)

    def _declare(self, trainer: Any, partial: Path, target: Path) -> None:
        """Gives what every rank has written its name, and takes away what is no longer kept."""
        trainer.strategy.barrier()
        if rank() == 0:
            for path in (*partial.rglob("*"), partial):
                sync(path)
            os.replace(partial, target)
            sync(target.parent)
            self._prune()
        trainer.strategy.barrier()

    def _prune(self) -> None:
        lines = read_metrics(self.metrics) if self.cfg.keep_best else []
        val_losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        for old in superfluous(self.folder, self.cfg.keep_checkpoints, val_losses):
            remove_folder(old)
