"""Measure the recovery of a student during distillation: evaluate each of its checkpoints once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prune_distill.evaluation.evaluator import Evaluator
from prune_distill.evaluation.results import ModelEntry, RecoveryPoint
from prune_distill.nemo import ranks
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import DISTILLED, MEASURED, RECOVERY, checkpoint_name, find_checkpoints
from prune_distill.pipeline.stage_main import rank
from prune_distill.schema import DistillConfig, Init
from prune_distill.schema.phases import tokens_before, training_phases

# `export(checkpoint, folder)` exports a NeMo checkpoint to a Hugging Face folder.
Export = Callable[[Path, Path], None]


def measurement_name(step: int) -> str:
    """Return the name under which a checkpoint is measured."""
    return f"recovery/{checkpoint_name(step)}"


def measure_checkpoint(evaluator: Evaluator, name: str, checkpoint: Path, room: Path, export: Export) -> None:
    """Measure a NeMo checkpoint once, on all ranks. `room`: folder for the exported model."""
    with export_temporarily(name, checkpoint, room, export) as make:
        evaluator.measure(name, make, samples=False)


@contextmanager
def export_temporarily(name: str, checkpoint: Path, room: Path, export: Export) -> Iterator[Callable[[], Path]]:
    """Yield a function that exports a checkpoint to a Hugging Face folder in `room`, which is removed at the end."""
    # transformers warns about names that are not valid module names.
    folder = room / re.sub(r"\W", "_", f"exported_{name}")

    def make() -> Path:
        if rank() == 0:
            export(checkpoint, folder)
        ranks.wait()
        return folder

    try:
        yield make
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def write(evaluator: Evaluator, distill: DistillConfig, out: Path) -> None:
    """Write `recovery.json` from the measurements so far, if there are any."""
    names = {step: measurement_name(step) for step in find_checkpoints(out / MEASURED / "recovery")}
    if not names:
        return
    # After on-policy rounds, the student is another one.
    names[distill.max_steps] = "student" if evaluator.recall(DISTILLED) is None else DISTILLED
    if distill.init is Init.pruned:
        names[0] = "pruned"
    write_json(out / RECOVERY, curve({step: evaluator.recall(name) for step, name in names.items()}, distill))


def curve(measured: dict[int, ModelEntry | None], distill: DistillConfig) -> list[RecoveryPoint]:
    """Return the content of `recovery.json` from measurements by step (None: not measured)."""
    phases = training_phases(distill)
    points = []
    for step, entry in sorted(measured.items()):
        if entry is None:
            continue
        point: RecoveryPoint = {"model": "student", "step": step, "tokens": tokens_before(phases, step)}
        for key in ("val_loss", "agreement", "tasks"):
            if key in entry:
                point[key] = entry[key]
        points.append(point)
    return points
