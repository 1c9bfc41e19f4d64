"""Would a sweep's results take the place of others that have more?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dopr_lightning.errors import UserError
from dopr_lightning.experiments.sweep.grid import ROLES, Point, points
from dopr_lightning.experiments.sweep.plan import Plan
from dopr_lightning.experiments.trial import earlier_results


def refuse_lost_results(path: Path, plan: Plan) -> None:
    """Refuse to replace results by fewer.

    Args:
        path: Of results.json; there may be none yet.
        plan: What is about to be swept.

    Raises:
        UserError: Names what would be lost; or they are not of a sweep.
    """
    old = earlier_results(path, "transfer")
    if old is not None and (lost := _lost_values(old, plan) or _lost_combinations(old, plan)):
        more = f" and {len(lost) - 4} more" if lost[4:] else ""
        raise UserError(f"{path} also has {', '.join(lost[:4])}{more}; name them again too, or choose another --output")


def _lost_values(old: Mapping[str, Any], plan: Plan) -> list[str]:
    """What there are results of, and the plan does not name."""
    lost = [f"width {entry['width']}" for entry in old["widths"] if entry["width"] not in plan.keywords]
    lost += [f"seed {seed}" for seed in old["seeds"] if seed not in plan.seeds]
    for transfer in old["transfer"]:
        parametrization, name = transfer["parametrization"], transfer["hyperparameter"]
        if parametrization not in plan.parametrizations:
            lost.append(parametrization)
        lost += [f"{name} {value:g}" for value in transfer["values"] if value not in plan.values.get(name, [])]
    return list(dict.fromkeys(lost))


def _lost_combinations(old: Mapping[str, Any], plan: Plan) -> list[str]:
    """What there are results of, and the plan names, but not together: a product, or lines through another centre."""
    values = {transfer["hyperparameter"]: transfer["values"] for transfer in old["transfer"]}
    product, before, now = old["grid"] == "product", _with_shares(Point(**old["centre"])), _with_shares(plan.centre)
    if set(points(before, values, product)) <= set(points(now, plan.values, plan.product)):
        return []
    if product and not plan.product and len(values) > 1:
        return ["--grid product"]
    lost = []
    for name, value in before.values.items():
        # Nothing ran there if all that ran had values of its own.
        ran = name not in values if product else list(values) != [name]
        reached = (plan.product and plan.values.get(name)) or [getattr(now, name)]
        if ran and value not in reached:
            lost.append(f"centre {name} {value}")
    return lost


def _with_shares(centre: Point) -> Point:
    """The same, with a share of 1 for each role that has none of its own."""
    return replace(centre, **{name: 1.0 for name in ROLES if getattr(centre, name) is None})
