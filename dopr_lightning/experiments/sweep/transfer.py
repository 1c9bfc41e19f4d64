"""How far does the best value of a hyperparameter move with the width, and what does it cost to ignore that?

Pure functions of losses. A metric of which more is better enters with its sign changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

REACH = 1.01
"""Octaves on either side of the best value of the grid within which a parabola is fitted; a value exactly an octave
away belongs to them. A wider one would be bent by the cliff that losses have at large learning rates."""

DIP = 0.08
"""How far below the grid's lowest loss a parabola's vertex may lie: a share of that loss, per squared octave between
values, since what a basin hides between two of them grows like that square; at half octaves, 2 %. Losses that were
measured ask for less than half of it, means of few rollouts for up to nine tenths. What falls further was bent by a
cliff."""

COARSEST = 2.01
"""Octaves between values up to which a parabola says what lies between them. Weight decays a factor of three apart gave
the best value that half octaves gave; of the same runs those a factor of ten apart gave one 1.7 octaves off."""

RESAMPLES = 1000

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Curve:
    """The loss at one width over log2 of a hyperparameter.

    Args:
        x: log2 of the grid's values, increasing.
        y: Their losses, means over seeds; infinite where a seed diverged.
        best: log2 of the best value.
        least: The loss there.
        at_edge: The best value of the grid is its first or last one: the true one may lie beyond, and ``best`` says
            only on which side.
        parabola: Coefficients in (x - best of the grid), and the ends of the x it was fitted to. None where the loss
            is not seen to rise on both sides: at an edge, or beside values that diverged or lie up a cliff.
    """

    x: Array
    y: Array
    best: float
    least: float
    at_edge: bool
    parabola: tuple[Array, float, float, float] | None

    def at(self, x: float) -> float:
        """The loss at any x: on the parabola, and where that does not reach, between neighbours on a straight line."""
        if self.parabola is not None:
            coefficients, centre, low, high = self.parabola
            if low <= x <= high:
                return float(np.polyval(coefficients, x - centre))
        return float(np.interp(x, self.x, self.y))


def fit_curve(values: Sequence[float], losses: Array) -> Curve | None:
    """The curve of one width, its best value by least squares on a parabola around the best value of the grid.

    Where a cliff bends that parabola (:data:`DIP`), one through the best value and its neighbours alone; where it bends
    that one too, or where neighbours are too far away (:data:`COARSEST`), none. Of several values that are level the
    middle one is the best.

    Args:
        values: Of the hyperparameter: positive, increasing.
        losses: (values, seeds); NaN or infinity where a run diverged, which condemns the value.

    Returns:
        None where every value diverged, and where all are level: they say nothing of which is best.
    """
    x = np.log2(np.asarray(values, dtype=np.float64))
    y = np.where(np.isfinite(losses).all(axis=1), losses.sum(axis=1) / losses.shape[1], np.inf)
    level = np.flatnonzero(y == y.min())
    i = _lowest(y)
    if not math.isfinite(y[i]) or len(level) == np.isfinite(y).sum() > 1:
        return None
    plateau = len(level) > 2  # a vertex may well lie in the middle between two
    at_edge = bool({0, len(x) - 1} & set(level if plateau else [i]))
    grid = Curve(x, y, float(x[i]), float(y[i]), at_edge, None)
    if at_edge or plateau or not np.isfinite(y[i - 1 : i + 2]).all():
        return grid
    central = np.zeros_like(x, dtype=bool)
    central[i - 1 : i + 2] = True
    step = max(x[i] - x[i - 1], x[i + 1] - x[i])
    if step > COARSEST:
        return grid
    for near in (((np.abs(x - x[i]) <= REACH) | central) & np.isfinite(y), central):
        coefficients = np.polyfit(x[near] - x[i], y[near], 2)
        if not coefficients[0] > 0:
            return grid
        best = float(np.clip(x[i] - coefficients[1] / (2 * coefficients[0]), x[i - 1], x[i + 1]))
        least = float(np.polyval(coefficients, best - x[i]))
        if least >= y[i] - DIP * step**2 * abs(y[i]):
            window = (coefficients, float(x[i]), float(x[near].min()), float(x[near].max()))
            return Curve(x, y, best, least, False, window)
    return grid


def _lowest(y: Array) -> int:
    """Where the grid's best value is: the middle one of several that are level."""
    level = np.flatnonzero(y == y.min())
    return int(level[(len(level) - 1) // 2])


@dataclass(frozen=True)
class AtWidth:
    """What one width says of one hyperparameter. None where it says nothing; intervals are 95 %.

    Args:
        width: The width.
        best: The best value.
        best_ci95: Its interval.
        loss: Loss at the best value.
        at_edge: The grid ends at the best value.
        fitted: Whether ``best`` is a parabola's; else it is a value of the grid.
        drift: log2(best / best at the narrowest width).
        drift_ci95: Its interval.
        regret: Loss at the best value of the narrowest width, relative to the best loss, minus 1.
        regret_ci95: Its interval.
        grid_regret: The same without a fit: loss at the grid's best value for the narrowest width, relative to the
            lowest loss of the grid. What a person pays who takes the best run for the best value.
        grid_regret_ci95: Its interval.
        wasted_compute: The share of this width's training compute that the regret is worth: a tuned network of
            ``1 - wasted_compute`` times the compute, between two widths that were tried, has the same loss. None where
            width does not pay; where the regret exceeds all that was gained over the narrowest width, at least so much.
    """

    width: int
    best: float | None
    best_ci95: Interval
    loss: float | None
    at_edge: bool
    fitted: bool
    drift: float | None
    drift_ci95: Interval
    regret: float | None
    regret_ci95: Interval
    grid_regret: float | None
    grid_regret_ci95: Interval
    wasted_compute: float | None


@dataclass(frozen=True)
class Transfer:
    """How one hyperparameter moves with width.

    Args:
        widths: Narrowest first.
        max_drift: The largest distance, over widths, from the best value at the narrowest, in octaves.
        max_drift_ci95: Its interval.
    """

    widths: list[AtWidth]
    max_drift: float | None
    max_drift_ci95: Interval


def analyse(values: Sequence[float], losses: Mapping[int, Array], compute: Mapping[int, float]) -> Transfer:
    """Compare the widths.

    Intervals are percentiles of a bootstrap over seeds. A seed's curve is drawn as a whole, so that what makes all its
    losses high does not blur where they are lowest; widths are drawn independently: their seeds share the order of the
    data, but what is left of a seed's losses agrees little between measured widths (correlations of 0.1 on average).
    With few seeds any bootstrap is coarse, three allow ten different draws, and too sure: where it says 95 %, the
    drift's holds the truth in 83 to 85 % of simulated sweeps of three seeds, in 70 of two, in 95 of eight. A regret is
    never negative, so no interval of it excludes that there is none.

    Where a hyperparameter's value stands for the best of several (``--grid product``), the others are chosen anew at
    every width and not in every draw: its regret is what this one costs, not what all of them cost together.

    Args:
        values: Of the hyperparameter: positive, increasing.
        losses: For each width (values, seeds).
        compute: For each width its training compute, in any unit.
    """
    widths = sorted(losses)
    curves = {width: fit_curve(values, losses[width]) for width in widths}
    drawn = _resampled(values, losses)
    narrowest = widths[0]

    def both(function: Callable[..., float | None], *of: int) -> tuple[float | None, Interval]:
        """``function`` of the curves of some widths, with its interval."""
        value = function(*(curves[width] for width in of))
        if value is None or drawn is None:
            return value, None
        return value, _interval([function(*some) for some in zip(*(drawn[width] for width in of), strict=True)])

    rows = []
    for width in widths:
        curve = curves[width]
        best, best_ci95 = both(_best, width)
        drift, drift_ci95 = both(_drift, narrowest, width)
        regret, regret_ci95 = both(_regret, narrowest, width)
        grid_regret, grid_regret_ci95 = both(_grid_regret, narrowest, width)
        rows.append(
            AtWidth(
                width,
                best,
                best_ci95,
                curve.least if curve else None,
                bool(curve and curve.at_edge),
                bool(curve and curve.parabola),
                drift,
                drift_ci95,
                regret,
                regret_ci95,
                grid_regret,
                grid_regret_ci95,
                _wasted([curves[w] for w in widths if w <= width], [compute[w] for w in widths if w <= width]),
            )
        )
    max_drift, max_drift_ci95 = both(_max_drift, *widths)
    return Transfer(rows, max_drift, max_drift_ci95)


def _best(curve: Curve | None) -> float | None:
    return None if curve is None else 2**curve.best


def _drift(narrow: Curve | None, wide: Curve | None) -> float | None:
    return None if narrow is None or wide is None else wide.best - narrow.best


def _max_drift(narrow: Curve | None, *wider: Curve | None) -> float | None:
    drifts = [_drift(narrow, wide) for wide in (narrow, *wider)]
    return None if any(drift is None for drift in drifts) else max(abs(drift) for drift in drifts if drift is not None)


def _regret(narrow: Curve | None, wide: Curve | None) -> float | None:
    if narrow is None or wide is None:
        return None
    # Neighbours may lie below the vertex of a parabola that passes between them.
    return _excess(max(wide.at(narrow.best), wide.least), wide.least)


def _grid_regret(narrow: Curve | None, wide: Curve | None) -> float | None:
    return None if narrow is None or wide is None else _excess(float(wide.y[_lowest(narrow.y)]), float(wide.y.min()))


def _excess(loss: float, least: float) -> float | None:
    """Relative to the least loss; None where that is 0."""
    return (loss - least) / abs(least) if least else None


def _wasted(curves: Sequence[Curve | None], compute: Sequence[float]) -> float | None:
    """Of the last width: how far down the widths' best losses lies the loss it has with the first one's best value?"""
    narrow, wide = curves[0], curves[-1]
    if narrow is None or wide is None:
        return None
    loss = max(wide.at(narrow.best), wide.least)
    better, its = wide.least, compute[-1]
    for curve, cost in zip(curves[-2::-1], compute[-2::-1], strict=True):
        if curve is None or curve.least <= better:
            return None
        if curve.least >= loss:
            share = (loss - better) / (curve.least - better)
            return float(1 - its ** (1 - share) * cost**share / compute[-1])
        better, its = curve.least, cost
    return float(1 - its / compute[-1])


def _resampled(values: Sequence[float], losses: Mapping[int, Array]) -> dict[int, list[Curve | None]] | None:
    """For each width the curves of resampled seeds; None with a single seed, which says nothing of the spread."""
    if any(array.shape[1] < 2 for array in losses.values()):
        return None
    rng = np.random.default_rng(0)
    drawn = {}
    for width in sorted(losses):
        seeds = losses[width].shape[1]
        known: dict[bytes, Any] = {}
        curves = []
        for draw in np.sort(rng.integers(seeds, size=(RESAMPLES, seeds)), axis=1):
            key = draw.tobytes()
            if key not in known:
                known[key] = fit_curve(values, losses[width][:, draw])
            curves.append(known[key])
        drawn[width] = curves
    return drawn


def _interval(drawn: Sequence[float | None]) -> Interval:
    known = [value for value in drawn if value is not None]
    # Not by interpolation: between a finite and an infinite regret there is nothing.
    low, high = np.quantile(known, [0.025, 0.975], method="nearest") if known else (math.nan, math.nan)
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None
