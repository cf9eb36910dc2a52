"""Real loss curves (tests/data/recovery_curves.json), and forecasts of their ends from their beginnings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from launch.planning.recovery_curve import ASSUMPTIONS, INTERVAL, Assumptions, CannotFitError, Schedule, fit

FIXTURE = Path(__file__).resolve().parents[1] / "data" / "recovery_curves.json"
# How much of a training the forecast sees.
SEEN = 1 / 3
# Of the training loss, whose batches differ, the end is the mean of this share of the steps.
END = 0.1


@dataclass(frozen=True)
class RealCurve:
    """A distillation of the demo.

    Attributes:
        use: "tuning", or "held out" where no constant was chosen by it.
        tokens, loss: after each step, of its own batch; val_tokens, val_loss: of the same held-out batches.
    """

    name: str
    use: str
    overrides: list[str]
    schedule: Schedule
    tokens: np.ndarray
    loss: np.ndarray
    val_tokens: np.ndarray
    val_loss: np.ndarray


@dataclass(frozen=True)
class Hindsight:
    """The forecast of an end that is known, nats per token.

    Attributes:
        now: the loss at the end of what the forecast saw.
    """

    name: str
    now: float
    low: float
    median: float
    high: float
    truth: float

    @property
    def holds(self) -> bool:
        return self.low <= self.truth <= self.high

    @property
    def width(self) -> float:
        return self.high - self.low


@cache
def load_curves() -> list[RealCurve]:
    return [_parse(entry) for entry in json.loads(FIXTURE.read_text())]


def _parse(entry: dict[str, Any]) -> RealCurve:
    tokens = np.array(entry["step"], float) * entry["tokens_per_step"]
    # A line has the rate of the step after it; the warm-up begins with one step of its rise.
    rates = np.array([entry["lr"][1] - entry["lr"][0], *entry["lr"][:-1]])
    return RealCurve(
        name=entry["name"],
        use=entry["use"],
        overrides=entry["overrides"],
        schedule=Schedule.of(tokens, rates),
        tokens=tokens,
        loss=np.array(entry["loss"]),
        val_tokens=np.array(entry["val_step"], float) * entry["tokens_per_step"],
        val_loss=np.array(entry["val_loss"]),
    )


def look_back(curve: RealCurve, seen: float = SEEN, assumptions: Assumptions = ASSUMPTIONS) -> Hindsight:
    """Predicts the last validation loss from the validations of the first steps."""
    count = int(np.count_nonzero(curve.val_tokens <= seen * curve.schedule.end))
    fitted = fit(curve.val_tokens[:count], curve.val_loss[:count], curve.schedule, assumptions)
    losses = fitted.losses(curve.val_tokens[-1:])[:, 0]
    low, median, high = np.quantile(losses, (INTERVAL[0], 0.5, INTERVAL[1]))
    return Hindsight(curve.name, curve.val_loss[count - 1], low, median, high, curve.val_loss[-1])


def look_back_at_training(curve: RealCurve, seen: float = SEEN, assumptions: Assumptions = ASSUMPTIONS) -> Hindsight:
    """Predicts the mean training loss of the last steps, whose own noise widens the interval."""
    count, last = int(seen * len(curve.loss)), int(END * len(curve.loss))
    fitted = fit(curve.tokens[:count], curve.loss[:count], curve.schedule, assumptions)
    losses = fitted.losses(curve.tokens[-last:]).mean(axis=1)
    noise = fitted.noise / np.sqrt(last) * np.random.default_rng(1).standard_normal(len(losses))
    low, median, high = np.quantile(losses + noise, (INTERVAL[0], 0.5, INTERVAL[1]))
    now, truth = (float(part.mean()) for part in (curve.loss[count - last : count], curve.loss[-last:]))
    return Hindsight(curve.name, now, low, median, high, truth)


def try_look(look: Callable[[RealCurve], Hindsight], curve: RealCurve) -> Hindsight | None:
    """What `look` finds; None where the forecast is refused."""
    try:
        return look(curve)
    except CannotFitError:
        return None
