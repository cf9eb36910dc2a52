"""Ends a training at the first loss that is not finite or far too high, before anything of that step is saved."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import Callback

from prune_distill.errors import InputError
from prune_distill.pipeline.names import CHECKPOINTS
from prune_distill.pipeline.stage_main import rank
from prune_distill.schema import Training
from prune_distill.training.checkpoints import newest_checkpoint

if TYPE_CHECKING:
    from prune_distill.training.batches import Batches

# Losses in the median, and how many are needed before a loss is compared with it.
WINDOW = 50
LEAST = 10
# The most documents that a message names.
NAMED = 100
# What Megatron raises in the backward pass, on the rank whose gradients are not finite
# (megatron/core/distributed/param_and_grad_buffer.py:188 and :197).
GRADIENTS = "in local grad norm for bucket"


class LossGuard(Callback):
    """Checks the loss of every step before it is recorded or saved.

    Only rank 0 checks it: it has the loss (nemo/lightning/pytorch/strategies/megatron_strategy.py:846 sends it there
    from the last pipeline stage), reads a number back from the device at each step anyway (`StopFile`), and is the rank
    that declares checkpoints complete. When it ends, torchrun ends the others.

    Args:
        out: the stage's folder.
        key: the training's key in the config.
    """

    def __init__(self, cfg: Training, batches: Batches, out: Path, key: str) -> None:
        self.cfg, self.batches, self.out, self.key = cfg, batches, out, key
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if rank() != 0:
            return
        loss = float(trainer.callback_metrics["reduced_train_loss"])
        if fault := find_loss_fault(loss, self.losses, self.cfg.max_loss_ratio):
            raise self.error(trainer.global_step - 1, fault)
        self.losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """The last losses are saved in checkpoints, so that a resumed run decides as an uninterrupted one does."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])

    def error(self, step: int, fault: str) -> InputError:
        """The error of a step, counted from 0: what is wrong, in which documents, and how to continue."""
        number = step + 1
        documents = self.batches.documents(step)
        named = ", ".join(map(str, documents[:NAMED])) + (" and more" if len(documents) > NAMED else "")
        spans = [*self.cfg.skip_steps, [number, number]]
        skip = f"{self.key}.skip_steps='{spans}'".replace(" ", "")
        newest = newest_checkpoint(self.out / CHECKPOINTS)
        resumes = "the start" if newest is None else newest.name
        return InputError(
            f"step {number}: {fault}. Nothing of it was saved. Its batch is made of {len(documents)} training documents"
            f" of {self.batches.data.folder}: {named} (recipes.prepare_data --check FOLDER --document N shows one)."
            f" The same command goes on from {resumes}, over the same batch; to pass it over set {skip}; otherwise"
            f" lower {self.key}.lr or {self.key}.clip_grad"
        )


def find_loss_fault(loss: float, losses: deque[float], max_ratio: float | None) -> str | None:
    """What is wrong with a loss; None if nothing is.

    Args:
        losses: the losses of the steps before it.
        max_ratio: the largest ratio to their median; None: no limit.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if max_ratio is None or len(losses) < LEAST:
        return None
    median = statistics.median(losses)
    if loss <= max_ratio * median:
        return None
    return f"the loss is {loss:.6g}, more than {max_ratio:g} times {median:.6g}, the median of the last {len(losses)}"
