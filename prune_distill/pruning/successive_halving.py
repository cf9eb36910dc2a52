"""Rounds of short distillations: candidates train on the same batches with the schedule of the full run.

A round pauses each run with a checkpoint, like a stop file. The next round, and finally the full distillation, resume
from it, so the winner's steps are not repeated.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from prune_distill.pipeline.artifact import read_state, write_json
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import CHECKPOINTS, METRICS, NEMO, STATE, STOP, find_checkpoints
from prune_distill.pipeline.stage_main import rank
from prune_distill.training.checkpoints import resume_point

POLL_SECONDS = 0.2


def has_reached(folder: Path, step: int) -> bool:
    """Return whether a candidate was trained to a step, validated, and saved undamaged; the same on all ranks."""
    if read_state(folder).get("step", 0) < step:
        return False
    newest = resume_point(folder / CHECKPOINTS)
    saved = [path for saved_step, path in find_checkpoints(folder / CHECKPOINTS).items() if saved_step >= step]
    validated = any("val_loss" in line and line["step"] == step for line in read_metrics(folder / METRICS))
    return validated and newest in saved


def discard_unfinished(folder: Path, step: int) -> None:
    """Remove leftovers of a killed round: a stop file, and a checkpoint of its last step that was not validated."""
    (folder / STOP).unlink(missing_ok=True)
    for saved_step, checkpoint in find_checkpoints(folder / CHECKPOINTS).items():
        if saved_step >= step:
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".removed.{checkpoint.name}")))


def pause(stage: Path, candidate: Path) -> None:
    """Record that the stage was paused after a step of a candidate."""
    (stage / STOP).unlink(missing_ok=True)
    write_json(stage / STATE, read_state(candidate))


class PauseAt(Callback):
    """Pauses the training of a candidate after a step, or as soon as the stage has a stop file.

    It writes the stop file to the training folder before a step; training checks for it after the step.

    Args:
        folder: the training folder.
        step: the step after which training pauses.
        stage: the folder of the stage.
    """

    def __init__(self, folder: Path, step: int, stage: Path) -> None:
        self.folder, self.step, self.stage = folder, step, stage

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if rank() == 0 and (trainer.global_step >= self.step - 1 or (self.stage / STOP).exists()):
            (self.folder / STOP).touch()


def read_val_loss(folder: Path, step: int) -> float:
    """Return the validation loss after a step, in nats per token."""
    return next(
        float(line["val_loss"])
        for line in reversed(read_metrics(folder / METRICS))
        if "val_loss" in line and line["step"] == step
    )


def select_survivors(losses: dict[str, float], count: int, worse: Collection[str] = ()) -> list[str]:
    """Return the `count` candidates with the lowest losses, best first. Candidates in `worse` rank below all others."""
    return sorted(losses, key=lambda name: (name in worse, losses[name]))[:count]


def find_clearly_worse(scores: dict[str, dict[str, Any]], margin: float) -> list[str]:
    """Return the candidates whose score is more than `margin` standard errors of the difference below the best score.

    Args:
        scores: `value` and `stderr` by candidate (None: exact). Errors are treated as independent, which is
        conservative:
            errors on the same questions are correlated.
    """
    best = max(scores.values(), key=lambda score: score["value"])

    def error(score: dict[str, Any]) -> float:
        return math.hypot(score["stderr"] or 0.0, best["stderr"] or 0.0)

    return [name for name, score in scores.items() if best["value"] - score["value"] > margin * error(score)]


def keep_winner(folder: Path, target: Path) -> None:
    """Copy the checkpoint and the metrics, from which the full distillation resumes, to `target`."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    ignored = shutil.ignore_patterns(".partial.*", ".removed.*", ".damaged.*")
    shutil.copytree(folder / CHECKPOINTS, partial / CHECKPOINTS, copy_function=_link, ignore=ignored)
    shutil.copy2(folder / METRICS, partial / METRICS)
    os.replace(partial, target)


def resume_from_winner(winner: Path, out: Path) -> None:
    """Make the training in `out` resume from the winner's checkpoint, unless it has its own checkpoints.

    All ranks call it, and return when the checkpoint exists.
    """
    while rank() != 0 and not _has_started(out):
        time.sleep(POLL_SECONDS)
    if _has_started(out):
        return
    shutil.copy2(winner / METRICS, out / METRICS)
    partial = out / f".{CHECKPOINTS}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(winner / CHECKPOINTS, partial, copy_function=_link)
    os.replace(partial, out / CHECKPOINTS)


def _has_started(out: Path) -> bool:
    return (out / CHECKPOINTS).exists() or (out / NEMO).exists()


def _link(source: str, target: str) -> None:
    """Hard-link a file that is never written again; copy it if the disk does not support hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
