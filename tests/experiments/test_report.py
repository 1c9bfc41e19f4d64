"""What ``dopr compare`` shows of its records, whatever an episode is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.experiments.arms import Arm, parse_arms
from dopr_lightning.experiments.report import arm_results, paired_differences, plot, print_table
from dopr_lightning.experiments.trial import Failure, Outcome, Record
from dopr_lightning.rollout.statistics import bootstrap_interval, crossed_interval, wilson_interval

METRICS = get_args(get_type_hints(EnvironmentSpec)["metric"])


DIVERGED = Failure("diverged: the training loss is not finite, by step 3 of 7", diverged=True)


def record(episodes: list[float]) -> Record:
    return Record(val_loss=0.5, episodes=episodes, train_seconds=2.0, settings={})


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_table_and_a_plot(metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = parse_arms("adamw,dopr-soap,soap")
    records = {arm: [record([0, 1, 1]), record([1, 1, place % 2])] for place, arm in enumerate(arms)}
    results = {
        "task": "Task-v0",
        "metric": metric,
        "budget": {"steps": 7, "episodes_per_seed": 3},
        "arms": [arm_results(arm, [0, 1], records[arm], metric) | {"lr": 1e-3} for arm in arms],
        "differences": paired_differences(arms, records),
    }
    print_table(results)
    said = capsys.readouterr().out
    assert "Task-v0: 7 steps, 3 rollouts per seed" in said
    assert {"return": "return", "max_reward": "score", "success": "success rate"}[metric] in said
    assert "+0.1667" in said  # dopr-soap beside soap
    plot(results, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_a_rate_of_one_run_or_of_runs_alike_has_wilsons_interval() -> None:
    """Three successes of three are no proof of a rate of 1."""
    (arm,) = parse_arms("adamw")

    def interval(metric: str, *runs: list[float]) -> tuple[float, float]:
        low, high = arm_results(arm, range(len(runs)), [record(run) for run in runs], metric)["ci95"]
        return low, high

    assert interval("success", [1, 1, 1]) == wilson_interval(3, 3)
    assert interval("success", [1, 1, 1], [1, 1, 1]) == wilson_interval(6, 6)
    assert interval("success", [1, 0, 1]) == wilson_interval(2, 3)
    runs = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1]]
    low, high = crossed_interval(runs)
    assert low < 0
    assert high > 1
    assert interval("success", *runs) == (0.0, 1.0)  # no rate lies outside
    assert interval("return", *runs) == (low, high)
    assert interval("return", [1, 0, 1]) == bootstrap_interval([1, 0, 1])
    assert interval("return", [1, 1, 1]) == (1, 1)


def test_what_an_arm_brings_is_told_seed_by_seed() -> None:
    """Seeds differ by 100, arms by 1 to 3: separate intervals would not see it."""
    arms = parse_arms("muon,adamw,dopr-muon+ema=0.9,dopr-adamw,dopr-soap")
    records = {
        arm: [record([100 * seed + place, 100 * seed + place + 2 * (seed == 1)]) for seed in range(3)]
        for place, arm in enumerate(arms)
    }
    entries = paired_differences(arms, records)
    assert [(entry["name"], entry["against"], entry["mean"]) for entry in entries] == [
        ("adamw", "muon", 1),
        ("dopr-muon+ema=0.9", "muon", 2),
        ("dopr-adamw", "adamw", 2),
        ("dopr-soap", "muon", 4),  # whose base is not there
    ]
    assert all(entry["per_seed"] == [entry["mean"]] * 3 and entry["ci95"] == [None, None] for entry in entries)
    records[arms[2]][0] = record([1.0, 1.0])
    entry = paired_differences(arms, records)[1]
    assert entry["per_seed"] == [1, 2, 2]
    assert entry["ci95"] == list(crossed_interval([[1, 1], [2, 2], [2, 2]]))


def test_one_arm_has_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (arm,) = parse_arms("adamw")
    runs = [record([1.0, 2.0])]
    results = {
        "task": "Task-v0",
        "metric": "return",
        "budget": {"steps": 7, "episodes_per_seed": 2},
        "arms": [arm_results(arm, [0], runs, "return") | {"lr": 1e-3}],
        "differences": paired_differences([arm], {arm: runs}),
    }
    print_table(results)
    assert "Seed by seed" not in capsys.readouterr().out
    plot(results, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 1000


def test_an_arm_with_a_run_that_diverged_has_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others', the luckier ones', would not be the recipe's."""
    adamw, sgd, muon = arms = parse_arms("adamw,sgd,muon")
    outcomes: dict[Arm, list[Outcome]] = {
        adamw: [record([1.0, 2.0]), record([2.0, 4.0])],
        sgd: [record([9.0, 9.0]), DIVERGED],
        muon: [record([2.0, 3.0]), record([2.0, 5.0])],
    }
    results = {
        "task": "Task-v0",
        "metric": "return",
        "budget": {"steps": 7, "episodes_per_seed": 2},
        "arms": [arm_results(arm, [4, 5], outcomes[arm], "return") | {"lr": 1e-3} for arm in arms],
        "differences": paired_differences(arms, outcomes),
    }
    assert json.loads(json.dumps(results, allow_nan=False))["arms"][1] == {
        "name": "sgd",
        "seeds": [4, 5],
        "val_loss": [0.5, None],
        "episodes": [[9.0, 9.0], None],
        "mean": None,
        "ci95": [None, None],
        "train_seconds": [2.0, None],
        "diverged": {"5": DIVERGED.message},
        "lr": 1e-3,
    }
    by_sgd, by_muon = results["differences"]
    assert (by_sgd["per_seed"], by_sgd["mean"], by_sgd["ci95"]) == (None, None, [None, None])
    assert (by_muon["per_seed"], by_muon["mean"]) == ([1.0, 0.5], 0.75)
    print_table(results)
    assert "diverged" in (said := capsys.readouterr().out)
    assert "seed 5" in said
    plot(results, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 1000
