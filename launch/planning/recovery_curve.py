"""The loss curve of a training, continued: a power law with an offset that knows the learning rate. numpy only.

    L = limit + amplitude * (progress + shift)^-exponent - gain * annealed

`progress` is the integral of the learning rate over the tokens, in units of tokens at the peak rate: a step at a tenth
of the peak moves the weights a tenth as far. `annealed` is the share of the peak by which the rate has fallen: the loss
falls further while the rate decays, because the noise of large steps goes. Both are the quantities of arXiv 2408.11029;
its memory of some thousand steps is left out, as it cannot be told from so few points.

Uncertainty: exponent and shift are on a grid, each pair weighted by how well it explains the points; given both, the
other three follow from a linear regression, in which the gain has a prior. Draws from all of them are the forecast, and
their quantiles its interval. Two model errors, measured on real curves, widen it: one relative to the further decrease,
one that grows with the distance, as real losses wander.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Points below which nothing is fitted: five parameters, and some points that can contradict them.
FEWEST_POINTS = 8
# The decrease over the points has to be so many standard errors, or there is no curve to continue.
CLEAR_DECREASE = 4.0
# The middle 90 % of the draws.
INTERVAL = (0.05, 0.95)
DRAWS = 4000
# More points than that are averaged in groups: nothing is gained, and time is lost.
MOST_POINTS = 120
# Points before this share of the progress so far are not fitted.
EARLY = 0.2
# The noise of a point is taken for at least this share of the decrease.
NOISE_FLOOR = 1e-3
# The noise decides how much the assumptions weigh, and so again the fit: it settles in a few rounds.
ROUNDS = 3
# Residuals that are larger than this share of the losses' own deviation, and so many times what neighbors differ by,
# are no noise: the curve has another shape.
MOST_MISFIT = 0.2
CLEAR_MISFIT = 3.0
# What a decay gives is in units of the decrease, or of this share of the loss if that is more: it is there also where
# the loss has settled at the high rate.
LEAST_SCALE = 0.03
# The share of draws that has to be possible: fewer are a fit against its own bounds.
FEWEST_POSSIBLE = 0.05
EXPONENTS = np.geomspace(0.1, 3.0, 40)
# In units of the progress at the last point.
SHIFTS = np.geomspace(0.01, 3.0, 30)


@dataclass(frozen=True)
class Assumptions:
    """What the points themselves cannot tell early on, from real curves (tests/data/recovery_curves.json).

    Attributes:
        gain: what a full decay of the learning rate gives by itself, in units of the decrease over the fitted points;
            mean.
        gain_spread: the same; standard deviation.
        model_error: standard deviation of the true further decrease around the predicted one, relative.
        drift: standard deviation of the true loss around the predicted one, relative to the loss, at a distance of 1:
            where progress is e times as far, or the learning rate has fallen by its peak. Real losses wander.
    """

    gain: float = 0.5
    gain_spread: float = 0.5
    model_error: float = 0.15
    drift: float = 0.0075


ASSUMPTIONS = Assumptions()


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a training over its tokens.

    Attributes:
        tokens: ascending, the first 0 and the last the end of the training.
        progress: the integral of the learning rate up to there, in tokens at the peak rate.
        annealed: the share of the peak by which the rate has fallen there, 0 to 1.
        warmed_up: the tokens at which the rate reaches its first peak.
    """

    tokens: np.ndarray
    progress: np.ndarray
    annealed: np.ndarray
    warmed_up: float

    @classmethod
    def of(cls, tokens: np.ndarray, rates: np.ndarray) -> Schedule:
        """A schedule from tokens after steps, ascending from the first step on, and the rate of each step."""
        edges = np.concatenate([[0.0], np.asarray(tokens, float)])
        rates = np.asarray(rates, float)
        peak = float(rates.max())
        progress = np.concatenate([[0.0], np.cumsum(np.diff(edges) * rates / peak)])
        annealed = np.concatenate([[0.0], (np.maximum.accumulate(rates) - rates) / peak])
        rising = np.append(np.diff(rates) > 0, False)
        return cls(edges, progress, annealed, float(edges[int(np.argmin(rising))]))

    @property
    def end(self) -> float:
        """The tokens of the whole training."""
        return float(self.tokens[-1])

    def at(self, tokens: np.ndarray, end: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Progress and annealing after so many tokens, of this schedule or of one stretched to another `end`."""
        stretch = 1.0 if end is None else end / self.end
        where = np.asarray(tokens, float) / stretch
        progress = np.interp(where, self.tokens, self.progress) * stretch
        return progress, np.interp(where, self.tokens, self.annealed)


class CannotFitError(ValueError):
    """The points do not allow a forecast. The message says why, as the end of a sentence about them."""


@dataclass(frozen=True)
class Recovery:
    """A fitted curve, as draws of its parameters.

    Attributes:
        limit, amplitude, exponent, shift, gain: of the formula above, one value per draw. Progress is in units of
            `unit` tokens at the peak rate.
        error: the relative model error of each draw's further decrease; `drift`: its drift in nats, at a distance of 1.
        now: each draw's loss at the last point.
        noise: standard deviation of a point around the curve, nats.
        points: how many were fitted, and `tokens`: where the last one is.
    """

    schedule: Schedule
    unit: float
    limit: np.ndarray
    amplitude: np.ndarray
    exponent: np.ndarray
    shift: np.ndarray
    gain: np.ndarray
    error: np.ndarray
    drift: np.ndarray
    noise: float
    points: int
    tokens: float
    now: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "now", self._curve(np.array([self.tokens]), None)[:, 0])

    def _curve(self, tokens: np.ndarray, end: float | None) -> np.ndarray:
        progress, annealed = self.schedule.at(tokens, end)
        power = (progress[None, :] / self.unit + self.shift[:, None]) ** -self.exponent[:, None]
        return self.limit[:, None] + self.amplitude[:, None] * power - self.gain[:, None] * annealed[None, :]

    def losses(self, tokens: np.ndarray, end: float | None = None) -> np.ndarray:
        """The loss after so many tokens, a row per draw, in nats per token: of the curve, without a batch's noise.

        Args:
            end: the tokens of the whole training, whose schedule is stretched to them; None: as it is.
        """
        progress, annealed = self.schedule.at(tokens, end)
        progress_now, annealed_now = self.schedule.at(np.array([self.tokens]))
        # Backwards there is none: the points are there.
        further = np.maximum(np.log(np.maximum(progress, 1e-9) / progress_now), 0)
        distance = further + np.maximum(annealed - annealed_now, 0)
        decrease = (self.now[:, None] - self._curve(tokens, end)) * np.exp(self.error)[:, None]
        decrease = decrease - self.drift[:, None] * distance[None, :]
        # A loss does not end above where it is, unless the training breaks, which no curve foretells.
        ahead = distance > 0
        return self.now[:, None] - np.where(ahead[None, :], np.maximum(decrease, 0), decrease)

    def floor(self) -> np.ndarray:
        """What the fitted curve tends to at the end of ever longer trainings, a value per draw."""
        return self.limit - self.gain * self.schedule.annealed[-1]


def fit(tokens: np.ndarray, losses: np.ndarray, schedule: Schedule, assumptions: Assumptions = ASSUMPTIONS) -> Recovery:
    """Fits the curve to the losses after so many tokens, ascending.

    Raises:
        CannotFitError: too few points, losses that are not finite, or no decrease.
    """
    tokens, losses = np.asarray(tokens, float), np.asarray(losses, float)
    _refuse_hopeless(losses)
    last, count = float(tokens[-1]), len(tokens)
    begin = min(_count_early(tokens, schedule), count - FEWEST_POINTS)
    tokens, losses = _grouped(tokens[begin:]), _grouped(losses[begin:])
    progress, annealed = schedule.at(tokens)
    unit = float(progress[-1])
    grid = _Grid.of(progress / unit, annealed)
    fits = grid.solve(losses, _scale(losses), assumptions)
    if fits.noise > max(MOST_MISFIT * float(np.std(losses)), CLEAR_MISFIT * _neighbor_noise(losses)):
        raise CannotFitError("do not follow a curve that falls and flattens")
    rng = np.random.default_rng(0)  # the same points give the same forecast
    picked = rng.choice(len(fits.chance), DRAWS, p=fits.chance)
    linear = fits.solved[picked] + np.einsum(
        "dij,dj->di", _root(fits.covariance)[picked], rng.standard_normal((DRAWS, 3))
    )
    error = assumptions.model_error * rng.standard_normal(DRAWS)
    drift = assumptions.drift * float(losses[-(len(losses) // 4) :].mean()) * rng.standard_normal(DRAWS)
    # Losses are not negative, a curve that is continued falls, and a decay of the learning rate does no harm.
    limit, amplitude, gain = linear.T
    possible = (limit > gain) & (amplitude > 0) & (gain >= 0)
    if possible.mean() < FEWEST_POSSIBLE:
        raise CannotFitError("do not follow a curve that falls and flattens")
    picked, linear, error, drift = picked[possible], linear[possible], error[possible], drift[possible]
    return Recovery(
        schedule=schedule,
        unit=unit,
        limit=linear[:, 0],
        amplitude=linear[:, 1],
        exponent=grid.exponents[picked],
        shift=grid.shifts[picked],
        gain=linear[:, 2],
        error=error,
        drift=drift,
        noise=fits.noise * float(np.sqrt(-(-(count - begin) // MOST_POINTS))),
        points=count,
        tokens=last,
    )


def _refuse_hopeless(losses: np.ndarray) -> None:
    """Raises: CannotFitError."""
    if not np.isfinite(losses).all():
        raise CannotFitError(f"contain {np.count_nonzero(~np.isfinite(losses))} that are not finite")
    if len(losses) < FEWEST_POINTS:
        raise CannotFitError(f"are {len(losses)}; a forecast needs at least {FEWEST_POINTS}")
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    noise = _neighbor_noise(losses)
    decrease = float(first.mean() - last.mean())
    if decrease <= CLEAR_DECREASE * noise * np.sqrt(2 / third):
        raise CannotFitError(
            f"do not decrease clearly: by {decrease:.4f} nats from the first third to the last, where a point's noise "
            f"is {noise:.4f}"
        )


def _scale(losses: np.ndarray) -> float:
    """The decrease from the first quarter to the last, or a share of the loss itself if that is more; nats."""
    quarter = len(losses) // 4
    decrease = float(losses[:quarter].mean() - losses[-quarter:].mean())
    return max(decrease, LEAST_SCALE * float(losses[-quarter:].mean()))


def _neighbor_noise(losses: np.ndarray) -> float:
    """Standard deviation of a point, from neighbors: their differences hold the noise and little of the curve."""
    return float(np.std(np.diff(losses)) / np.sqrt(2))


def _count_early(tokens: np.ndarray, schedule: Schedule) -> int:
    """How many points are of the warm-up, or of the first repair after pruning, which is no part of the power law."""
    progress, _ = schedule.at(tokens)
    return int(np.count_nonzero((tokens <= schedule.warmed_up) | (progress < EARLY * progress[-1])))


def _grouped(values: np.ndarray) -> np.ndarray:
    """The means of groups of neighbors, of equal size but for the first one, which may be smaller."""
    size = -(-len(values) // MOST_POINTS)
    starts = np.maximum(np.arange(len(values) % size - size if len(values) % size else 0, len(values), size), 0)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


@dataclass(frozen=True)
class _Fits:
    """The regression of every grid point: limit, amplitude and gain, their covariance, and the point's chance."""

    solved: np.ndarray
    covariance: np.ndarray
    chance: np.ndarray
    noise: float


@dataclass(frozen=True)
class _Grid:
    """Exponents and shifts, and for each pair the columns of the linear parameters (pairs, points, 3)."""

    exponents: np.ndarray
    shifts: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, progress: np.ndarray, annealed: np.ndarray) -> _Grid:
        exponents, shifts = np.tile(EXPONENTS, len(SHIFTS)), np.repeat(SHIFTS, len(EXPONENTS))
        power = (progress[None, :] + shifts[:, None]) ** -exponents[:, None]
        return cls(
            exponents,
            shifts,
            np.stack([np.ones_like(power), power, np.broadcast_to(-annealed, power.shape)], axis=-1),
        )

    def solve(self, losses: np.ndarray, scale: float, assumptions: Assumptions) -> _Fits:
        """Least squares with one more row, for what is assumed of the gain; the noise is that of the best pair."""
        noise = NOISE_FLOOR * scale
        for _ in range(ROUNDS):
            rows = np.concatenate([self.columns, np.zeros((len(self.columns), 1, 3))], axis=1)
            rows[:, -1, 2] = 1 / (assumptions.gain_spread * scale) * noise
            target = np.append(losses, assumptions.gain / assumptions.gain_spread * noise)
            inverse = np.linalg.pinv(np.einsum("gni,gnj->gij", rows, rows), rcond=1e-13, hermitian=True)
            solved = np.einsum("gij,gnj,n->gi", inverse, rows, target)
            misfit = np.sum((np.einsum("gni,gi->gn", rows, solved) - target) ** 2, axis=1)
            misfit = np.where(solved[:, 1] > 0, misfit, np.inf)
            if not np.isfinite(misfit).any():
                raise CannotFitError("do not follow a curve that falls and flattens")
            best = int(misfit.argmin())
            noise, neighbors = _noise(losses - self.columns[best] @ solved[best], NOISE_FLOOR * scale)
        chance = np.exp(-(misfit - misfit.min()) / (2 * noise**2 * neighbors))
        return _Fits(solved, inverse * noise**2 * neighbors, chance / chance.sum(), noise)


def _noise(residuals: np.ndarray, floor: float) -> tuple[float, float]:
    """The standard deviation of a point around the curve, and how many neighbors count as one point, because what
    moves one moves the next."""
    noise = max(float(np.sqrt(np.sum(residuals**2) / (len(residuals) - 4))), floor)
    lagged = float(np.sum(residuals[1:] * residuals[:-1]) / max(float(np.sum(residuals**2)), 1e-300))
    correlation = min(max(lagged, 0.0), 0.8)
    return noise, (1 + correlation) / (1 - correlation)


def _root(covariance: np.ndarray) -> np.ndarray:
    """A matrix whose square is the covariance, of each."""
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
