"""A corrected teacher that takes the original one's place in the middle of a distillation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from prune_distill.nemo import nemo_api

log = logging.getLogger("recipes.teacher_swap")


class TeacherSwap(Callback):
    """Gives the teacher beside the student other weights once a number of steps is done.

    A checkpoint of the training holds no teacher: one that is resumed has the original again, and this callback changes
    it before the first step, where it had been changed.

    Args:
        checkpoint: the NeMo checkpoint of the corrected teacher, of the original's shape.
        step: how many steps the original teaches.
    """

    def __init__(self, checkpoint: Path, step: int) -> None:
        self.checkpoint, self.step = checkpoint, step
        self.done = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.done or trainer.global_step < self.step:
            return
        self.done = True
        teacher = nemo_api.core_model(pl_module).teacher_model
        nemo_api.load_parameters(teacher, self.checkpoint, trainer)
        log.info("from step %d on %s teaches", trainer.global_step + 1, self.checkpoint)
