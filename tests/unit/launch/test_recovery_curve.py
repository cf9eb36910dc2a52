"""The fit of a recovery curve: known parameters come back, and the ends of real curves lie in their intervals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from launch.planning.recorded import make_schedule
from launch.planning.recovery_curve import FEWEST_POINTS, CannotFitError, Schedule, fit
from tests.conftest import Compose
from tests.helpers.recovery_curves import (
    SEEN,
    Hindsight,
    RealCurve,
    load_curves,
    look_back,
    look_back_at_training,
    try_look,
)

STEPS, TOKENS_PER_STEP = 200, 512
LIMIT, AMPLITUDE, EXPONENT = 3.0, 0.5, 0.6
# Of the intervals of real curves, nats: the losses fall by 0.4 to 1.0 in all, of which a median of 0.22 after the first
# third.
MOST_WIDTH = 0.4


def constant_rate(steps: int = STEPS) -> Schedule:
    return Schedule.of(np.arange(1, steps + 1) * TOKENS_PER_STEP, np.ones(steps))


def half_cosine(steps: int = STEPS) -> Schedule:
    rates = (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    return Schedule.of(np.arange(1, steps + 1) * TOKENS_PER_STEP, rates)


def power_law(tokens: np.ndarray, schedule: Schedule, gain: float = 0.0) -> np.ndarray:
    """Losses of the formula, whose shift is 20 steps: in units of 100 steps at the peak rate."""
    progress, annealed = schedule.at(tokens)
    power = (progress / (100 * TOKENS_PER_STEP) + 0.2) ** -EXPONENT
    return LIMIT + AMPLITUDE * power - gain * annealed


def every(steps: int, last: int = STEPS) -> np.ndarray:
    return np.arange(steps, last + 1, steps, dtype=float) * TOKENS_PER_STEP


def median(draws: np.ndarray) -> float:
    return float(np.median(draws))


# Known parameters.


def test_parameters_come_back_from_a_whole_curve() -> None:
    """Without noise, up to the grid: neighboring exponents differ by 9 %, and the limit follows the exponent."""
    tokens, schedule = every(4), constant_rate()
    fitted = fit(tokens, power_law(tokens, schedule), schedule)
    assert median(fitted.exponent) == pytest.approx(EXPONENT, rel=0.1)
    assert median(fitted.limit) == pytest.approx(LIMIT, abs=0.05)
    assert fitted.noise < 1e-3


def test_the_end_comes_back_from_a_third_of_a_curve() -> None:
    """Of a rate that stays, the power law is all there is: a tenth of what is left to fall is the grid's error."""
    tokens, schedule = every(4), constant_rate()
    losses = power_law(tokens, schedule)
    seen = len(tokens) // 3
    fitted = fit(tokens[:seen], losses[:seen], schedule)
    assert median(fitted.losses(tokens[-1:])) == pytest.approx(losses[-1], abs=0.1 * (losses[seen - 1] - losses[-1]))


def test_the_gain_of_a_decay_comes_back_where_the_decay_was_seen() -> None:
    """From all but the last tenth of a cosine; the prior pulls by less than a quarter of it."""
    tokens, schedule = every(2), half_cosine()
    losses = power_law(tokens, schedule, gain=0.1)
    seen = int(0.9 * len(tokens))
    fitted = fit(tokens[:seen], losses[:seen], schedule)
    assert median(fitted.gain) == pytest.approx(0.1, abs=0.025)
    assert median(fitted.losses(tokens[-1:])) == pytest.approx(losses[-1], abs=0.005)


def test_a_decay_to_come_lowers_the_forecast() -> None:
    """At the same progress: the constant rate has it after half of the steps."""
    tokens, ends = every(2, last=60), []
    for schedule, steps in ((constant_rate(), STEPS / 2), (half_cosine(), STEPS)):
        fitted = fit(tokens, power_law(tokens, schedule), schedule)
        ends.append(median(fitted.losses(np.array([steps * TOKENS_PER_STEP]))))
    assert ends[1] < ends[0]


def test_noise_widens_the_interval_and_is_measured() -> None:
    tokens, schedule = every(2, last=100), constant_rate()
    losses = power_law(tokens, schedule)
    rng = np.random.default_rng(0)
    widths = []
    for noise in (0.001, 0.01):
        fitted = fit(tokens, losses + noise * rng.standard_normal(len(losses)), schedule)
        # Of 45 points, the standard deviation itself is known to a tenth; three of these.
        assert fitted.noise == pytest.approx(noise, rel=0.35)
        widths.append(float(np.ptp(np.quantile(fitted.losses(tokens[-1:] * 2), (0.05, 0.95)))))
    assert widths[1] > widths[0]


def test_the_same_points_give_the_same_forecast() -> None:
    tokens, schedule = every(5), constant_rate()
    first, second = (fit(tokens, power_law(tokens, schedule), schedule).losses(tokens) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_units_do_not_matter() -> None:
    """A forecast of a billion times the tokens, and of losses in another unit."""
    tokens, schedule = every(5, last=100), half_cosine()
    large = Schedule.of(schedule.tokens[1:] * 1e9, np.diff(schedule.progress))
    losses = power_law(tokens, schedule)
    ours, theirs = fit(tokens, losses, schedule), fit(tokens * 1e9, losses * 10, large)
    end = np.array([schedule.end])
    assert median(theirs.losses(end * 1e9)) == pytest.approx(10 * median(ours.losses(end)), rel=1e-6)


def test_thousands_of_points_are_grouped() -> None:
    schedule = constant_rate(20_000)
    tokens = schedule.tokens[1:]
    losses = power_law(tokens, schedule) + 0.05 * np.random.default_rng(0).standard_normal(len(tokens))
    fitted = fit(tokens, losses, schedule)
    assert fitted.points == 20_000
    assert median(fitted.losses(tokens[-1:])) == pytest.approx(power_law(tokens[-1:], schedule)[0], abs=0.005)


def test_a_stretched_training_ends_lower() -> None:
    tokens, schedule = every(4, last=100), half_cosine()
    fitted = fit(tokens, power_law(tokens, schedule), schedule)
    ends = [median(fitted.losses(np.array([factor * schedule.end]), factor * schedule.end)) for factor in (1, 2, 10)]
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] > median(fitted.floor())


# What cannot be continued.


def refusal(losses: np.ndarray) -> str:
    tokens = np.arange(1, len(losses) + 1) * float(TOKENS_PER_STEP)
    with pytest.raises(CannotFitError) as caught:
        fit(tokens, losses, constant_rate())
    return str(caught.value)


def test_too_few_points() -> None:
    assert f"at least {FEWEST_POINTS}" in refusal(np.linspace(4, 3, FEWEST_POINTS - 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite(bad: float) -> None:
    losses = np.linspace(4, 3, 20)
    losses[7] = bad
    assert "1 that are not finite" in refusal(losses)


@pytest.mark.parametrize(
    "losses",
    [
        np.full(30, 3.5),
        np.linspace(3, 4, 30),
        3.5 + 0.01 * np.random.default_rng(0).standard_normal(60),
    ],
    ids=["constant", "rising", "noise"],
)
def test_no_decrease(losses: np.ndarray) -> None:
    assert "do not decrease clearly" in refusal(losses)


def test_a_curve_that_falls_faster_and_faster_is_not_one() -> None:
    """Such as one of a rate that is far too low at first: no power law has its shape."""
    assert "flattens" in refusal(4 - np.linspace(0, 1, 40) ** 4)


# Real curves.


def curves(use: str) -> list[RealCurve]:
    return [curve for curve in load_curves() if curve.use == use]


def test_the_real_curves_are_enough_and_differ() -> None:
    assert len(curves("held out")) >= 10
    assert len(curves("tuning")) >= 4
    seeds = [
        {part for curve in curves(use) for part in curve.overrides if part.startswith("seed=")}
        for use in ("tuning", "held out")
    ]
    assert not seeds[0] & seeds[1]


def hindsights(look: Callable[..., Hindsight], seen: float = SEEN) -> list[Hindsight]:
    """Of the held-out curves; those that have no clear decrease by then are refused."""
    return [found for curve in curves("held out") if (found := try_look(partial(look, seen=seen), curve)) is not None]


@pytest.mark.parametrize("seen", [SEEN, 0.5])
def test_intervals_hold_the_ends_of_held_out_curves(seen: float) -> None:
    """From the first part of each. The intervals are meant to hold 9 of 10; 8 of 10 are asked for."""
    found = hindsights(look_back, seen)
    missed = [one for one in found if not one.holds]
    assert len(found) >= 9
    assert len(missed) <= 0.2 * len(found), missed


def test_intervals_say_something() -> None:
    """Their width is less than twice what the loss has still to fall, and most exclude that it falls no further."""
    found = hindsights(look_back)
    assert np.median([one.width for one in found]) < MOST_WIDTH
    assert np.median([one.width / (one.now - one.truth) for one in found]) < 2
    assert np.mean([one.high < one.now for one in found]) >= 0.7


def test_intervals_of_training_losses_hold() -> None:
    """Batches of four sequences are so noisy that most curves of this length are refused."""
    found = hindsights(look_back_at_training)
    missed = [one for one in found if not one.holds]
    assert found
    assert len(missed) <= 0.2 * len(found), missed


def test_a_real_curve_that_does_not_fall_is_refused() -> None:
    """A student that lost little by pruning: at the full learning rate its loss first rises."""
    curve = next(curve for curve in curves("tuning") if curve.name.startswith("depth"))
    with pytest.raises(CannotFitError, match="decrease"):
        look_back(curve)


def test_the_schedule_of_a_real_curve_is_the_configs(demo: Compose) -> None:
    """The fixture's learning rates were recorded, and are rounded to four digits."""
    curve = curves("held out")[0]
    schedule = make_schedule(demo(*curve.overrides).distill)
    np.testing.assert_allclose(schedule.progress, curve.schedule.progress, rtol=1e-2)
    assert schedule.warmed_up == curve.schedule.warmed_up
