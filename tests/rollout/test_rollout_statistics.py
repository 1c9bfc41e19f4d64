from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binomtest

from dopr_lightning.errors import UserError
from dopr_lightning.rollout.statistics import bootstrap_interval, student_interval, wilson_interval


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


@pytest.mark.parametrize("runs", [2, 3, 5, 16])
def test_few_runs_are_covered_where_pooling_fails(runs: int) -> None:
    """Runs differ with variance 1, episodes within a run with variance 4; the true mean is 0."""

    def experiment(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=(runs, 1)) + 2 * rng.normal(size=(runs, 10))

    by_run = coverage(lambda rng: student_interval(experiment(rng).mean(axis=1).tolist()), trials=2000)
    pooled = coverage(lambda rng: bootstrap_interval(experiment(rng).ravel().tolist(), resamples=500))
    assert by_run == pytest.approx(0.95, abs=0.015)
    assert pooled < 0.85


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(size=15).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_one_episode_and_equal_episodes() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([3.0]))
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert bootstrap_interval([1.0] * 9 + [1 - 1e-16]) == (1.0, 1.0)  # a rounding apart
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


def test_students_interval_by_hand() -> None:
    """Of 1, 2, 3, 6: mean 3, variance 14/3; of Student's t with three degrees of freedom 97.5 % lie below 3.18245."""
    half = 3.182446305 * math.sqrt(14 / 3 / 4)
    assert student_interval([1, 2, 3, 6]) == pytest.approx((3 - half, 3 + half), rel=1e-9)
    half *= 0.764892328 / 3.182446305  # below which 75 % lie
    assert student_interval([6, 3, 1, 2], level=0.5) == pytest.approx((3 - half, 3 + half), rel=1e-8)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_paired_coverage_is_exact_for_few_pairs(count: int) -> None:
    """What both share, the seed's luck, may be as large as it likes."""

    def interval(rng: np.random.Generator) -> tuple[float, float]:
        luck = 100 * rng.normal(size=count)
        return student_interval(((luck + rng.normal(size=count)) - (luck + rng.normal(size=count))).tolist())

    assert coverage(interval, trials=2000) == pytest.approx(0.95, abs=0.015)


def test_numbers_without_spread_say_nothing() -> None:
    for differences in ([0.5], [0.0, 0.0, 0.0], [0.5 - 0.2, 0.8 - 0.5, 0.9 - 0.6], [1e4, 1e4 + 1e-9]):
        assert all(math.isnan(end) for end in student_interval(differences))
    with pytest.raises(UserError):
        student_interval([1.0, math.inf])


def test_no_episodes_have_no_rate() -> None:
    with pytest.raises(UserError, match="0 episodes"):
        wilson_interval(0, 0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
@pytest.mark.parametrize("interval", [bootstrap_interval, student_interval])
def test_nothing_to_judge(interval: Callable[[list[float]], tuple[float, float]], values: list[float]) -> None:
    with pytest.raises(UserError):
        interval(values)
