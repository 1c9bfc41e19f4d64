"""From records to what people look at: a table, results.json, a plot."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopr_lightning.experiments.arms import Arm
from dopr_lightning.experiments.trial import Record
from dopr_lightning.rollout.statistics import nested_bootstrap_interval, paired_interval, wilson_interval
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


def differences(arms: Sequence[Arm], records: Mapping[Arm, Sequence[Record]]) -> list[dict[str, Any]]:
    """What each arm brings, an entry of results.json for all but the first: beside its base where that is an arm too.

    Else beside the first arm. Runs pair up by their training seed (:func:`~.statistics.paired_interval`).

    Args:
        arms: In the order they were given.
        records: Per arm a record for each seed, in one order for all.
    """
    entries = []
    for arm in arms:
        base = Arm(arm.base, dopr=False)
        against = base if arm.dopr and base in arms else arms[0]
        if arm == against:
            continue
        per_seed = [one.mean - other.mean for one, other in zip(records[arm], records[against], strict=True)]
        low, high = paired_interval(per_seed)
        entries.append(
            {
                "name": arm.name,
                "against": against.name,
                "per_seed": per_seed,
                "mean": _mean(per_seed),
                "ci95": [None if math.isnan(low) else low, None if math.isnan(high) else high],
            }
        )
    return entries


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
    """One row per arm: validation loss, the closed-loop metric with its interval, seconds of training.

    Then a row per difference of two arms.
    """
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
            _ends("{:.4g}", (low, high)),
            f"{_mean(arm['train_seconds']):.0f}",
        )
    console = Console()
    console.print(table)
    if not results["differences"]:
        return
    table = Table(title=f"Seed by seed: {metric} of one optimizer less the other's")
    for heading in ("optimizer", "beside", "difference", "95 % interval"):
        table.add_column(heading, justify="left" if heading in ("optimizer", "beside") else "right")
    for entry in results["differences"]:
        names = (entry[key].replace("+", "\n+") for key in ("name", "against"))
        table.add_row(*names, f"{entry['mean']:+.4g}", _ends("{:+.4g}", entry["ci95"]))
    console.print(table)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Validation loss, the closed-loop metric, an arm per column: the two need not agree. Then differences of arms."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    arms = results["arms"]
    names = [arm["name"] for arm in arms]
    colours = ["tab:orange" if name.startswith("dopr-") else "tab:gray" for name in names]
    pairs = results["differences"]
    widths = [len(arms), len(arms), *([len(pairs)] if pairs else [])]
    figure, (left, right, *more) = plt.subplots(
        1,
        len(widths),
        figsize=(5 + 0.7 * sum(widths), 3.6),
        width_ratios=[1 + width for width in widths],
        layout="constrained",
    )
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
    for axes in more:
        for index, entry in enumerate(pairs):
            axes.plot([index] * len(entry["per_seed"]), entry["per_seed"], "k.", markersize=5)
            low, high = entry["ci95"]
            errors = None if low is None else [[entry["mean"] - low], [high - entry["mean"]]]
            axes.errorbar(index, entry["mean"], errors, fmt="D", color="tab:orange", ecolor="k", capsize=4)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_xlim(-0.6, len(pairs) - 0.4)
        axes.set_title("difference, seed by seed", fontsize=10)
        labels = [f"{entry['name']} - {entry['against']}" for entry in pairs]
        axes.set_xticks(range(len(pairs)), [label.replace("+", "\n+") for label in labels], rotation=20, fontsize=8)
    budget = results["budget"]
    figure.suptitle(
        f"{results['task']}, {budget['steps']} steps; dots: seeds, bars: means, lines: 95 % intervals", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _ends(number: str, interval: Sequence[float | None]) -> str:
    return "-" if None in interval else " .. ".join(map(number.format, interval))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
