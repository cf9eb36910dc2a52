"""What a fitted loss curve says of a training: its loss after so many tokens, and the tokens to a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.planning.recorded import RecordedCurve
from launch.planning.recovery_curve import FEWEST_POINTS, INTERVAL, CannotFitError, Recovery, fit
from prune_distill.errors import InputError

# How many times as long as planned a training is looked at for a target loss.
MOST_STRETCH = 10
# Lengths that are tried for a target, within the training and beyond it.
LENGTHS = 200


@dataclass(frozen=True)
class Range:
    """The median and the 90 % interval of what is predicted; None: beyond all that was looked at."""

    median: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, draws: np.ndarray) -> Range:
        """Of draws, some of which may be infinite."""
        quantiles = np.quantile(draws, (0.5, *INTERVAL), method="inverted_cdf")
        median, low, high = (float(value) if np.isfinite(value) else None for value in quantiles)
        return cls(median, low, high)


@dataclass(frozen=True)
class LossForecast:
    """The loss after so many tokens, nats per token.

    Attributes:
        steps: the training's steps by then.
        stretched: whether this is the end of a longer training, whose schedule is stretched to these tokens.
        measured: the recorded loss, where the curve goes on beyond the points that were fitted.
    """

    tokens: int
    steps: int
    loss: Range
    stretched: bool
    measured: float | None


@dataclass(frozen=True)
class TargetForecast:
    """The tokens to a loss: within the training if it gets there, else of a longer one that ends there.

    Attributes:
        reached: the tokens at which a point has the target already; None: none has, and what follows is predicted.
        within: the most tokens that were looked at; `chance`: that the target is reached within them.
        floor: the loss that no length of training gets below.
    """

    target: float
    reached: int | None
    tokens: Range
    within: int
    chance: float
    floor: Range


@dataclass(frozen=True)
class Forecast:
    """All that is said of one curve.

    Attributes:
        name, metric: which curve.
        points: how many were fitted, up to `step` and `tokens`, where the last one has the loss `last`.
        max_steps, end: steps and tokens of the whole training.
        limit, exponent: of the fitted curve; `noise`: standard deviation of a point around it.
    """

    name: str
    metric: str
    points: int
    step: int
    tokens: int
    last: float
    max_steps: int
    end: int
    limit: Range
    exponent: Range
    noise: float
    losses: list[LossForecast]
    target: TargetForecast | None


def forecast(
    curve: RecordedCurve, tokens: Sequence[int] = (), target: float | None = None, until: float = np.inf
) -> Forecast:
    """Continues a curve.

    Args:
        tokens: where the loss is asked for; none: at the end of the training, unless it has ended.
        target: the loss whose tokens are asked for.
        until: the last step whose points are fitted; what was recorded later shows beside the forecast.

    Raises:
        InputError: the points do not allow a forecast, or there is nothing left to forecast.
    """
    fitted = curve.until(until)
    try:
        recovery = fit(fitted.tokens, fitted.losses, curve.schedule)
    except CannotFitError as error:
        hint = (
            "; wait for more points, validate more often (distill.val_every_n_steps), or set --metric=loss"
            if len(fitted.tokens) < FEWEST_POINTS
            else ""
        )
        raise InputError(f"{curve.name}: the values of {curve.metric} {error}{hint}") from error
    end, now = round(curve.schedule.end), round(recovery.tokens)
    if not tokens and target is None and now >= end:
        raise InputError(
            f"{curve.name}: has ended, after {end:,} tokens with a {curve.metric} of {fitted.losses[-1]:.4f}; set "
            "--tokens or --target for a longer training, or --first to fit its beginning only"
        )
    past = [count for count in tokens if count <= now]
    if past:
        raise InputError(f"--tokens={past[0]}: {curve.name} has {now} tokens already; set --tokens to more")
    asked = tokens or ([end] if now < end else [])
    return Forecast(
        name=curve.name,
        metric=curve.metric,
        points=len(fitted.tokens),
        step=int(fitted.steps[-1]),
        tokens=now,
        last=float(fitted.losses[-1]),
        max_steps=curve.training.max_steps,
        end=end,
        limit=Range.of(recovery.limit),
        exponent=Range.of(recovery.exponent),
        noise=recovery.noise,
        losses=[_forecast_loss(curve, recovery, count) for count in asked],
        target=None if target is None else _forecast_target(fitted, recovery, target),
    )


def _forecast_loss(curve: RecordedCurve, recovery: Recovery, tokens: int) -> LossForecast:
    stretched = tokens > curve.schedule.end
    losses = recovery.losses(np.array([tokens]), tokens if stretched else None)[:, 0]
    return LossForecast(tokens, curve.step_at(tokens), Range.of(losses), stretched, curve.measured(tokens))


def _forecast_target(fitted: RecordedCurve, recovery: Recovery, target: float) -> TargetForecast:
    end, now = fitted.schedule.end, recovery.tokens
    within = np.linspace(now, end, LENGTHS)[1:] if now < end else np.array([])
    beyond = end * np.geomspace(1, MOST_STRETCH, LENGTHS)[1:]
    columns = [recovery.losses(within), *(recovery.losses(np.array([length]), length) for length in beyond)]
    has_reached = np.concatenate(columns, axis=1) <= target
    lengths = np.append(np.concatenate([within, beyond]), np.inf)
    needed = lengths[np.where(has_reached.any(axis=1), has_reached.argmax(axis=1), -1)]
    # Of a single noisy point it would say little; the curve at the last point says it.
    below = fitted.losses <= target
    reached = int(fitted.tokens[below.argmax()]) if below.any() and np.median(recovery.now) <= target else None
    return TargetForecast(
        target=target,
        reached=reached,
        tokens=Range.of(needed),
        within=round(beyond[-1]),
        chance=float(np.isfinite(needed).mean()),
        floor=Range.of(recovery.floor()),
    )


def to_json(forecasts: Sequence[Forecast]) -> list[dict[str, object]]:
    """What `launch.forecast --json` prints: an object per curve, with the attributes above as keys."""
    return [dataclasses.asdict(one) for one in forecasts]


def to_text(one: Forecast) -> str:
    """A forecast for a person."""
    lines = [
        f"{one.name}: {one.metric}, {one.points} points to step {one.step} of {one.max_steps} "
        f"({one.tokens:,} of {one.end:,} tokens), {one.last:.4f} at the last",
        f"  fitted: limit {_losses(one.limit)}, exponent {one.exponent.median:.2f}, noise {one.noise:.4f}",
    ]
    for row in one.losses:
        kind = f"a training of {row.steps:,} steps, its schedule stretched" if row.stretched else f"step {row.steps:,}"
        measured = "" if row.measured is None else f"; measured {row.measured:.4f}"
        lines.append(f"  after {row.tokens:,} tokens ({kind}): {_losses(row.loss)}{measured}")
    return "\n".join([*lines, *([] if one.target is None else [f"  {_target_text(one.target)}"])])


def _target_text(found: TargetForecast) -> str:
    goal = f"target {found.target:g}: "
    if found.reached is not None:
        return f"{goal}already reached, at {found.reached:,} tokens"
    if found.tokens.median is None:
        chance = f"{found.chance:.0%}" if found.chance >= 0.01 else "under 1 %"
        return (
            f"{goal}not reached within {found.within:,} tokens (chance {chance}); the curve tends to "
            f"{_losses(found.floor)}"
        )
    low, high = (
        f"{value:,.0f}" if value is not None else f"more than {found.within:,}"
        for value in (found.tokens.low, found.tokens.high)
    )
    return f"{goal}{found.tokens.median:,.0f} tokens, {low} to {high} (90 %)"


def _losses(loss: Range) -> str:
    return f"{loss.median:.4f}, {loss.low:.4f} to {loss.high:.4f} (90 %)"
