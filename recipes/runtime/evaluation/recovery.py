"""How a student recovers while it is distilled: its checkpoints measured, each once.

A checkpoint of a training that goes on may be taken away at any moment. It is held by hard links first, which cost
neither time nor room, and stay when its own names go.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.phases import tokens_before, training_phases
from conf.schema import DistillConfig, Init
from recipes.artifact import write_json
from recipes.runtime import ranks
from recipes.runtime.evaluation.evaluator import Evaluator
from recipes.runtime.stage_main import rank

# `export(checkpoint, folder)` writes a NeMo checkpoint as a Hugging Face folder.
Export = Callable[[Path, Path], None]
FILE = "recovery.json"
# In the folder of the stage evaluate: checkpoints that are held, and models exported from them.
ROOM = "recovery"


def name_of(step: int) -> str:
    """Under what name a checkpoint is measured."""
    return f"recovery/step={step}"


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """The complete checkpoints in a folder by step, in order; none where it does not exist."""
    found = [path for path in folder.glob("step=*") if path.is_dir()]
    return dict(sorted((int(path.name.partition("=")[2]), path) for path in found))


def measure_checkpoint(evaluator: Evaluator, name: str, checkpoint: Path, room: Path, export: Export) -> None:
    """Measures a NeMo checkpoint, unless that is done; on all ranks. `room` takes the exported model meanwhile."""
    # Transformers warns of names that could be no module's.
    with _room(room / re.sub(r"\W", "_", f"exported_{name}")) as folder:

        def make() -> Path:
            if rank() == 0:
                export(checkpoint, folder)
            ranks.wait()
            return folder

        evaluator.measure(name, make, samples=False)


@contextmanager
def _room(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def hold(checkpoints: Path, pen: Path, known: Callable[[int], bool]) -> list[int]:
    """Links into `pen` the checkpoints that are not known yet; gives their steps. What goes meanwhile is left out."""
    held = []
    for step, checkpoint in checkpoints_of(checkpoints).items():
        target = pen / checkpoint.name
        if not known(step) and not target.exists() and _link(checkpoint, target):
            held.append(step)
    return held


def _link(folder: Path, target: Path) -> bool:
    """Whether all of a folder could be linked under another name, which then appears as a whole."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        names = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        for name in names:
            if (folder / name).is_dir():
                (partial / name).mkdir(exist_ok=True)
            else:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(folder / name, partial / name)
        # Renamed away while it was gone through, it would look as if it had fewer files.
        if not names or not folder.exists():
            raise FileNotFoundError(folder)
        os.replace(partial, target)
    except FileNotFoundError:
        shutil.rmtree(partial, ignore_errors=True)
        return False
    return True


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def write(evaluator: Evaluator, distill: DistillConfig, out: Path) -> None:
    """Writes `recovery.json` of all that was measured so far; without any checkpoint there is none."""
    names = {step: name_of(step) for step in checkpoints_of(out / "measured" / "recovery")}
    if not names:
        return
    names[distill.max_steps] = "student"
    if distill.init is Init.pruned:
        names[0] = "pruned"
    write_json(out / FILE, curve({step: evaluator.recall(name) for step, name in names.items()}, distill))


def curve(measured: dict[int, dict[str, Any] | None], distill: DistillConfig) -> list[dict[str, Any]]:
    """The content of `recovery.json`, of measurements by step; None: there is none."""
    phases = training_phases(distill)
    return [
        {
            "model": "student",
            "step": step,
            "tokens": tokens_before(phases, step),
            **{key: entry[key] for key in ("val_loss", "agreement", "tasks") if key in entry},
        }
        for step, entry in sorted(measured.items())
        if entry is not None
    ]
