"""How sure are we of a mean over episodes, and of a difference of two?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from dopr_lightning.errors import UserError


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the mean over the episodes of one policy.

    Bias-corrected and accelerated bootstrap (Efron, 1987, by scipy): returns are skewed, and 10 to 50 episodes are too
    few for a symmetric interval.

    Args:
        values: One per episode.
        level: Confidence.
        resamples: 10,000 settle the ends to about a hundredth of the interval.
        seed: The same numbers always give the same interval.

    Returns:
        Lower and upper end. ``(nan, nan)`` for a single episode, which says nothing of the spread; a point for equal
        values (all episodes succeed), which hides that few episodes could be equal by luck.

    Raises:
        UserError: There are no values, or some are not finite.
    """
    from scipy.stats import bootstrap

    data = _checked(values)
    if len(data) == 1:
        return (math.nan, math.nan)
    if np.ptp(data) == 0:
        return (float(data[0]), float(data[0]))
    interval = bootstrap(
        (data,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return (float(interval.low), float(interval.high))


def nested_bootstrap_interval(
    groups: Sequence[Sequence[float]], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the mean over training runs, each with its own episodes.

    Runs with different seeds differ by more than their episodes' noise (4429, 7909, 8060 for one recipe on Humanoid),
    so episodes of one run are not independent draws of the recipe's quality, and pooling them gives an interval several
    times too narrow. Here each resample draws runs, then episodes within each drawn run (Davison and Hinkley,
    "Bootstrap Methods and their Application", 1997, section 3.8), and averages the runs' means.

    With k runs the spread between them enters with a factor (k-1)/k, so few runs still give a somewhat narrow interval.

    Args:
        groups: Per run, one value per episode. Every run counts the same, whatever its number of episodes.
        level: Confidence.
        resamples: 10,000 settle the ends to about a hundredth of the interval.
        seed: The same numbers always give the same interval.

    Returns:
        Lower and upper percentile. With a single run this is `bootstrap_interval` of its episodes, and says nothing
        of other runs.

    Raises:
        UserError: There are no runs, or a run has no values, or some are not finite.
    """
    if len(groups) == 0:
        raise UserError("no runs to take a confidence interval of; run at least one seed")
    runs = [_checked(group) for group in groups]
    if len(runs) == 1:
        return bootstrap_interval(groups[0], level, resamples, seed)
    lengths = np.array([len(run) for run in runs])
    padded = np.zeros((len(runs), lengths.max()))
    for row, run in zip(padded, runs, strict=True):
        row[: len(run)] = run

    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for _ in runs:  # one drawn run at a time: (resamples, episodes) is the largest array
        chosen = rng.integers(len(runs), size=(resamples, 1))
        counts = lengths[chosen]
        episodes = rng.integers(counts, size=(resamples, lengths.max()))
        drawn = np.where(np.arange(lengths.max()) < counts, padded[chosen, episodes], 0.0)
        means += drawn.sum(axis=1) / counts[:, 0] / len(runs)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean difference of two recipes, from runs that pair up.

    Student's t on the differences. Two runs of one training seed share their initial weights, their batches and the
    seeds of their rollouts, so what is luck of the seed cancels; two separate intervals that overlap do not say that
    the recipes are alike.

    Args:
        differences: Per training seed, the one recipe's mean over episodes less the other's.
        level: Confidence.

    Returns:
        Lower and upper end. ``(nan, nan)`` for a single difference, and for equal ones (both succeed always): there is
        no spread to judge by.

    Raises:
        UserError: There are no differences, or some are not finite.
    """
    from scipy.stats import ttest_1samp

    data = _checked(differences)
    if len(data) == 1 or np.ptp(data) == 0:
        return (math.nan, math.nan)
    interval = ttest_1samp(data, 0.0).confidence_interval(level)
    return (float(interval.low), float(interval.high))


def wilson_interval(successes: int, episodes: int, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a success rate.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927: those rates p from which
    the observed one is at most z standard errors, sqrt(p (1 - p) / n), away. Unlike a bootstrap it does not shrink to a
    point when all episodes succeed, or none.

    Args:
        successes: Of the episodes.
        episodes: n.
        level: Confidence.

    Returns:
        Lower and upper end.

    Raises:
        UserError: There are no episodes.
    """
    if episodes == 0:
        raise UserError("no confidence interval for 0 episodes: need at least one")
    rate = successes / episodes
    odds = NormalDist().inv_cdf((1 + level) / 2) ** 2 / episodes  # z^2 / n
    centre = (rate + odds / 2) / (1 + odds)
    half = math.sqrt(odds * (rate * (1 - rate) + odds / 4)) / (1 + odds)
    # At the extremes the ends are exactly 0 and 1, which rounding may miss.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == episodes else centre + half)


def _checked(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or not np.isfinite(data).all():
        raise UserError(f"no confidence interval for {data.size} episodes: need at least one, all finite")
    return data
