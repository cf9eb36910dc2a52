"""Pausing a training after a given step, by the stop file that anybody may leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from recipes.artifact import STOP
from recipes.runtime.stage_main import rank


class PauseAt(Callback):
    """Asks for a pause after a step: leaves the stop file before that step begins, to be seen when it ends."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if rank() == 0 and trainer.global_step >= self.step - 1:
            (self.folder / STOP).touch()
