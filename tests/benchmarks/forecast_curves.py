"""python -m tests.benchmarks.forecast_curves [FOLDER] [--seconds N]: forecasts of real loss curves, and the curves.

Prints how forecasts from the first third of each curve in tests/data/recovery_curves.json compare with its end. With a
folder, it makes the curves first: each is a distillation at the demo's size through the real command line, of other
shapes of the student, losses, seeds and lengths, with a validation every few steps. Runs of one seed share a folder,
and so what is before distillation. What is complete there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from prune_distill.config.load import compose
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import CORPUS_TRAIN, CORPUS_VALIDATION, HF, METRICS
from tests.helpers.recovery_curves import (
    FIXTURE,
    Hindsight,
    load_curves,
    look_back,
    look_back_at_training,
    try_look,
)

ROOT = Path(__file__).resolve().parents[2]
# The demo's sizes, with sequences of half the length and a teacher of fewer steps: minutes on one core.
TEACHER = ("model.demo.training.max_steps=300", "model.demo.training.val_batches=2")
COMMON = (
    *("distill.seq_length=128", "distill.save_every_n_steps=100000", "distill.keep_best=false"),
    *("distill.val_every_n_steps=3", "distill.val_batches=4", "distill.log_every_n_steps=1", "distill.controls=[]"),
    *("prune.calibration_samples=32", "prune.calibration_seq_length=128"),
)
SHAPES = {
    "depth": ("prune.num_layers=4", "prune.ffn_hidden_size=null"),
    "half": ("prune.num_layers=3", "prune.ffn_hidden_size=512"),
    "two": ("prune.num_layers=2", "prune.ffn_hidden_size=512"),
    "narrow": ("prune.num_layers=null", "prune.hidden_size=128", "prune.ffn_hidden_size=384"),
    "width": ("prune.num_layers=null", "prune.hidden_size=192", "prune.ffn_hidden_size=512"),
    "ffn": ("prune.num_layers=null", "prune.ffn_hidden_size=256"),
}
LOSSES = {
    "mix": (),
    "kd": ("distill.kd.kd_weight=1", "distill.kd.lm_weight=0"),
    "reverse": ("distill.kd.kd_weight=1", "distill.kd.lm_weight=0", "distill.kd.divergence=reverse_kl"),
    "ce": ("distill.loss=ce",),
    "hot": ("distill.kd.temperature=2",),
}


@dataclass(frozen=True)
class Arm:
    """One curve: a student, a loss, a seed, steps, and further overrides."""

    shape: str
    loss: str
    seed: int
    steps: int
    more: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        words = [override.removeprefix("distill.") for override in self.more]
        return ", ".join([self.shape, self.loss, f"seed {self.seed}", f"{self.steps} steps", *words])

    @property
    def overrides(self) -> tuple[str, ...]:
        steps = f"distill.max_steps={self.steps}"
        return (*COMMON, *SHAPES[self.shape], *LOSSES[self.loss], f"seed={self.seed}", steps, *self.more)


# They share neither a seed, and so no batch, nor a shape.
TUNING = (
    Arm("depth", "mix", 1, 120),
    Arm("half", "mix", 2, 120),
    Arm("half", "kd", 2, 90),
    Arm("half", "reverse", 2, 90),
    Arm("half", "ce", 2, 120),
    Arm("width", "mix", 3, 90),
    Arm("width", "ce", 3, 90),
    Arm("width", "kd", 3, 120),
    Arm("width", "reverse", 3, 90),
    Arm("width", "mix", 3, 90, ("distill.schedule=wsd", "distill.decay_steps=30")),
    Arm("ffn", "mix", 4, 90),
    Arm("ffn", "ce", 4, 120),
    Arm("ffn", "hot", 4, 90),
    Arm("ffn", "kd", 4, 90, ("distill.schedule=linear",)),
    Arm("ffn", "mix", 4, 90, ("distill.lr=4e-4",)),
)
HELD_OUT = (
    Arm("two", "mix", 5, 120),
    Arm("two", "kd", 5, 90),
    Arm("narrow", "ce", 5, 90),
    Arm("narrow", "mix", 5, 90),
    Arm("two", "reverse", 5, 90),
    Arm("narrow", "kd", 5, 90, ("distill.lr=4e-4",)),
    Arm("two", "ce", 5, 90, ("distill.schedule=linear",)),
    Arm("narrow", "reverse", 5, 120),
    Arm("two", "hot", 5, 90, ("distill.schedule=wsd", "distill.decay_steps=30")),
    Arm("narrow", "mix", 5, 150),
)


def launch(overrides: list[str], until: str) -> None:
    """`launch.run` as a process, on one core.

    Raises:
        SystemExit: with the end of its messages.
    """
    command = [sys.executable, "-m", "launch.run", *overrides, "--until", until]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def make_teacher(folder: Path) -> list[str]:
    """Trains the teacher that all curves share; returns the overrides of a run that reads it."""
    overrides = ["experiment=demo", f"run_dir={folder / 'teacher'}", *TEACHER]
    launch(overrides, "demo_model")
    made = locate(compose(overrides))["demo_model"].folder
    return [
        *("experiment=demo", "model=local", "model.family=qwen3", f"model.hf_path={made / HF}"),
        *(f"data.train=[{made / CORPUS_TRAIN}]", f"data.validation=[{made / CORPUS_VALIDATION}]"),
    ]


def measure(arm: Arm, teacher: list[str], folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics of one arm."""
    overrides = [*teacher, f"run_dir={folder / f'seed-{arm.seed}'}", *arm.overrides]
    launch(overrides, "distill")
    return read_metrics(locate(compose(overrides))["distill"].folder / METRICS)


def compact(arm: Arm, use: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A curve as the fixture has it: a list per column, losses to five digits after the point."""
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "val_loss" in line]
    return {
        "name": arm.name,
        "use": use,
        "overrides": list(arm.overrides),
        "tokens_per_step": steps[0]["tokens"] // steps[0]["step"],
        "step": [line["step"] for line in steps],
        "lr": [float(f"{line['lr']:.4g}") for line in steps],
        "loss": [round(line["loss"], 5) for line in steps],
        "val_step": [line["step"] for line in validations],
        "val_loss": [round(line["val_loss"], 5) for line in validations],
    }


def write(curves: list[dict[str, Any]], path: Path) -> None:
    """A line per key of each curve, so that a diff shows what changed."""
    blocks = [
        "{\n" + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in curve.items()) + "\n}"
        for curve in curves
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(blocks) + "\n]\n")


def make_curves(folder: Path, seconds: float) -> None:
    """Writes the fixture again; no curve is started once the time is up."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    teacher = make_teacher(folder)
    print(f"teacher: {time.monotonic() - began:.0f} s", flush=True)
    curves = []
    for use, arm in [*(("tuning", arm) for arm in TUNING), *(("held out", arm) for arm in HELD_OUT)]:
        if time.monotonic() - began > seconds:
            print(f"left out for lack of time: {arm.name}", flush=True)
            continue
        started = time.monotonic()
        curves.append(compact(arm, use, measure(arm, teacher, folder)))
        losses = curves[-1]["val_loss"]
        print(f"{arm.name}: {losses[0]:.4f} to {losses[-1]:.4f}, {time.monotonic() - started:.0f} s", flush=True)
        write(sorted(curves, key=lambda curve: (curve["use"], curve["name"])), FIXTURE)


def table() -> str:
    """Markdown: a row per curve, then the summary of each use."""
    lines = ["| curve | at a third | forecast of the end (90 %) | end | held |", "|---|---|---|---|---|"]
    notes = []
    for use in ("tuning", "held out"):
        curves = [curve for curve in load_curves() if curve.use == use]
        for title, look in (("validation", look_back), ("training", look_back_at_training)):
            found = {curve.name: one for curve in curves if (one := try_look(look, curve)) is not None}
            notes.append(f"{use}, {title} loss: {summarize(list(found.values()))}, {len(curves) - len(found)} refused")
            if title == "validation":
                lines += [_row(curve.name, use, found.get(curve.name)) for curve in curves]
    return "\n".join([*lines, "", *notes])


def _row(name: str, use: str, one: Hindsight | None) -> str:
    if one is None:
        return f"| {name} ({use}) | | refused: no clear decrease | | |"
    forecast = f"{one.median:.3f}, {one.low:.3f} to {one.high:.3f}"
    return f"| {name} ({use}) | {one.now:.3f} | {forecast} | {one.truth:.3f} | {'yes' if one.holds else 'no'} |"


def summarize(found: list[Hindsight]) -> str:
    medians = {
        "width": median(one.width for one in found),
        "error": median(abs(one.median - one.truth) for one in found),
        "further decrease": median(one.now - one.truth for one in found),
    }
    held = sum(one.holds for one in found)
    return f"{held} of {len(found)} held; medians in nats: " + ", ".join(f"{k} {v:.4f}" for k, v in medians.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.forecast_curves")
    parser.add_argument("folder", type=Path, nargs="?", help="make the curves there, in some hundred MB of runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further curve after this time")
    args = parser.parse_args()
    if args.folder is not None:
        make_curves(args.folder.resolve(), args.seconds)
    print(table())


if __name__ == "__main__":
    main()
