"""Rounds of short distillations: candidates train on the same batches by the full run's schedule, and pause.

A round ends each training as a stop file would, with a checkpoint. So the next round, and at last the full
distillation, go on from there: the winner's steps are not taken twice.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from recipes.artifact import read_state
from recipes.runtime.metrics_file import read_metrics
from recipes.runtime.stage_main import rank

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


def reached(folder: Path, step: int) -> bool:
    """Whether a candidate has been trained to a step, and was saved there."""
    return int(read_state(folder).get("step", 0)) >= step and any((folder / CHECKPOINTS).glob("step=*"))


def val_loss(folder: Path, step: int) -> float:
    """The held-out loss after a step (nats per token)."""
    return next(
        float(line["val_loss"])
        for line in reversed(read_metrics(folder / METRICS))
        if "val_loss" in line and line["step"] == step
    )


def survivors(losses: dict[str, float], count: int) -> list[str]:
    """The `count` candidates of lowest loss, best first."""
    return sorted(losses, key=lambda name: losses[name])[:count]


def keep_winner(folder: Path, target: Path) -> None:
    """Leaves what the full distillation goes on from in `target`: the last checkpoint and the metrics."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / CHECKPOINTS, partial / CHECKPOINTS, copy_function=_link)
    shutil.copy2(folder / METRICS, partial / METRICS)
    os.replace(partial, target)


def go_on_from(begun: Path, out: Path) -> None:
    """Has a training in `out` go on from another one's checkpoint; nothing happens where it has one of its own."""
    if rank() != 0 or (out / CHECKPOINTS).exists() or (out / "nemo").exists():
        return
    shutil.copy2(begun / METRICS, out / METRICS)
    partial = out / f".{CHECKPOINTS}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(begun / CHECKPOINTS, partial, copy_function=_link)
    os.replace(partial, out / CHECKPOINTS)


def _link(source: str, target: str) -> None:
    """A second name for a file that is never written again; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
