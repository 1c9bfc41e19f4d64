from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest

from dopr_lightning.errors import UserError
from dopr_lightning.rollout.statistics import (
    bootstrap_interval,
    nested_bootstrap_interval,
    paired_interval,
    wilson_interval,
)


def test_the_interval_agrees_with_normal_theory() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=400)
    half = 1.96 * values.std() / math.sqrt(400)
    low, high = bootstrap_interval(values.tolist())
    assert low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.06 * half)
    narrow = bootstrap_interval(values.tolist(), level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 0.6745 / 1.96 * half, rel=0.06)


def coverage(interval: Callable[[np.random.Generator], tuple[float, float]], trials: int = 300) -> float:
    """How often an interval holds the true mean, 0."""
    rng = np.random.default_rng(1)
    hits = [low <= 0 <= high for low, high in (interval(rng) for _ in range(trials))]
    return float(np.mean(hits))


def test_coverage_for_skewed_returns() -> None:
    def interval(rng: np.random.Generator) -> tuple[float, float]:
        return bootstrap_interval((rng.exponential(size=50) - 1).tolist(), resamples=500)

    assert 0.89 <= coverage(interval) <= 0.98


def experiment(rng: np.random.Generator, runs: int = 20) -> np.ndarray:
    """Runs differ with variance 1, episodes within a run with variance 4; the true mean is 0."""
    return rng.normal(size=(runs, 1)) + 2 * rng.normal(size=(runs, 10))


def test_nested_coverage_where_pooling_fails() -> None:
    nested = coverage(lambda rng: nested_bootstrap_interval(experiment(rng).tolist(), resamples=500))
    pooled = coverage(lambda rng: bootstrap_interval(experiment(rng).ravel().tolist(), resamples=500))
    assert 0.90 <= nested <= 0.99
    assert pooled < 0.85


def test_the_nested_variance_in_closed_form() -> None:
    """Resampled means vary by (1/k)(variance of run means + mean of within-run variances / episodes)."""
    groups = [(3 * i + experiment(np.random.default_rng(i))[0])[: 10 - i % 3] for i in range(12)]
    between = np.var([np.mean(g) for g in groups])
    within = np.mean([np.var(g) / len(g) for g in groups])
    half = 1.96 * math.sqrt((between + within) / 12)
    low, high = nested_bootstrap_interval([g.tolist() for g in groups], resamples=40_000)
    centre = np.mean([np.mean(g) for g in groups])  # of runs, not of episodes
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)
    assert (high + low) / 2 == pytest.approx(centre, abs=0.05 * half)


def test_within_run_spread_alone() -> None:
    # Runs whose means agree: what is left is the episodes' spread, 1/(k n) of their variance.
    groups = [[-1.0, 1.0] * 20] * 10
    low, high = nested_bootstrap_interval(groups, resamples=20_000)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(1 / 400), rel=0.05)


def test_between_run_spread_alone() -> None:
    groups = [[float(i)] * 5 for i in range(30)]
    low, high = nested_bootstrap_interval(groups, resamples=20_000)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt((30**2 - 1) / 12 / 30), rel=0.05)


def test_a_single_run_has_its_episodes_interval() -> None:
    values = [1.0, 5.0, 2.0, 8.0]
    assert nested_bootstrap_interval([values]) == bootstrap_interval(values)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(size=15).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    groups = [values[:5], values[5:]]
    assert nested_bootstrap_interval(groups) == nested_bootstrap_interval(groups)
    assert nested_bootstrap_interval(groups) != nested_bootstrap_interval(groups, seed=1)


def test_one_episode_and_equal_episodes() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([3.0]))
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert nested_bootstrap_interval([[1.0], [1.0]]) == (1.0, 1.0)
    low, high = bootstrap_interval([0.0, 1.0])
    assert 0 <= low < high <= 1


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("episodes", [1, 2, 20, 50, 1000])
def test_wilson_against_scipy(episodes: int, level: float) -> None:
    for successes in {0, 1, episodes // 3, episodes - 1, episodes}:
        theirs = binomtest(successes, episodes).proportion_ci(level, method="wilson")
        ours = wilson_interval(successes, episodes, level)
        np.testing.assert_allclose(ours, (theirs.low, theirs.high), rtol=1e-12, atol=1e-15)
        assert 0 <= ours[0] <= successes / episodes <= ours[1] <= 1


def test_a_paired_interval_by_hand() -> None:
    """Of 1, 2, 3, 6: mean 3, variance 14/3; of Student's t with three degrees of freedom 97.5 % lie below 3.18245."""
    half = 3.182446305 * math.sqrt(14 / 3 / 4)
    assert paired_interval([1, 2, 3, 6]) == pytest.approx((3 - half, 3 + half), rel=1e-9)
    half *= 0.764892328 / 3.182446305  # below which 75 % lie
    assert paired_interval([6, 3, 1, 2], level=0.5) == pytest.approx((3 - half, 3 + half), rel=1e-8)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_paired_coverage_is_exact_for_few_pairs(count: int) -> None:
    """What both share, the seed's luck, may be as large as it likes."""

    def interval(rng: np.random.Generator) -> tuple[float, float]:
        luck = 100 * rng.normal(size=count)
        return paired_interval(((luck + rng.normal(size=count)) - (luck + rng.normal(size=count))).tolist())

    assert coverage(interval, trials=2000) == pytest.approx(0.95, abs=0.015)


def test_differences_without_spread_say_nothing() -> None:
    for differences in ([0.5], [0.0, 0.0, 0.0]):
        assert all(math.isnan(end) for end in paired_interval(differences))
    with pytest.raises(UserError):
        paired_interval([1.0, math.inf])


def test_no_episodes_have_no_rate() -> None:
    with pytest.raises(UserError, match="0 episodes"):
        wilson_interval(0, 0)


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], []], [[1.0, math.nan]]])
def test_nothing_to_judge(groups: list[list[float]]) -> None:
    with pytest.raises(UserError):
        nested_bootstrap_interval(groups)
