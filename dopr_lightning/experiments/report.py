"""From records to what people look at: a table, results.json, a plot."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopr_lightning.experiments.arms import Arm
from dopr_lightning.experiments.trial import Record
from dopr_lightning.rollout.statistics import nested_bootstrap_interval, wilson_interval
from dopr_lightning.words import METRIC_LABELS

PACKAGES = ("dopr-lightning", "torch", "lightning", "gymnasium", "mujoco", "gym-pusht", "robosuite", "numpy")


def arm_results(arm: Arm, seeds: Sequence[int], records: Sequence[Record], metric: str) -> dict[str, Any]:
    """One arm's entry of results.json: a record per seed, the mean over all episodes, and its interval.

    The interval resamples runs, then episodes within runs; null where there is too little to resample. For a success
    rate of one run, or of runs that all ended alike, it is Wilson's: of 20 successes in 20 a resampling would be sure.
    """
    episodes = [record.episodes for record in records]
    low, high = nested_bootstrap_interval(episodes)
    if metric == "success" and (len(episodes) == 1 or low == high):
        low, high = wilson_interval(round(sum(map(sum, episodes))), sum(map(len, episodes)))
    return {
        "name": arm.name,
        "seeds": list(seeds),
        "val_loss": [record.val_loss for record in records],
        "episodes": episodes,
        "mean": sum(map(sum, episodes)) / sum(map(len, episodes)),
        "ci95": [None if math.isnan(low) else low, None if math.isnan(high) else high],
        "train_seconds": [record.train_seconds for record in records],
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_table(results: Mapping[str, Any]) -> None:
    """One row per arm: validation loss, the closed-loop metric with its interval, seconds of training."""
    from rich.console import Console
    from rich.table import Table

    metric = METRIC_LABELS[results["metric"]]
    episodes = results["budget"]["episodes_per_seed"]
    table = Table(title=f"{results['task']}: {results['budget']['steps']} steps, {episodes} rollouts per seed")
    for heading in ("optimizer", "lr", "seeds", "val loss", metric, "95 % interval", "train s"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for arm in results["arms"]:
        low, high = arm["ci95"]
        table.add_row(
            arm["name"].replace("+", "\n+"),
            f"{arm['lr']:.2g}",
            str(len(arm["seeds"])),
            f"{_mean(arm['val_loss']):.4g}",
            f"{arm['mean']:.4g}",
            "-" if low is None else f"{low:.4g} .. {high:.4g}",
            f"{_mean(arm['train_seconds']):.0f}",
        )
    Console().print(table)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Validation loss beside the closed-loop metric, an arm per column: the two need not agree."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    arms = results["arms"]
    names = [arm["name"] for arm in arms]
    colours = ["tab:orange" if name.startswith("dopr-") else "tab:gray" for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(5 + len(arms), 3.6), layout="constrained")
    for index, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
        left.bar(index, _mean(arm["val_loss"]), color=colour, alpha=0.5)
        left.plot([index] * len(arm["val_loss"]), arm["val_loss"], "k.", markersize=5)
        right.bar(index, arm["mean"], color=colour, alpha=0.5)
        right.plot([index] * len(arm["episodes"]), [_mean(e) for e in arm["episodes"]], "k.", markersize=5)
        low, high = arm["ci95"]
        if low is not None:
            right.errorbar(index, arm["mean"], [[arm["mean"] - low], [high - arm["mean"]]], color="k", capsize=4)
    metric = METRIC_LABELS[results["metric"]]
    left.set_title("validation loss (lower is better)", fontsize=10)
    right.set_title(f"closed-loop {metric} (higher is better)", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(range(len(arms)), [name.replace("+", "\n+") for name in names], rotation=20, fontsize=8)
    budget = results["budget"]
    figure.suptitle(
        f"{results['task']}, {budget['steps']} steps; dots: seeds, bars: means, lines: 95 % intervals", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
