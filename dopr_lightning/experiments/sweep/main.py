"""``dopr sweep``: tune narrow, train wide? One task at several widths, and how far its best hyperparameters move."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopr_lightning.errors import UserError
from dopr_lightning.experiments.command import build, check_task, parse, quiet_building
from dopr_lightning.experiments.runner import KILLED, attempt_all
from dopr_lightning.experiments.sweep.grid import ROLES, Cell, Point, scaled
from dopr_lightning.experiments.sweep.lost import refuse_lost_results
from dopr_lightning.experiments.sweep.plan import Plan, make_plan, sweep_parser
from dopr_lightning.experiments.sweep.report import (
    Outcomes,
    apart,
    at_edge,
    best_point,
    judged_otherwise,
    metric_label,
    plot,
    print_table,
    transfer_results,
    trial_results,
)
from dopr_lightning.experiments.trial import (
    DATA,
    Failure,
    Trial,
    check_settings,
    common_steps,
    note_settings,
    write_json,
)
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.proxy import OVERLAY, RESULTS, dopr_of, grid_ends, identity
from dopr_lightning.versions import versions

OVERHEAD = 50_000
"""Parameters: a step of a tiny network takes about as long as one of a network with so many."""


def main(arguments: Sequence[str], project: Project = LIBRARY) -> None:
    """Run the sweep and write its results.

    Raises:
        UserError: A mistake in the arguments, found before anything is trained; or runs that were stopped, or none that
            trained.
    """
    options, overrides = parse(sweep_parser(project.command), arguments)
    quiet_building()
    plan = make_plan(options, overrides, project)
    wide = max(plan.keywords) if options.recommend_width is None else options.recommend_width
    if wide < min(plan.keywords):
        raise UserError(f"--recommend-width {wide} is less than the narrowest of --widths, which muP starts from")
    recommended_keywords = scaled(plan.config["model"]["network"]["init_args"], plan.scales, wide)
    engine = None
    if options.engine == "ray":
        from dopr_lightning.experiments.sweep.ray_engine import ray_engine

        engine = ray_engine(options.ray_address, options.cpus_per_trial, options.gpus_per_trial)

    output: Path = options.output.absolute()
    task = _check(plan, rollouts=options.episodes > 0)
    settings = {
        "config": _constant(plan.config, plan.scales),
        "base_width": min(plan.keywords),
        "episodes": options.episodes,
        DATA: task["data"]["sha256"],
    }
    check_settings(output, settings)
    refuse_lost_results(output / RESULTS, plan)
    note_settings(output, settings)

    trials = _trials(plan, task, options.episodes, output)
    outcomes = dict(zip(plan.cells, attempt_all(trials, options.workers, engine), strict=True))
    if stopped := sum(outcome == KILLED for outcome in outcomes.values()):
        raise UserError(
            f"{stopped} of {len(trials)} runs were stopped: {KILLED.message}; the same command goes on with them, what "
            "is finished is kept"
        )
    # Diverging is a result, an error is none: what it hit counts as infinitely bad, and nothing is recommended.
    wrong = [cell for cell, outcome in outcomes.items() if isinstance(outcome, Failure) and not outcome.diverged]
    by = "val_loss" if options.recommend_by == "loss" else task["metric"]
    results = _results(plan, task, options.episodes, outcomes)
    best = None if wrong else best_point(results["transfer"], plan.centre, by)
    if best is None:
        (output / OVERLAY).unlink(missing_ok=True)  # an earlier sweep's in this folder
    else:
        from dopr_lightning.training import resolve

        config = resolve(plan.arguments(recommended_keywords, "mup", best), project)
        results["recommended"] = {
            "width": wide,
            "network": recommended_keywords,
            **best.values,
            "lr_by_role": config["model"]["optimizer"]["lr_by_role"],
            "mup": config["model"]["mup"],
            "by": by,
            "at_edge": at_edge(results["transfer"], by),
            "apart": apart(results["transfer"], best, plan.centre, plan.product),
        }
        _write_overlay(config, output / OVERLAY, project.command)
    write_json(results, output / RESULTS)
    plot(results, output / "transfer.png")
    print_table(results)
    print(f"plot: {output / 'transfer.png'}   numbers: {output / RESULTS}")
    _say_failures(outcomes, wrong)
    if best is not None:
        print(f"the run it recommends, {best.name} at width {wide}: stack {output / OVERLAY} on the configuration")
        _say_doubts(results, best)


def _check(plan: Plan, rollouts: bool) -> dict[str, Any]:
    """Build every width, so that mistakes show before hours of training, and say what the task is."""
    parameters = {}
    for width, keywords in plan.keywords.items():
        for parametrization in plan.parametrizations:
            try:
                cli = build(plan.arguments(keywords, parametrization, plan.centre), plan.project)
            except UserError as error:
                raise UserError(f"--widths {width}: {error}") from error
        parameters[width] = sum(p.numel() for p in cli.model.parameters())
    return check_task(cli, "a sweep with --episodes" if rollouts else None) | {"parameters": parameters}


def _constant(config: Mapping[str, Any], scales: Sequence[str]) -> dict[str, Any]:
    """The configuration without what is swept: the same for all runs, and for later ones in the same folder."""
    same = Point(0.0, 0.0, 0.0 if dopr_of(config) is not None else None, **dict.fromkeys(ROLES, 0.0)).put_into(config)
    for key in scales:
        same["model"]["network"]["init_args"].pop(key, None)
    return same


def _trials(plan: Plan, task: Mapping[str, Any], episodes: int, output: Path) -> list[Trial]:
    """One per cell of the plan."""
    from dopr_lightning.training import resolve

    # Parsing takes a third of a second, and points differ by numbers alone.
    resolved = functools.cache(lambda w, p: resolve(plan.arguments(plan.keywords[w], p, plan.centre), plan.project))
    return [
        Trial(
            cell.name,
            output / "runs" / cell.folder,
            plan.arguments(plan.keywords[cell.width], cell.parametrization, cell.point),
            cell.point.put_into(resolved(cell.width, cell.parametrization)),
            cell.seed,
            task["first_seed"],
            episodes,
            cost=task["parameters"][cell.width] + OVERHEAD,
            keep_checkpoints=False,  # hundreds of wide networks fill a disk
            project=plan.project,
        )
        for cell in plan.cells
    ]


def _results(plan: Plan, task: Mapping[str, Any], episodes: int, outcomes: Outcomes) -> dict[str, Any]:
    """All of results.json but what is recommended."""
    parameters = task["parameters"]
    metric = task["metric"] if episodes else None
    return {
        "task": task["id"],
        "optimizer": plan.optimizer,
        "metric": task["metric"],
        "seeds": plan.seeds,
        "grid": "product" if plan.product else "lines",
        "centre": plan.centre.values,
        "widths": [
            {"width": width, "network": keywords, "parameters": parameters[width]}
            for width, keywords in plan.keywords.items()
        ],
        "budget": {
            "steps": common_steps(outcomes.values(), task["steps"]),
            "batch_size": task["batch_size"],
            "train_episodes": task["train_episodes"],
            "episodes_per_run": episodes,
            "runs": len(outcomes),
            # A step's arithmetic is in proportion to the parameters, and every run has as many steps.
            "compute_of_narrowest_relative_to_widest": parameters[min(parameters)] / parameters[max(parameters)],
        },
        "versions": versions(),
        "data": task["data"],
        "scales": list(plan.scales),
        "identity": identity(plan.config, plan.scales),
        "transfer": transfer_results(outcomes, plan, parameters, metric),
        "recommended": None,
        "trials": trial_results(outcomes),
    }


def _write_overlay(config: Mapping[str, Any], path: Path, command: str) -> None:
    """What the recommended run adds to the configuration, as a file for ``dopr fit --config``."""
    import yaml

    overlay: dict[str, Any] = {"model": {key: config["model"][key] for key in ("network", "mup", "optimizer")}}
    if config["trainer"].get("callbacks"):
        overlay["trainer"] = {"callbacks": config["trainer"]["callbacks"]}
    path.write_text(
        f"# {command} fit --config THE_SWEEPS_CONFIGURATION --config recommended.yaml\n"
        + yaml.safe_dump(overlay, sort_keys=False)
    )


def _say_failures(outcomes: Outcomes, wrong: Sequence[Cell]) -> None:
    """How many runs have no result.

    Args:
        outcomes: Of all runs.
        wrong: Those that ended in an error, and may be run again.

    Raises:
        UserError: There are some that did, or there is no run that has a result.
    """
    failed = {cell: outcome.message for cell, outcome in outcomes.items() if isinstance(outcome, Failure)}
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(outcomes)} runs failed, {wrong[0].name}: {failed[wrong[0]]}; see log.txt in their "
            "folders, mend it and run the same command again: until then they count as infinitely bad"
        )
    if len(failed) == len(outcomes):
        first, why = next(iter(failed.items()))
        raise UserError(f"all {len(failed)} runs failed, {first.name}: {why}")
    if failed:
        print(f"{len(failed)} of {len(outcomes)} runs diverged: infinitely bad, and not run again")


def _say_doubts(results: Mapping[str, Any], best: Point) -> None:
    """Why what is recommended may not be the best."""
    found = results["recommended"]
    if ends := grid_ends(found):
        print(f"warning: {ends}")
    if names := found["apart"]:
        print(f"warning: no run had its {' and '.join(names)} together; train one, or sweep with --grid product")
    for other in judged_otherwise(results["transfer"], best, found["by"]):
        print(f"warning: it goes by {metric_label(found['by'])} (--recommend-by); the best would be {other}")
