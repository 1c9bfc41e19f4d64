"""From coordinate checks to what people look at: a table, and a picture of every layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import get_args

from dopr_lightning.experiments.coordinates import LABELS, OUTPUT, CoordinateCheck, Quantity
from dopr_lightning.experiments.sweep.grid import Parametrization

Checks = dict[tuple[str, Parametrization], CoordinateCheck]
"""By optimizer and parametrisation."""

SHOWN = 8
"""Layers that are named, of those that fail."""


def print_table(title: str, check: CoordinateCheck) -> None:
    """A row per quantity, with the layers of the least and the greatest exponent; then what is wrong, causes first."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    prefix = _shared_prefix([row.layer for row in check.rows if row.layer != OUTPUT])
    table = Table(title=f"{title}: exponents over widths {check.widths[0]:g} to {check.widths[-1]:g}")
    for heading in ("quantity", "least", "greatest", "wrong"):
        table.add_column(heading, justify="right" if heading == "wrong" else "left", overflow="fold")
    for quantity in get_args(Quantity):
        rows = [row for row in check.rows if row.quantity == quantity]
        known = [row for row in rows if not math.isnan(row.slope)]
        ends = (min(known, key=attrgetter("slope")), max(known, key=attrgetter("slope"))) if known else ()
        cells = [f"{row.slope:+.2f} {escape(row.layer.removeprefix(prefix))}" for row in ends] or ["-", "-"]
        table.add_row(LABELS[quantity], *cells, f"{sum(not row.passed for row in rows)} of {len(rows)}")
    console = Console()
    console.print(table)
    levelling = sum(row.levels_off for row in check.rows)
    if levelling:
        console.print(f"  {levelling} more would be, but level off over the wider half of the widths")
    failures = check.failures()
    for row in failures[:SHOWN]:
        console.print(f"  {escape(row.diagnosis)}", soft_wrap=True)
    if len(failures) > SHOWN:
        console.print(f"  and {len(failures) - SHOWN} more, in results.json")


def plot(checks: Checks, path: Path) -> None:
    """A row of panels per optimizer and parametrisation, a panel per quantity, a line per layer; red: wrong.

    Values are relative to the narrowest width's: a right line lies between the dotted ones.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    quantities = get_args(Quantity)
    figure = Figure(figsize=(2.6 * len(quantities), 2.4 * len(checks) + 0.6), layout="constrained")
    grid = figure.subplots(len(checks), len(quantities), sharex=True, sharey="col", squeeze=False)
    colours = colormaps["viridis"]
    for panels, ((name, parametrization), check) in zip(grid, checks.items(), strict=True):
        for axes, quantity in zip(panels, quantities, strict=True):
            rows = [row for row in check.rows if row.quantity == quantity]
            for index, row in enumerate(rows):
                if math.isnan(row.slope):
                    continue
                colour = colours(index / max(1, len(rows) - 1)) if row.passed else "tab:red"
                axes.plot(check.widths, [v / row.values[0] for v in row.values], color=colour, linewidth=1, alpha=0.7)
            for slope in {bound for row in rows for bound in (row.low, row.high) if math.isfinite(bound)}:
                limit = [(width / check.widths[0]) ** slope for width in check.widths]
                axes.plot(check.widths, limit, "k:", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.tick_params(labelsize=7)
        panels[0].set_ylabel(f"{name}\n{parametrization}", fontsize=9)
    for axes, quantity in zip(grid[0], quantities, strict=True):
        axes.set_title(LABELS[quantity], fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("width", fontsize=8)
    figure.suptitle(
        "relative to the narrowest width; a line per layer, first to last from dark to light; red: wrong; dotted: the "
        "least and the greatest exponent that are right",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def _shared_prefix(names: Sequence[str]) -> str:
    """Modules that all names begin with, ``"network."``."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)  # as deep as the shallowest
    return "".join(f"{level[0]}." for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
