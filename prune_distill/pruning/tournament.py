"""Rounds of short distillations: candidates train on the same batches by the full run's schedule, and pause.

A round ends each training as a stop file would, with a checkpoint. So the next round, and at last the full
distillation, go on from there: the winner's steps are not taken twice.
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

SECONDS_BETWEEN_LOOKS = 0.2


def reached(folder: Path, step: int) -> bool:
    """Whether a candidate has been trained to a step, validated there, and saved undamaged; the same on all ranks."""
    if read_state(folder).get("step", 0) < step:
        return False
    saved = resume_point(folder / CHECKPOINTS)
    late_enough = [path for at, path in find_checkpoints(folder / CHECKPOINTS).items() if at >= step]
    validated = any("val_loss" in line and line["step"] == step for line in read_metrics(folder / METRICS))
    return validated and saved in late_enough


def begin_again(folder: Path, step: int) -> None:
    """Removes what a kill left: a stop file, and a checkpoint of the round's last step that was not validated."""
    (folder / STOP).unlink(missing_ok=True)
    for saved, checkpoint in find_checkpoints(folder / CHECKPOINTS).items():
        if saved >= step:
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".removed.{checkpoint.name}")))


def pause(stage: Path, candidate: Path) -> None:
    """Notes that the stage was paused as it was asked to, after a step of a candidate."""
    (stage / STOP).unlink(missing_ok=True)
    write_json(stage / STATE, read_state(candidate))


class PauseAt(Callback):
    """Pauses a candidate's training after a step, or as soon as the stage is asked to pause.

    It writes the stop file to the training's folder before a step begins; the training looks for it after the step.

    Args:
        folder: the training's.
        step: the step after which the training pauses.
        stage: the folder of the stage that the training is a part of.
    """

    def __init__(self, folder: Path, step: int, stage: Path) -> None:
        self.folder, self.step, self.stage = folder, step, stage

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if rank() == 0 and (trainer.global_step >= self.step - 1 or (self.stage / STOP).exists()):
            (self.folder / STOP).touch()


def val_loss(folder: Path, step: int) -> float:
    """The held-out loss after a step (nats per token)."""
    return next(
        float(line["val_loss"])
        for line in reversed(read_metrics(folder / METRICS))
        if "val_loss" in line and line["step"] == step
    )


def survivors(losses: dict[str, float], count: int, behind: Collection[str] = ()) -> list[str]:
    """The `count` candidates of lowest loss, best first; those of `behind` come after all others."""
    return sorted(losses, key=lambda name: (name in behind, losses[name]))[:count]


def clearly_worse(scores: dict[str, dict[str, Any]], margin: float) -> list[str]:
    """The candidates whose score is below the best one's by more than `margin` standard errors of the difference.

    Args:
        scores: of each, `value` and `stderr` (None: taken for exact). The errors are taken for independent, which
            those on the same questions are not: fewer are called worse than could be.
    """
    best = max(scores.values(), key=lambda score: score["value"])

    def error(score: dict[str, Any]) -> float:
        return math.hypot(score["stderr"] or 0.0, best["stderr"] or 0.0)

    return [name for name, score in scores.items() if best["value"] - score["value"] > margin * error(score)]


def keep_winner(folder: Path, target: Path) -> None:
    """Leaves what the full distillation goes on from in `target`: the last checkpoint and the metrics."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    unnamed = shutil.ignore_patterns(".partial.*", ".removed.*", ".damaged.*")
    shutil.copytree(folder / CHECKPOINTS, partial / CHECKPOINTS, copy_function=_link, ignore=unnamed)
    shutil.copy2(folder / METRICS, partial / METRICS)
    os.replace(partial, target)


def go_on_from(begun: Path, out: Path) -> None:
    """Has a training in `out` go on from another one's checkpoint; nothing happens where it has one of its own.

    On every rank: all return once it is there, as each looks for it by itself.
    """
    while rank() != 0 and not _has_begun(out):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if _has_begun(out):
        return
    shutil.copy2(begun / METRICS, out / METRICS)
    partial = out / f".{CHECKPOINTS}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(begun / CHECKPOINTS, partial, copy_function=_link)
    os.replace(partial, out / CHECKPOINTS)


def _has_begun(out: Path) -> bool:
    return (out / CHECKPOINTS).exists() or (out / NEMO).exists()


def _link(source: str, target: str) -> None:
    """A second name for a file that is never written again; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
