"""From measurements to what people look at: tables, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dopr_lightning.bench.predict import PHASES

COLOURS = {"statistics": "tab:blue", "reduce": "tab:green", "solve": "tab:red", "apply": "tab:orange", "other": "0.8"}


def print_tables(results: Mapping[str, Any]) -> None:
    """Time, memory, and the exact solver beside plain Cholesky."""
    from rich.console import Console
    from rich.table import Table

    def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    console = Console()
    if not console.is_terminal:
        console.width = 150
    settings, rows = results["settings"], results["rows"]
    show(
        f"AdamW and DoPr-AdamW, {_setting(settings)} (ms per step)",
        (
            "model",
            "batch",
            "AdamW",
            "DoPr",
            "ratio",
            "quartiles",
            "goal",
            "added",
            "quartiles",
            "FLOP floor",
            "x floor",
            "predicted",
        ),
        [
            (
                *_name(row),
                _ms(row["base_seconds"]["median"]),
                _ms(row["dopr_seconds"]["median"]),
                f"{row['ratio']['median']:.3f}",
                _spread("{:.3f}".format, row["ratio"]),
                "" if row["goal"] is None else f"{row['goal']:.2f}",
                _ms(row["overhead_seconds"]["median"]),
                _spread(_ms, row["overhead_seconds"]),
                _ms(row["floor_seconds"]),
                f"{row['overhead_seconds']['median'] / row['floor_seconds']:.1f}",
                _with_change(_ms, row["predicted"]["seconds"], row["overhead_seconds"]["median"]),
            )
            for row in rows
        ],
    )
    show(
        "What is added (ms per step; predicted)",
        ("model", "batch", *PHASES, "other"),
        [
            (
                *_name(row),
                *(f"{_ms(row['phases'][phase])} ({_ms(row['predicted']['phases'][phase])})" for phase in PHASES),
                _ms(row["phases"]["other"]),
            )
            for row in rows
        ],
    )
    show(
        "Memory (MiB)",
        ("model", "batch", "AdamW peak", "DoPr peak", "held", "predicted", "exact: held", "goal"),
        [
            (
                *_name(row),
                *(_mib(row[key]) for key in ("base_peak_bytes", "dopr_peak_bytes", "held_bytes")),
                _with_change(_mib, row["predicted"]["held_bytes"], row["held_bytes"]),
                _mib(row["exact"]["held_bytes"]),
                _mib(row["exact"]["goal_bytes"]),
            )
            for row in rows
        ],
    )
    show(
        "Exact at every step, beside plain Cholesky (ms per step)",
        ("model", "batch", "AdamW", "plain Cholesky", "DoPr exact", "exact / plain", "quartiles"),
        [
            (
                *_name(row),
                *(_ms(row["exact"][key]["median"]) for key in ("base_seconds", "plain_seconds", "exact_seconds")),
                f"{row['exact']['ratio']['median']:.3f}",
                _spread("{:.3f}".format, row["exact"]["ratio"]),
            )
            for row in rows
        ],
    )
    for row in results["communication"]:
        console.print(
            f"{row['model']}, {row['ranks']} ranks, {row['solver']}: {row['bytes_per_step']:,.0f} bytes per rank and "
            f"step, predicted {row['predicted']:,.0f}"
        )


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Ratios with their quartiles and goals, and where the added time goes."""
    from matplotlib.figure import Figure

    rows = results["rows"]
    names = [f"{row['model']}\nbatch {row['batch']}" for row in rows]
    places = range(len(rows))
    figure = Figure(figsize=(3 + 0.8 * len(rows), 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    ratios = [row["ratio"] for row in rows]
    errors = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
    above.errorbar(places, [r["median"] for r in ratios], errors, fmt="ko", capsize=4, label="measured")
    goals = [(place, row["goal"]) for place, row in zip(places, rows, strict=True) if row["goal"] is not None]
    if goals:
        above.plot(*zip(*goals, strict=True), "r_", markersize=18, label="goal")
    above.axhline(1, color="0.6", linewidth=0.8)
    above.set_ylabel("DoPr-AdamW step / AdamW step")
    above.legend()
    bottoms = [0.0] * len(rows)
    for phase, colour in COLOURS.items():
        heights = [max(0.0, row["phases"][phase]) / row["base_seconds"]["median"] for row in rows]
        below.bar(places, heights, bottom=bottoms, color=colour, label=phase)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    floors = [row["floor_seconds"] / row["base_seconds"]["median"] for row in rows]
    below.plot(places, floors, "k_", markersize=18, label="FLOP floor")
    predicted = [row["predicted"]["seconds"] / row["base_seconds"]["median"] for row in rows]
    below.plot(places, predicted, "kx", label="predicted")
    below.set_ylabel("added time / AdamW step")
    below.set_xticks(places, names, fontsize=8)
    below.legend(fontsize=8)
    settings = results["settings"]
    figure.suptitle(
        f"{_setting(settings)}, {settings['device']}; bars and marks are medians, whiskers quartiles",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def _setting(settings: Mapping[str, Any]) -> str:
    overlap = ", overlap" * settings["overlap"]
    compiled = f", torch.compile {settings['compile']}" if settings["compile"] else ""
    every = settings["update_every"]
    return f"solver={settings['solver']}, update_every={every}{overlap}{compiled}, {settings['threads']} threads"


def _name(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["model"], str(row["batch"])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


def _spread(text: Callable[[float], str], quartiles: Mapping[str, float]) -> str:
    return f"{text(quartiles['low'])} .. {text(quartiles['high'])}"


def _with_change(text: Callable[[float], str], predicted: float, measured: float) -> str:
    return f"{text(predicted)} ({100 * (predicted / measured - 1):+.0f} %)" if measured else text(predicted)
