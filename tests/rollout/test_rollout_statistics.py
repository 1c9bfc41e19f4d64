from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import t as student_t

from dopr_lightning.errors import UserError
from dopr_lightning.rollout.statistics import bootstrap_interval, crossed_interval, wilson_interval


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


@pytest.mark.parametrize(("episodes", "least"), [(5, 0.87), (10, 0.925)])
def test_few_episodes_are_as_sure_as_they_say(episodes: int, least: float) -> None:
    """Of normal values; the plain bootstrap holds 83 and 89 %."""

    def interval(rng: np.random.Generator) -> tuple[float, float]:
        return bootstrap_interval(rng.normal(size=episodes).tolist(), resamples=1000)

    assert least <= coverage(interval, trials=600) <= 0.975


@pytest.mark.parametrize(("runs", "states"), [(2, 20), (3, 20), (5, 10), (16, 20)])
@pytest.mark.parametrize("spread", [(1, 2, 2), (1, 0, 2), (0.3, 1, 1)], ids=["both", "no states", "mostly states"])
def test_runs_that_met_the_same_states(runs: int, states: int, spread: tuple[float, float, float]) -> None:
    """Effects of runs, of states and of both; the true mean is 0. Pooled episodes miss it, and so do means of runs."""

    def experiment(rng: np.random.Generator) -> np.ndarray:
        of_run, of_state, of_both = spread
        effects = of_run * rng.normal(size=(runs, 1)) + of_state * rng.normal(size=states)
        return effects + of_both * rng.normal(size=(runs, states))

    crossed = coverage(lambda rng: crossed_interval(experiment(rng).tolist()), trials=1500)
    assert 0.93 <= crossed <= 0.995
    by_run = coverage(lambda rng: crossed_interval(experiment(rng).mean(axis=1, keepdims=True).tolist()), trials=1500)
    if spread == (0.3, 1, 1) and runs == 16:
        assert by_run < 0.7
    if spread == (1, 0, 2):
        assert coverage(lambda rng: bootstrap_interval(experiment(rng).ravel().tolist(), resamples=500)) < 0.85


def test_the_mean_squares_by_hand() -> None:
    """Of [[1, 2, 6], [3, 6, 6]]: mean 4, MS of runs 6, of states 8, of both 2; (6 + 8 - 2) / 6 = 2."""
    freedom = 12**2 / (6**2 / 1 + 8**2 / 2 + 2**2 / 2)  # 144 / 70
    half = student_t.ppf(0.975, freedom) * math.sqrt(2)
    assert crossed_interval([[1, 2, 6], [3, 6, 6]]) == pytest.approx((4 - half, 4 + half), rel=1e-12)


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
def test_wilsons_ends_are_rates_z_standard_errors_away(episodes: int, level: float) -> None:
    z = NormalDist().inv_cdf((1 + level) / 2)
    for successes in {0, 1, episodes // 3, episodes - 1, episodes}:
        rate, ends = successes / episodes, wilson_interval(successes, episodes, level)
        assert 0 <= ends[0] <= rate <= ends[1] <= 1
        for end in ends:
            away = (rate - end) ** 2 * episodes
            assert away == pytest.approx(z**2 * end * (1 - end), rel=1e-9, abs=1e-12)


def test_without_states_that_differ_it_is_students_over_runs() -> None:
    """Of 1, 2, 3, 6: mean 3, variance 14/3; of Student's t with three degrees of freedom 97.5 % lie below 3.18245."""
    half = 3.182446305 * math.sqrt(14 / 3 / 4)
    expected = pytest.approx((3 - half, 3 + half), rel=1e-9)
    assert crossed_interval([[1], [2], [3], [6]]) == expected
    assert crossed_interval([[0, 2], [3, 1], [2, 4], [7, 5]]) == expected
    half *= 0.764892328 / 3.182446305  # below which 75 % lie
    assert crossed_interval([[6], [3], [1], [2]], level=0.5) == pytest.approx((3 - half, 3 + half), rel=1e-8)


def test_runs_without_spread_say_nothing() -> None:
    for runs in ([[0.5, 1.0]], [[0.0]] * 3, [[1.0, 0.0], [0.0, 1.0]], [[0.5 - 0.2], [0.8 - 0.5], [0.9 - 0.6]]):
        assert all(math.isnan(end) for end in crossed_interval(runs))
    with pytest.raises(UserError, match="different numbers of episodes"):
        crossed_interval([[1.0, 2.0], [1.0]])


def test_no_episodes_have_no_rate() -> None:
    with pytest.raises(UserError, match="0 episodes"):
        wilson_interval(0, 0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_nothing_to_judge(values: list[float]) -> None:
    with pytest.raises(UserError):
        bootstrap_interval(values)
    with pytest.raises(UserError):
        crossed_interval([values, values])
    with pytest.raises(UserError):
        crossed_interval([])
