"""Stops training at the first non-finite or much too high loss, before anything of that step is saved."""

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

# Number of losses in the median, and the minimum before a loss is compared with it.
WINDOW = 50
MIN_LOSSES = 10
# Maximum number of documents in a message.
MAX_DOCUMENTS = 100
# Part of the error that Megatron raises in the backward pass on a rank with non-finite gradients
# (megatron/core/distributed/param_and_grad_buffer.py:188 and :197).
GRADIENTS = "in local grad norm for bucket"


class LossGuard(Callback):
    """Checks the loss of every step before it is recorded or saved.

    Only rank 0 checks it. Rank 0 receives the loss from the last pipeline stage
    (nemo/lightning/pytorch/strategies/megatron_strategy.py:846), synchronizes with the device in each step anyway
    (`StopFile`), and completes checkpoints. When it fails, torchrun ends the other ranks.

    Args:
        out: the stage's folder.
        key: the config key of the training section.
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
        """Save the last losses, so that a resumed run makes the same decisions as an uninterrupted run."""
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])

    def error(self, step: int, fault: str) -> InputError:
        """Build the error of a step, counted from 0: what is wrong, in which documents, and how to continue."""
        number = step + 1
        documents = self.batches.documents(step)
        named = ", ".join(map(str, documents[:MAX_DOCUMENTS])) + (" and more" if len(documents) > MAX_DOCUMENTS else "")
        spans = [*self.cfg.skip_steps, [number, number]]
        skip = f"{self.key}.skip_steps='{spans}'".replace(" ", "")
        newest = newest_checkpoint(self.out / CHECKPOINTS)
        resumes = "the start" if newest is None else newest.name
        return InputError(
            f"step {number}: {fault}. The step was not saved. Its batch contains {len(documents)} training documents of"
            f" {self.batches.data.folder}: {named} (recipes.prepare_data --check FOLDER --document N prints one)."
            f" The same command resumes from {resumes} with the same batch; set {skip} to skip it, or lower"
            f" {self.key}.lr or {self.key}.clip_grad"
        )


def find_loss_fault(loss: float, losses: deque[float], max_ratio: float | None) -> str | None:
    """Return what is wrong with a loss, or None.

    Args:
        losses: losses of the previous steps.
        max_ratio: maximum ratio to their median; None: no limit.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if max_ratio is None or len(losses) < MIN_LOSSES:
        return None
    median = statistics.median(losses)
    if loss <= max_ratio * median:
        return None
    return f"the loss is {loss:.6g}, more than {max_ratio:g} times the median of the last {len(losses)}, {median:.6g}"
