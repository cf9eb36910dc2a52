"""Pausing a training from outside: a file named `stop` in the stage's folder.

A person (`touch RUN_DIR/<stage>/stop`) or a Slurm job's script writes it at any time, also before the trainer has
started. Whoever starts the stage removes an old one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from prune_distill.nemo import backend
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import STATE, STOP
from prune_distill.pipeline.stage_main import rank


class StopFile(Callback):
    """Looks for the stop file after each step; if it is there, saves a checkpoint and ends the training.

    Only rank 0 looks, so a step costs one look at the shared disk and one all-reduce of four bytes over all ranks. The
    gradient norm synchronizes them in every step anyway (megatron/core/optimizer/clip_grads.py:127-133).

    Args:
        folder: the stage's folder; takes `state.json`.
        max_steps: the step at which training ends by itself.
        save: writes a checkpoint of the step that has just ended, on every rank.
    """

    def __init__(self, folder: Path, max_steps: int, save: Callable[[Any], None]) -> None:
        self.folder = folder
        self.max_steps = max_steps
        self.save = save

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.max_steps or not is_pause_requested(self.folder):
            return
        self.save(trainer)
        trainer.should_stop = True
        if trainer.global_step % trainer.val_check_batch:
            # Lightning validates whenever a training is stopped (training_epoch_loop.py:429); here only if it is due.
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if rank() == 0:
            step = trainer.global_step
            write_json(self.folder / STATE, {"state": "done" if step >= self.max_steps else "paused", "step": step})
            # The request is fulfilled: the next start must not stop for it.
            (self.folder / STOP).unlink(missing_ok=True)


def is_pause_requested(folder: Path) -> bool:
    """Whether rank 0 sees the stop file; the same answer on all ranks."""
    seen = rank() == 0 and (folder / STOP).exists()
    if not torch.distributed.is_initialized():
        return seen
    flag = torch.tensor(float(seen), device=backend.activate().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
