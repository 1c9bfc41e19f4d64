"""From a sweep's runs to what people look at: results.json, a table, a plot, and the wide run it recommends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from dopr_lightning.experiments.sweep.grid import Cell, Parametrization, Point, candidates
from dopr_lightning.experiments.sweep.plan import Plan
from dopr_lightning.experiments.sweep.transfer import COARSEST, Array, analyse
from dopr_lightning.experiments.trial import Failure, Outcome, Record
from dopr_lightning.words import METRIC_LABELS

LABELS = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "damping": "damping",
    "input_rate": "input layers' share of the rate",
    "readout_rate": "readouts' share of the rate",
    "condition_rate": "conditions' share of the rate",
}

FAR = 0.5
"""Octaves from the centre from which on values found one by one may not suit each other: learning rate and weight decay
act by their product."""

Outcomes = Mapping[Cell, Outcome]


def trial_results(outcomes: Outcomes) -> list[dict[str, Any]]:
    """One entry per run; null where a run has no such number."""
    entries = []
    for cell, outcome in outcomes.items():
        done = outcome if isinstance(outcome, Record) else None
        entries.append(
            {
                "parametrization": cell.parametrization,
                "width": cell.width,
                **cell.point.values,
                "seed": cell.seed,
                "val_loss": done.val_loss if done else None,
                "rollout": done.mean if done and done.episodes else None,
                "train_seconds": done.train_seconds if done else None,
                "failed": outcome.message if isinstance(outcome, Failure) else None,
            }
        )
    return entries


def transfer_results(
    outcomes: Outcomes, plan: Plan, compute: Mapping[int, float], metric: str | None
) -> list[dict[str, Any]]:
    """One entry per parametrisation, hyperparameter and metric: the curves, and :func:`transfer.analyse` of them.

    Args:
        outcomes: Of all runs.
        plan: What was swept.
        compute: Of training, by width.
        metric: Of the rollouts; None without any.
    """
    entries = []
    measures = ("val_loss", *([metric] if metric else []))
    for parametrization, name, measure in itertools.product(plan.parametrizations, plan.values, measures):
        losses = {width: _losses(outcomes, plan, parametrization, width, name, measure) for width in compute}
        transfer = analyse(plan.values[name], losses, compute)
        sign = 1 if measure == "val_loss" else -1
        widths = []
        for row in transfer.widths:
            numbers = [[sign * x if math.isfinite(x) else None for x in line] for line in losses[row.width]]
            entry = asdict(row) | {"numbers": numbers}
            entry["loss"] = None if row.loss is None else sign * row.loss
            widths.append({key: _finite(value) for key, value in entry.items()})
        entries.append(
            {
                "parametrization": parametrization,
                "hyperparameter": name,
                "metric": measure,
                "values": list(plan.values[name]),
                "widths": widths,
                "max_drift": transfer.max_drift,
                "max_drift_ci95": transfer.max_drift_ci95,
            }
        )
    return entries


def _losses(
    outcomes: Outcomes, plan: Plan, parametrization: Parametrization, width: int, name: str, measure: str
) -> Array:
    """Per value of a hyperparameter and seed, (values, seeds): the lower the better, infinite where a run failed."""

    def of(point: Point) -> Array:
        found = []
        for seed in sorted(plan.seeds):
            outcome = outcomes[Cell(width, parametrization, point, seed)]
            if isinstance(outcome, Failure):
                found.append(math.inf)
            else:
                found.append(outcome.val_loss if measure == "val_loss" else -outcome.mean)
        return np.array(found)

    def best(value: float) -> Array:
        chosen = candidates(name, value, plan.centre, plan.points, plan.product)
        return min(map(of, chosen), key=lambda row: float(np.mean(row)))

    return np.array([best(value) for value in plan.values[name]])


def _finite(value: Any) -> Any:
    """JSON has no infinity: a regret without bound becomes ``"inf"``."""
    return "inf" if value == math.inf else value


def best_point(transfers: Sequence[Mapping[str, Any]], centre: Point, metric: str) -> Point | None:
    """The best hyperparameters under muP by ``metric``, at the widest width that trained: nearest to wider runs.

    Those that were not swept are the centre's. None where muP trained at no width.
    """
    found = _trained(transfers, metric)
    if not found or not all(found.values()):
        return None
    return replace(centre, **{name: float(f"{rows[-1]['best']:.4g}") for name, rows in found.items()})


def at_edge(transfers: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """The hyperparameters of :func:`best_point` that lie at an end of their grid, of several values."""
    found = _trained(transfers, metric)
    return [name for name, rows in found.items() if rows[-1]["at_edge"] and len(rows[-1]["numbers"]) > 1]


def apart(transfers: Sequence[Mapping[str, Any]], best: Point, centre: Point, product: bool) -> list[str]:
    """The hyperparameters of :func:`best_point`, if several lie far from the centre, where each was found by itself."""
    pairs = {name: (getattr(best, name), getattr(centre, name)) for name in _trained(transfers, "val_loss")}
    far = [name for name, (to, by) in pairs.items() if not by or abs(math.log2(to / by)) > FAR]
    return far if len(far) > 1 and not product else []


def judged_otherwise(transfers: Sequence[Mapping[str, Any]], best: Point, metric: str) -> list[str]:
    """Which values another metric would choose that the interval of ``metric`` excludes, in words."""
    chosen, said = _trained(transfers, metric), []
    for other in dict.fromkeys(t["metric"] for t in transfers if t["metric"] != metric):
        for name, rows in _trained(transfers, other).items():
            low, high = chosen[name][-1]["best_ci95"] or (getattr(best, name),) * 2
            if rows and not low <= rows[-1]["best"] <= high:
                value = f"{LABELS[name]} {rows[-1]['best']:.3g} at width {rows[-1]['width']}"
                said.append(f"{value}, by {metric_label(other)}")
    return said


def _trained(transfers: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[Mapping[str, Any]]]:
    """What a metric says of each hyperparameter under muP, at the widths where it says something, narrowest first."""
    return {
        t["hyperparameter"]: [row for row in t["widths"] if row["best"] is not None]
        for t in transfers
        if t["parametrization"] == "mup" and t["metric"] == metric
    }


def print_table(results: Mapping[str, Any]) -> None:
    """A row per parametrisation, hyperparameter, metric and width."""
    from rich.console import Console
    from rich.table import Table

    seeds = len(results["seeds"])
    table = Table(
        title=f"{results['task']}: {results['optimizer']}, {results['budget']['steps']} steps, {seeds} "
        f"seed{'s' * (seeds != 1)}; 95 % intervals in brackets"
    )
    for heading in (
        "", "hyperparameter", "by", "width", "best", "drift, octaves",
        "zero-shot regret", "on the grid", "wasted compute", "note",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("", "hyperparameter", "by", "note") else "right")
    for transfer in results["transfer"]:
        for index, row in enumerate(transfer["widths"]):
            first = index == 0
            table.add_row(
                transfer["parametrization"] if first else "",
                LABELS[transfer["hyperparameter"]] if first else "",
                metric_label(transfer["metric"]) if first else "",
                str(row["width"]),
                _with_interval(row["best"], row["best_ci95"], "{:.3g}"),
                "" if first else _with_interval(row["drift"], row["drift_ci95"], "{:+.2f}"),
                "" if first else _with_interval(row["regret"], row["regret_ci95"], "{:.2%}"),
                "" if first else _with_interval(row["grid_regret"], None, "{:.2%}"),
                "" if first else _with_interval(row["wasted_compute"], None, "{:.0%}"),
                _note(row, transfer["values"]),
            )
        if len(transfer["widths"]) > 2:
            largest = _with_interval(transfer["max_drift"], transfer["max_drift_ci95"], "{:.2f}")
            table.add_row("", "", "", "", "largest drift", largest)
        table.add_section()
    console = Console()
    # Where nobody looks on, lines may be as long as they are.
    (console if console.is_terminal else Console(width=180)).print(table)


def _with_interval(value: float | str | None, interval: Sequence[float] | None, form: str) -> str:
    if value is None:
        return "-"
    said = value if isinstance(value, str) else form.format(value)
    return said if interval is None else f"{said} ({' .. '.join(form.format(end) for end in interval)})"


def _note(row: Mapping[str, Any], values: Sequence[float]) -> str:
    failed = sum(number is None for line in row["numbers"] for number in line)
    notes = []
    if row["best"] is None and not failed:
        notes.append("all values are level")
    elif row["best"] is None:
        notes.append(f"all {failed} runs failed" if all(n is None for line in row["numbers"] for n in line) else "")
        notes.append("no value at which all seeds trained, or all such are level")
    elif failed:
        notes.append(f"{failed} of {sum(map(len, row['numbers']))} runs failed")
    if row["at_edge"] and len(values) > 1:
        lowest = abs(row["best"] - values[0]) < abs(row["best"] - values[-1])
        notes.append("the grid's lowest: go on below" if lowest else "the grid's highest: go on above")
    if any(math.log2(high / low) > COARSEST for low, high in itertools.pairwise(values)) and not row["fitted"]:
        notes.append("not fitted: values more than a factor of 4 apart")
    return "; ".join(note for note in notes if note)


def metric_label(metric: str) -> str:
    """``"validation loss"``, or what rollouts are judged by."""
    return "validation loss" if metric == "val_loss" else METRIC_LABELS[metric]


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A panel per hyperparameter and metric, muP beside standard: a curve per width, its seeds' range, its best."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    transfers = results["transfer"]
    columns = list(dict.fromkeys(t["parametrization"] for t in transfers))
    rows = list(dict.fromkeys((t["hyperparameter"], t["metric"]) for t in transfers))
    figure = Figure(figsize=(5 * len(columns), 3.4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(results["widths"])))
    for transfer in transfers:
        row = rows.index((transfer["hyperparameter"], transfer["metric"]))
        axes = grid[row, columns.index(transfer["parametrization"])]
        _panel(axes, transfer, colours)
    for line, (_, metric) in zip(grid, rows, strict=True):
        shown = [row for t in transfers for row in t["widths"] if t["metric"] == metric and row["loss"] is not None]
        if metric == "val_loss" and shown:
            # What lies far above the best says only that it is bad.
            numbers = [n for row in shown for seeds in row["numbers"] for n in seeds if n is not None]
            top = min(max(numbers) * 1.01, max(row["loss"] for row in shown) * 1.25)
            for axes in line:
                axes.set_ylim(min(numbers) * 0.99, top)
    grid[0, 0].legend(title="width", fontsize=7, title_fontsize=7)
    figure.suptitle(
        f"{results['task']}, {results['optimizer']}, {results['budget']['steps']} steps\n"
        f"lines: means of {len(results['seeds'])} seeds, shades: their range, stars: best, dashes: the narrowest's",
        fontsize=8,
    )
    figure.savefig(path, dpi=150)


def _panel(axes: Any, transfer: Mapping[str, Any], colours: Array) -> None:
    values = np.array(transfer["values"])
    for row, colour in zip(transfer["widths"], colours, strict=True):
        numbers = np.array([[math.nan if n is None else n for n in line] for line in row["numbers"]], dtype=float)
        axes.plot(values, numbers.mean(axis=1), ".-", color=colour, linewidth=1, label=str(row["width"]))
        axes.fill_between(values, numbers.min(axis=1), numbers.max(axis=1), color=colour, alpha=0.15, linewidth=0)
        if row["best"] is not None:
            axes.plot(row["best"], row["loss"], "*", color=colour, markersize=11, markeredgecolor="k")
    narrowest = transfer["widths"][0]["best"]
    if narrowest is not None:
        axes.axvline(narrowest, color="k", linestyle="--", linewidth=0.7)
    axes.set_xlim(values[0] / 1.1, values[-1] * 1.1)
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values], rotation=45)
    axes.set_xticks([], minor=True)
    if all(number is None for row in transfer["widths"] for line in row["numbers"] for number in line):
        axes.text(0.5, 0.5, "no value trained", transform=axes.transAxes, ha="center")
    elif transfer["metric"] == "val_loss":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.set_title(transfer["parametrization"], fontsize=9)
    axes.set_xlabel(LABELS[transfer["hyperparameter"]], fontsize=8)
    axes.set_ylabel(metric_label(transfer["metric"]), fontsize=8)
    axes.tick_params(labelsize=7, which="both")
