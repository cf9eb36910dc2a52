"""Pausing a training from outside: a file named `stop` in the stage's folder.

A person (`touch RUN_DIR/<stage>/stop`) or a Slurm job's script writes it at any time, also before the trainer is up;
whoever starts the stage takes an old one away.
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
    """After each step looks for the stop file; where it is there, saves and ends the training.

    Only rank 0 looks, so that a step costs one look at the shared disk and one all-reduce of four bytes over all ranks
    (no more waiting than the gradient norm asks of them anyway: megatron/core/optimizer/clip_grads.py:127-133 sums and
    reads it back every step).

    Args:
        folder: the stage's folder; takes `state.json`.
        max_steps: at which training ends by itself.
        save: writes a checkpoint of the step that has just ended, on every rank.
    """

    def __init__(self, folder: Path, max_steps: int, save: Callable[[Any], None]) -> None:
        self.folder = folder
        self.max_steps = max_steps
        self.save = save

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.max_steps or not asked(self.folder):
            return
        self.save(trainer)
        trainer.should_stop = True
        if trainer.global_step % trainer.val_check_batch:
            # Lightning validates a training that is stopped (training_epoch_loop.py:429): here only where it was due.
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if rank() == 0:
            step = trainer.global_step
            write_json(self.folder / STATE, {"state": "done" if step >= self.max_steps else "paused", "step": step})
            # What it asked for is done: the next start is not to stop for it.
            (self.folder / STOP).unlink(missing_ok=True)


def asked(folder: Path) -> bool:
    """Whether rank 0 sees the stop file, as all ranks have to know at the same step."""
    seen = rank() == 0 and (folder / STOP).exists()
    if not torch.distributed.is_initialized():
        return seen
    flag = torch.tensor(float(seen), device=backend.activate().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())
