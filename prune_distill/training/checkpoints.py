"""Training checkpoints: how they are written, which are kept, and from which one a run resumes.

Each checkpoint has a record of its files (`prune_distill.pipeline.outputs`), which is verified before a run resumes.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from prune_distill.atomic_files import sync
from prune_distill.errors import InputError
from prune_distill.nemo import ranks
from prune_distill.pipeline.artifact import remove_folder, write_json
from prune_distill.pipeline.integrity import checkpoint_damage
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import CONTEXT, OUTPUTS, checkpoint_name, find_checkpoints
from prune_distill.pipeline.outputs import Entries, digests
from prune_distill.pipeline.stage_main import rank, world_size
from prune_distill.schema import Training

log = logging.getLogger("recipes.checkpoints")

# Megatron names the files that a rank writes __RANK_NUMBER.distcp.
_RANK_FILE = re.compile(r"(?:.*/)?__(\d+)_\d+\.distcp")


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint of the highest step (`step=N` under `checkpoints`), or None. It may be damaged."""
    return next(reversed(find_checkpoints(checkpoints).values()), None)


def resume_point(checkpoints: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None if there are no checkpoints. All ranks verify a part and agree.

    Newer checkpoints, which are damaged, are renamed to `.damaged.step=N`, so that their steps can be saved again.

    Raises:
        InputError: all checkpoints are damaged. The user decides whether to start again.
    """
    # Rank 0 lists the checkpoints, because a shared disk may look different on two nodes.
    (steps, *_) = ranks.exchange([*reversed(find_checkpoints(checkpoints))])
    faults: dict[Path, str] = {}
    for step in steps:
        checkpoint = checkpoints / checkpoint_name(step)
        damage = checkpoint_damage(checkpoint, share=(rank(), world_size()))
        found = [fault for fault in ranks.exchange(damage and str(damage)) if fault]
        if not found:
            _set_aside(faults, checkpoint)
            return checkpoint
        faults[checkpoint] = found[0]
    if faults:
        raise InputError(
            f"all checkpoints are damaged: {'; '.join(faults.values())}; to train from the start, rm -r {checkpoints} "
            "and"
            " run the stage again"
        )
    return None


def _set_aside(faults: dict[Path, str], fallback: Path) -> None:
    for checkpoint, fault in faults.items():
        aside = checkpoint.with_name(f".damaged.{checkpoint.name}")
        if rank() == 0:
            log.warning("%s; resuming from %s; the damaged checkpoint is kept as %s", fault, fallback.name, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def select_superfluous(checkpoints: Path, keep: int, val_losses: dict[int, float]) -> list[Path]:
    """Select the complete checkpoints to delete: all but the newest `keep` and the one with the lowest validation loss.

    Args:
        val_losses: validation losses by step; empty: the best checkpoint is not kept.
    """
    complete = find_checkpoints(checkpoints)
    best = min(complete.keys() & val_losses.keys(), key=val_losses.__getitem__, default=None)
    return [complete[step] for step in list(complete)[:-keep] if step != best]


class Checkpoints(Callback):
    """Saves NeMo checkpoints that are either complete or absent, and the final model.

    NeMo's `ModelCheckpoint` writes to the final name next to a marker file, writes `-last` a second time, and keeps no
    checkpoint with `save_top_k=1, save_last=False` (nemo/lightning/pytorch/callbacks/model_checkpoint.py). Here a
    checkpoint is written under a hidden name, and renamed when all ranks have finished. With `cfg.async_save` this is a
    few steps later. At most one checkpoint is being written (NeMo's AsyncFinalizerCallback polls after every step).

    Args:
        folder: folder for `step=N`, with the optimizer's state; the newest `cfg.keep_checkpoints` and the best are
        kept. final: folder for the final model, weights only.
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
            for leftover in self.folder.glob(".partial.*"):
                remove_folder(leftover)
            for leftover in self.folder.glob(".removed.*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.cfg.save_every_n_steps == 0 and step < self.cfg.max_steps:
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        """Write a checkpoint of the step that has just ended."""
        step = trainer.global_step
        # Not decided by the disk, which may look different on two nodes.
        if step == self.saved:
            return
        self.saved = step
        self._write(trainer, self.folder / checkpoint_name(step), weights_only=False)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step >= self.cfg.max_steps:
            with getattr(pl_module, "student_only", nullcontext)():
                self._write(trainer, self.final, weights_only=True)
        self._finish(trainer)

    def _write(self, trainer: Any, target: Path, weights_only: bool) -> None:
        from nemo.lightning.io.pl import TrainerContext  # the rest of this module needs no NeMo

        self._finish(trainer)
        partial = target.with_name(f".partial.{target.name}")
        if rank() == 0:
            if partial.exists():
                remove_folder(partial)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        if rank() == 0:
            TrainerContext.from_trainer(trainer).io_dump(partial / CONTEXT, yaml_attrs=["model"])

        def declare() -> None:
            self._declare(trainer, partial, target, weights_only)

        options = {"finalize_fn": declare} if self.cfg.async_save else None
        if weights_only:
            trainer.strategy.save_checkpoint(_describe_model(trainer), partial, options)
        else:
            trainer.save_checkpoint(partial, storage_options=options)
        if not self.cfg.async_save:
            declare()

    def _finish(self, trainer: Any) -> None:
        """Wait until no checkpoint is being written. All ranks call it."""
        if self.cfg.async_save:
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)

    def _declare(self, trainer: Any, partial: Path, target: Path, weights_only: bool) -> None:
        """Rename the checkpoint that all ranks have written, and remove old checkpoints."""
        trainer.strategy.barrier()
        # The record of the stage covers the final model.
        record = None if weights_only else _record(partial)
        if rank() == 0:
            if record is not None:
                write_json(partial / OUTPUTS, record)
            for path in (*partial.rglob("*"), partial):
                sync(path)
            if os.path.lexists(target):  # written before this run resumed from an earlier step
                remove_folder(target)
            os.replace(partial, target)
            sync(target.parent)
            self._prune()
        trainer.strategy.barrier()

    def _prune(self) -> None:
        lines = read_metrics(self.metrics) if self.cfg.keep_best else []
        val_losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
        for old in select_superfluous(self.folder, self.cfg.keep_checkpoints, val_losses):
            remove_folder(old)


def _describe_model(trainer: Any) -> dict[str, Any]:
    """What a checkpoint says besides the weights, which NeMo's strategy adds.

    `Trainer.save_checkpoint(weights_only=True)` also writes the loops' counters and the position in the data
    (lightning/pytorch/trainer/connectors/checkpoint_connector.py, dump_checkpoint). They depend on where a training
    was interrupted, so two equal models would differ in their files.
    """
    # NeMo's asynchronous save logs this count (nemo/lightning/io/pl.py:235 and :528).
    batches = {"total": {"completed": trainer.global_step}}
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": {},
        "loops": {"fit_loop": {"epoch_loop.batch_progress": batches}},
    }


def _record(checkpoint: Path) -> Entries:
    """Compute the size and CRC-32 of a checkpoint's files. Each rank reads the files that it wrote; all ranks
    gather."""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    names = [path.relative_to(checkpoint).as_posix() for path in files]
    entries: Entries = {}
    for part in ranks.all_gather(digests(checkpoint, [name for name in names if _writer_rank(name) == rank()])):
        entries |= part
    return dict(sorted(entries.items()))


def _writer_rank(name: str) -> int:
    """Return the rank that wrote a file of a checkpoint: rank 0 unless the name contains another rank."""
    found = _RANK_FILE.fullmatch(name)
    return int(found[1]) if found else 0
