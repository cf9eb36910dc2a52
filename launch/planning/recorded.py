"""Loss curves as the stages of a run recorded them, with the schedule of their training."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.planning.recovery_curve import Schedule
from prune_distill.config.load import load_resolved
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import Located, locate
from prune_distill.pipeline.metrics_file import read_metrics
from prune_distill.pipeline.names import METRICS, RESOLVED, WINNER
from prune_distill.schema import Training
from prune_distill.schema.phases import tokens_before, training_phases
from prune_distill.schema.schedules import learning_rate

HALVING = "successive_halving"
# Steps at which the schedule is looked at, at most; between them, progress is a straight line.
KNOTS = 4000
# The recorded learning rate is that of the config up to rounding.
SAME_RATE = 1e-3


@dataclass(frozen=True)
class RecordedCurve:
    """A loss by steps.

    Attributes:
        name: the run's folder and the stage, and of successive halving the candidate.
        metric: the name of the loss in `metrics.jsonl`.
        steps, tokens, losses: of each point, ascending. A loss that was recorded as null is NaN.
        training: its settings; `schedule`: its learning rate, as planned.
    """

    name: str
    metric: str
    steps: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    training: Training
    schedule: Schedule

    def until(self, step: float) -> RecordedCurve:
        """The points up to a step."""
        kept = self.steps <= step
        return dataclasses.replace(self, steps=self.steps[kept], tokens=self.tokens[kept], losses=self.losses[kept])

    def measured(self, tokens: float) -> float | None:
        """The loss after so many tokens, between points by a straight line; None beyond the last, or not finite."""
        if not len(self.tokens) or tokens > self.tokens[-1]:
            return None
        loss = float(np.interp(tokens, self.tokens, self.losses))
        return loss if math.isfinite(loss) else None

    def step_at(self, tokens: float) -> int:
        """The step that a training of this schedule reaches with so many tokens."""
        if tokens > self.schedule.end:
            return math.ceil(self.training.max_steps * tokens / self.schedule.end)
        phases = training_phases(self.training)
        steps = range(self.training.max_steps + 1)
        return bisect_left(steps, tokens, key=lambda step: tokens_before(phases, step))


def read_curves(run_dir: Path, stage: str, metric: str) -> Iterator[RecordedCurve]:
    """The curves of a stage: one, or one per candidate of successive halving.

    Raises:
        ConfigError: the folder holds no run, or the run's inputs are gone.
        InputError: the run has no such stage, or the stage no such curve.
    """
    cfg = load_resolved(run_dir / RESOLVED)
    cfg.run_dir = str(run_dir)
    located = locate(cfg)
    trained = [name for name, one in located.items() if one.stage.trains]
    if stage not in trained:
        raise InputError(f"--stage={stage}: no stage of {run_dir} that trains; set one of {', '.join(trained)}")
    training = _training(located[stage])
    folder = _find_folder(run_dir, located[stage])
    if stage != HALVING:
        yield _read_curve(f"{run_dir} {stage}", folder / METRICS, metric, training)
        return
    for path in sorted(folder.glob(f"*/{METRICS}")):
        if path.parent.name != WINNER:  # a copy of its candidate's
            yield _read_curve(f"{run_dir} {stage} {path.parent.name}", path, metric, training)


def _find_folder(run_dir: Path, located: Located) -> Path:
    """The stage's folder; that of another hash where it is the only one, as of a run made by other versions."""
    pattern = f"*/{METRICS}" if located.stage.name == HALVING else METRICS
    others = [path for path in run_dir.glob(f"{located.stage.name}-????????") if any(path.glob(pattern))]
    if located.folder in others:
        return located.folder
    if len(others) == 1:
        return others[0]
    several = f"; {len(others)} folders are of other settings" if others else ""
    raise InputError(
        f"{located.folder}: has no {METRICS} yet{several}; wait until {located.stage.name} trains, or set --stage"
    )


def _training(located: Located) -> Training:
    """The settings of what a stage trains."""
    cfg, kind = located.cfg, located.stage.name.partition(".")[0]
    if kind == "demo_model" and cfg.model.demo is not None:
        return cfg.model.demo.training
    if kind == "correct_teacher" and cfg.distill.teacher_correction is not None:
        return cfg.distill.teacher_correction
    return cfg.distill


def _read_curve(name: str, path: Path, metric: str, training: Training) -> RecordedCurve:
    lines = read_metrics(path)
    # Of a step that was repeated after a kill, the last line counts.
    points = {line["step"]: line[metric] for line in lines if metric in line}
    if not points:
        known = sorted({key for line in lines for key in line if key.endswith("loss")})
        raise InputError(
            f"--metric={metric}: {path} does not hold it yet; "
            + (f"set one of {', '.join(known)}" if known else "wait for its first lines")
        )
    _check_schedule(path, lines, training)
    steps = sorted(points)
    phases = training_phases(training)
    return RecordedCurve(
        name=name,
        metric=metric,
        steps=np.array(steps),
        tokens=np.array([tokens_before(phases, step) for step in steps], float),
        losses=np.array([math.nan if points[step] is None else points[step] for step in steps], float),
        training=training,
        schedule=make_schedule(training),
    )


def make_schedule(training: Training) -> Schedule:
    """The planned learning rate of a training over its tokens."""
    phases = training_phases(training)
    steps = np.unique(np.linspace(1, training.max_steps, min(KNOTS, training.max_steps)).astype(int)).tolist()
    tokens = [tokens_before(phases, step) for step in steps]
    return Schedule.of(np.array(tokens), np.array([learning_rate(training, step - 1) for step in steps]))


def _check_schedule(path: Path, lines: Sequence[Mapping[str, float | None]], training: Training) -> None:
    """Raises: InputError, where the lines are of a training with another schedule than the run's config has now."""
    steps = [int(line["step"] or 0) for line in lines]
    if max(steps) > training.max_steps:
        raise InputError(
            f"{path}: goes to step {max(steps)}, the run's config ends at max_steps={training.max_steps}; restore the "
            f"config that it was made with in {RESOLVED}"
        )
    rated = [line for line in lines if line.get("lr") is not None]
    if rated:
        step, rate = int(rated[-1]["step"] or 0), float(rated[-1]["lr"] or 0)
        # A line has the rate of the step after it.
        expected = learning_rate(training, step)
        if abs(rate - expected) > SAME_RATE * training.lr:
            raise InputError(
                f"{path}: has a learning rate of {rate:g} after step {step}, the run's config {expected:g}; restore "
                f"the config that it was made with in {RESOLVED}"
            )
