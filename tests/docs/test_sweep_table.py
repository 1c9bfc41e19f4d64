"""The table of docs/results/mup/README.md is what its results.json say, and so are its verdicts."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from pages import DOCS

from dopr_lightning.experiments.sweep.report import _with_interval
from dopr_lightning.experiments.sweep.transfer import Interval, Transfer, analyse

FOLDER = DOCS / "results" / "mup"
NAMES = {"learning rate": "lr", "weight decay": "weight_decay", "damping": "damping"}
DRIFT, REGRET, FACTOR = 0.25, 0.01, 8
"""The bar: octaves, a share of the loss, and over which growth of the width."""

ROW = re.compile(
    r"^\| \[(?P<what>.+)\]\((?P<folder>[\w-]+)/results.json\)(?P<more>[^|]*) \| (?P<widths>\d+ to \d+) \|.*$", re.M
)


def transfer_of(what: str, folder: str, narrowest: int, widest: int) -> Transfer:
    """Of the hyperparameter and metric that a row names, between two widths."""
    results = json.loads((FOLDER / folder / "results.json").read_text())
    name = next(key for label, key in NAMES.items() if label in what)
    parametrization = "standard" if "standard" in what else "mup"
    metric = results["metric"] if "return" in what else "val_loss"
    (found,) = (
        t
        for t in results["transfer"]
        if (t["hyperparameter"], t["parametrization"], t["metric"]) == (name, parametrization, metric)
    )
    sign = 1 if metric == "val_loss" else -1
    losses = {
        row["width"]: np.array([[math.inf if x is None else sign * x for x in line] for line in row["numbers"]])
        for row in found["widths"]
        if narrowest <= row["width"] <= widest
    }
    assert min(losses) == narrowest
    assert max(losses) == widest
    compute = {width["width"]: float(width["parameters"]) for width in results["widths"] if width["width"] in losses}
    return analyse(found["values"], losses, compute)


def cells(transfer: Transfer) -> list[str]:
    """What the table says of it."""
    wide = transfer.widths[-1]
    ends = any(row.at_edge for row in transfer.widths)
    return [
        "grid ends: " * ends + _with_interval(wide.drift, wide.drift_ci95, "{:+.2f}"),
        _with_interval(transfer.max_drift, transfer.max_drift_ci95, "{:.2f}"),
        percent(wide.regret, wide.regret_ci95),
        percent(wide.grid_regret, wide.grid_regret_ci95),
        "-" if wide.wasted_compute is None else f"{100 * wide.wasted_compute:.0f}",
        verdict(transfer, ends),
    ]


def percent(value: float | None, interval: Interval) -> str:
    """Its sign stands in the table's head."""
    return _with_interval(value, interval, "{:.1%}").replace("%", "")


def verdict(transfer: Transfer, ends: bool) -> str:
    """Of the point estimates; drift at every width counts."""
    narrow, *_, wide = transfer.widths
    assert transfer.max_drift is not None
    assert wide.regret is not None
    drift = "drift missed" if transfer.max_drift > DRIFT else "drift open" if ends else "drift met"
    regret = "regret met" if wide.regret <= REGRET else "regret missed"
    factor = wide.width // narrow.width
    short = "" if factor >= FACTOR else f", x{factor} only"
    alike = {("drift met", "regret met"): "met", ("drift missed", "regret missed"): "missed"}
    return alike.get((drift, regret), f"{regret}, {drift}") + short


def line(row: re.Match[str]) -> str:
    """The row as it should be."""
    narrowest, widest = (int(width) for width in row["widths"].split(" to "))
    found = cells(transfer_of(row["what"], row["folder"], narrowest, widest))
    link = f"[{row['what']}]({row['folder']}/results.json){row['more']}"
    return f"| {' | '.join((link, row['widths'], *found))} |"


PAGE = (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0].split(" | ")[0][2:]) for row in ROW.finditer(PAGE)])
def test_a_row_says_what_the_runs_say(row: re.Match[str]) -> None:
    assert row[0] == line(row)


def test_the_rows_are_found() -> None:
    assert len(ROW.findall(PAGE)) == PAGE.count("/results.json)") >= 20


if __name__ == "__main__":
    print(ROW.sub(line, PAGE), end="")
