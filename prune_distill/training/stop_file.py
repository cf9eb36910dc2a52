"""Pause training through a file named `stop` in the stage's folder.

A person (`touch RUN_DIR/<stage>/stop`) or the script of a Slurm job may create it at any time, even before the trainer
starts. A leftover file is removed when the stage is started.
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
    """Checks for the stop file after each step; if it exists, saves a checkpoint and ends training.

    Only rank 0 checks, so each step costs one access to the shared disk and an all-reduce of four bytes over all ranks.
    The gradient norm synchronizes them in every step anyway (megatron/core/optimizer/clip_grads.py:127-133).

    Args:
        folder: the stage's folder, for `state.json`.
        max_steps: the last step of the run.
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
            # Lightning validates whenever training stops (training_epoch_loop.py:429); skip it unless it is due.
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if rank() == 0:
            step = trainer.global_step
            write_json(self.folder / STATE, {"state": "done" if step >= self.max_steps else "paused", "step": step})
            # The next start must not stop again.
            (self.folder / STOP).unlink(missing_ok=True)


def is_pause_requested(folder: Path) -> bool:
    """Return whether rank 0 sees the stop file. All ranks call it and get the same result."""
    seen = rank() == 0 and (folder / STOP).exists()
    if not torch.distributed.is_initialized():
        return seen
    flag = torch.tensor(float(seen), device=backend.activate().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
