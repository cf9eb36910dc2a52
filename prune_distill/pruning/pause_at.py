"""Pausing a training after a given step, by the stop file that anybody may leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from prune_distill.pipeline.names import STOP
from prune_distill.pipeline.stage_main import rank


class PauseAt(Callback):
    """Asks for a pause after a step, or as soon as one is asked of the stage: writes the stop file to the training's
    folder before a step begins, to be seen when it ends.

    Args:
        folder: the training's.
        step: after which it pauses.
        stage: the folder of the stage that the training is a part of.
    """

    def __init__(self, folder: Path, step: int, stage: Path) -> None:
        self.folder, self.step, self.stage = folder, step, stage

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if rank() == 0 and (trainer.global_step >= self.step - 1 or (self.stage / STOP).exists()):
            (self.folder / STOP).touch()
