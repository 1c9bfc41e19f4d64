"""From records to what people look at: a table, results.json, a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopr_lightning.experiments.arms import Arm
from dopr_lightning.experiments.trial import Failure, Outcome, Record
from dopr_lightning.rollout.statistics import bootstrap_interval, crossed_interval, wilson_interval
from dopr_lightning.words import METRIC_LABELS


def arm_results(arm: Arm, seeds: Sequence[int], outcomes: Sequence[Outcome], metric: str) -> dict[str, Any]:
    """One arm's entry of results.json: what each seed's run came to, the mean over all episodes, and its interval.

    The interval is over runs and initial states (:func:`~.statistics.crossed_interval`); of a single run, the
    bootstrap's over its episodes, which says nothing of other runs; null where there is too little to judge by. For a
    success rate of one run, or of runs that all ended alike, it is Wilson's: of 20 successes in 20 a resampling would
    be sure.

    Runs that diverged have nulls, and an arm with one has no mean: that of the others would be the luckier ones'.
    """
    records = [outcome if isinstance(outcome, Record) else None for outcome in outcomes]
    finished = [record for record in records if record]
    mean, low, high = math.nan, math.nan, math.nan
    if len(finished) == len(records):
        mean = _mean([record.mean for record in finished])
        low, high = _interval([record.episodes for record in finished], metric)
    return {
        "name": arm.name,
        "seeds": list(seeds),
        "val_loss": [record and record.val_loss for record in records],
        "episodes": [record and record.episodes for record in records],
        "mean": _number(mean),
        "ci95": [_number(low), _number(high)],
        "train_seconds": [record and record.train_seconds for record in records],
        "diverged": {
            seed: outcome.message for seed, outcome in zip(seeds, outcomes, strict=True) if isinstance(outcome, Failure)
        },
    }


def _interval(runs: Sequence[Sequence[float]], metric: str) -> tuple[float, float]:
    low, high = bootstrap_interval(runs[0]) if len(runs) == 1 else crossed_interval(runs)
    if metric != "success":
        return low, high
    if len(runs) == 1 or math.isnan(low):
        return wilson_interval(round(sum(map(sum, runs))), sum(map(len, runs)))
    return max(0.0, low), min(1.0, high)


def paired_differences(arms: Sequence[Arm], outcomes: Mapping[Arm, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """What each arm brings, an entry of results.json for all but the first: beside its base where that is an arm too.

    Else beside the first arm. Runs pair up by their training seed, and their episodes by the initial state
    (:func:`~.statistics.crossed_interval`). Where one of either arm diverged there is no difference.

    Args:
        arms: In the order they were given.
        outcomes: Per arm that of each seed's run, in one order for all.
    """
    entries = []
    for arm in arms:
        base = Arm(arm.base, dopr=False)
        against = base if arm.dopr and base in arms else arms[0]
        if arm == against:
            continue
        pairs = [
            [a - b for a, b in zip(one.episodes, other.episodes, strict=True)]
            for one, other in zip(outcomes[arm], outcomes[against], strict=True)
            if isinstance(one, Record) and isinstance(other, Record)
        ]
        diverged = len(pairs) < len(outcomes[arm])
        low, high = (math.nan, math.nan) if diverged else crossed_interval(pairs)
        entries.append(
            {
                "name": arm.name,
                "against": against.name,
                "per_seed": None if diverged else [_mean(pair) for pair in pairs],
                "mean": None if diverged else _mean([_mean(pair) for pair in pairs]),
                "ci95": [_number(low), _number(high)],
            }
        )
    return entries


def print_table(results: Mapping[str, Any]) -> None:
    """One row per arm: validation loss, the closed-loop metric with its interval, seconds of training.

    Then a row per difference of two arms.
    """
    from rich.console import Console
    from rich.table import Table

    metric = METRIC_LABELS[results["metric"]]
    episodes = results["budget"]["episodes_per_seed"]
    table = Table(title=f"{results['task']}: {_length(results)}, {episodes} rollouts per seed")
    for heading in ("optimizer", "lr", "seeds", "val loss", metric, "95 % interval", "train s"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for arm in results["arms"]:
        found, interval = _said("{:.4g}", arm["mean"]), _ends("{:.4g}", arm["ci95"])
        if arm["diverged"]:
            found, interval = "diverged", f"seed {', '.join(map(str, arm['diverged']))}"
        table.add_row(
            arm["name"].replace("+", "\n+"),
            f"{arm['lr']:.2g}",
            str(len(arm["seeds"])),
            _said("{:.4g}", _mean(arm["val_loss"])),
            found,
            interval,
            _said("{:.0f}", _mean(arm["train_seconds"])),
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
        table.add_row(*names, _said("{:+.4g}", entry["mean"]), _ends("{:+.4g}", entry["ci95"]))
    console.print(table)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Validation loss, the closed-loop metric, an arm per column: the two need not agree. Then differences of arms."""
    from matplotlib.figure import Figure

    arms = results["arms"]
    names = [arm["name"] for arm in arms]
    colours = ["tab:orange" if name.startswith("dopr-") else "tab:gray" for name in names]
    pairs = [entry for entry in results["differences"] if entry["mean"] is not None]
    widths = [len(arms), len(arms), *([len(pairs)] if pairs else [])]
    figure = Figure(figsize=(5 + 0.7 * sum(widths), 3.6), layout="constrained")
    left, right, *more = figure.subplots(1, len(widths), width_ratios=[1 + width for width in widths])
    for index, (arm, colour) in enumerate(zip(arms, colours, strict=True)):
        if arm["diverged"]:
            for axes in (left, right):
                axes.annotate("diverged", (index, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8)
            continue
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
        labels = [f"{entry['name']}\n- {entry['against']}" for entry in pairs]
        axes.set_xticks(range(len(pairs)), [label.replace("+", "\n+") for label in labels], rotation=20, fontsize=8)
    figure.suptitle(
        f"{results['task']}, {_length(results)}; dots: seeds, bars: means, lines: 95 % intervals", fontsize=9
    )
    figure.savefig(path, dpi=150)


def _length(results: Mapping[str, Any]) -> str:
    steps = results["budget"]["steps"]
    return "no common number of steps" if steps is None else f"{steps} steps"


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def _said(number: str, value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else number.format(value)


def _ends(number: str, interval: Sequence[float | None]) -> str:
    return "-" if None in interval else " .. ".join(map(number.format, interval))


def _mean(values: Sequence[float | None]) -> float:
    """Of all, so nan where one is missing."""
    return math.fsum(math.nan if value is None else value for value in values) / len(values)
