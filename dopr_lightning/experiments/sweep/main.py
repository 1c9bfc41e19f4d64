"""``dopr sweep``: tune narrow, train wide? One task at several widths, and how far its best hyperparameters move."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from dopr_lightning.errors import Parser, UserError, folder
from dopr_lightning.experiments.arms import Arm, parse_arms
from dopr_lightning.experiments.command import (
    check_steps,
    network_scales,
    numbers,
    parse,
    quiet_building,
    refuse_ours,
    require_rollouts,
    seed_numbers,
    task_of,
)
from dopr_lightning.experiments.runner import KILLED, attempt_all, broke, cores
from dopr_lightning.experiments.sweep.grid import (
    HYPERPARAMETERS,
    ROLES,
    Cell,
    Parametrization,
    Point,
    mup_arguments,
    network_arguments,
    points,
    scaled,
)
from dopr_lightning.experiments.sweep.report import (
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
from dopr_lightning.experiments.trial import DATA, Trial, check_settings, note_settings, write_json
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.proxy import OVERLAY, RESULTS, dopr_of, grid_ends, identity
from dopr_lightning.versions import versions

OURS = {
    "--seed_everything": "--seeds",
    "--rollout.report_episodes": "--episodes",
    "--checkpoint.dirpath": "--output",
    "--trainer.default_root_dir": "--output",
    "--model.mup": "--parametrizations",
    "--model.mup.base": "--widths (the narrowest is the base)",
    "--mup.from_sweep": "a sweep's results in dopr fit",
}
"""Options of ``dopr fit`` that a sweep sets itself, and how it is told."""

OCTAVES = 2.0
"""Of learning rates on either side of the configuration's, where nothing else is asked for."""

OVERHEAD = 50_000
"""Parameters: a step of a tiny network takes about as long as one of a network with so many."""


@dataclass(frozen=True)
class Plan:
    """What is swept.

    Args:
        base: Arguments of ``dopr fit`` that all runs share.
        config: What they amount to, with the optimizer.
        optimizer: Its name, for people.
        scales: The network's keywords that scale with the width.
        keywords: Its scaled keywords, by width.
        centre: Hyperparameters where they are not swept.
        values: Of those that are, increasing.
        parametrizations: muP, standard or both.
        seeds: Training seeds.
        product: Every combination of values.
        project: Whose policy and data.
    """

    base: tuple[str, ...]
    config: dict[str, Any]
    optimizer: str
    scales: Sequence[str]
    keywords: dict[int, dict[str, Any]]
    centre: Point
    values: dict[str, list[float]]
    parametrizations: list[Parametrization]
    seeds: list[int]
    product: bool
    project: Project

    @property
    def cells(self) -> list[Cell]:
        """All runs, the quick ones first."""
        return [
            Cell(width, parametrization, point, seed)
            for width in self.keywords
            for parametrization in self.parametrizations
            for point in points(self.centre, self.values, self.product)
            for seed in self.seeds
        ]

    def arguments(self, keywords: Mapping[str, Any], parametrization: Parametrization, point: Point) -> tuple[str, ...]:
        """Of ``dopr fit``, for one run but for its seed."""
        narrowest = next(iter(self.keywords.values()))
        return (
            *self.base,
            *point.arguments(),
            *network_arguments(keywords),
            *mup_arguments(parametrization, narrowest),
        )


def main(arguments: Sequence[str], project: Project = LIBRARY) -> None:
    """Run the sweep and write its results.

    Raises:
        UserError: A mistake in the arguments, found before anything is trained; or runs that were stopped, or none that
            trained.
    """
    options, overrides = parse(_parser(project.command), arguments)
    plan = _plan(options, overrides, project)
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
    _keep_results(output / RESULTS, plan)
    note_settings(output, settings)

    from dopr_lightning.training import resolve

    # Parsing takes a third of a second, and points differ by numbers alone.
    resolved = functools.cache(lambda w, p: resolve(plan.arguments(plan.keywords[w], p, plan.centre), project))
    trials = []
    for cell in plan.cells:
        chosen = plan.arguments(plan.keywords[cell.width], cell.parametrization, cell.point)
        trials.append(
            Trial(
                cell.name,
                output / "runs" / cell.folder,
                chosen,
                cell.point.put_into(resolved(cell.width, cell.parametrization)),
                cell.seed,
                task["first_seed"],
                options.episodes,
                cost=task["parameters"][cell.width] + OVERHEAD,
                keep_checkpoints=False,  # hundreds of wide networks fill a disk
                project=project,
            )
        )
    outcomes = dict(zip(plan.cells, attempt_all(trials, options.workers, engine), strict=True))
    if stopped := sum(outcome == KILLED for outcome in outcomes.values()):
        raise UserError(
            f"{stopped} of {len(trials)} runs were stopped: {KILLED}; the same command goes on with them, what is "
            "finished is kept"
        )

    metric = task["metric"] if options.episodes else None
    transfers = transfer_results(outcomes, plan.centre, plan.values, plan.product, task["parameters"], metric)
    # Diverging is a result, an error is none: what it hit counts as infinitely bad, and nothing is recommended.
    failed = [cell for cell, outcome in outcomes.items() if isinstance(outcome, str)]
    wrong = [cell for trial, cell in zip(trials, outcomes, strict=True) if broke(trial, outcomes[cell])]
    by = "val_loss" if options.recommend_by == "loss" else task["metric"]
    best = None if wrong else best_point(transfers, plan.centre, by)
    narrowest, widest = min(plan.keywords), max(plan.keywords)
    results: dict[str, Any] = {
        "task": task["id"],
        "optimizer": plan.optimizer,
        "metric": task["metric"],
        "seeds": plan.seeds,
        "grid": "product" if plan.product else "lines",
        "centre": plan.centre.values,
        "widths": [
            {"width": width, "network": keywords, "parameters": task["parameters"][width]}
            for width, keywords in plan.keywords.items()
        ],
        "budget": {
            "steps": task["steps"],
            "batch_size": task["batch_size"],
            "train_episodes": task["train_episodes"],
            "episodes_per_run": options.episodes,
            "runs": len(trials),
            # A step's arithmetic is in proportion to the parameters, and every run has as many steps.
            "compute_of_narrowest_relative_to_widest": task["parameters"][narrowest] / task["parameters"][widest],
        },
        "versions": versions(),
        "data": task["data"],
        "scales": list(plan.scales),
        "identity": identity(plan.config, plan.scales),
        "transfer": transfers,
        "recommended": None,
        "trials": trial_results(outcomes),
    }
    if best is None:
        (output / OVERLAY).unlink(missing_ok=True)  # an earlier sweep's in this folder
    else:
        config = resolve(plan.arguments(recommended_keywords, "mup", best), project)
        results["recommended"] = {
            "width": wide,
            "network": recommended_keywords,
            **best.values,
            "lr_by_role": config["model"]["optimizer"]["lr_by_role"],
            "mup": config["model"]["mup"],
            "by": by,
            "at_edge": at_edge(transfers, by),
            "apart": apart(transfers, best, plan.centre, plan.product),
        }
        _write_overlay(config, output / OVERLAY, project.command)
    write_json(results, output / RESULTS)
    plot(results, output / "transfer.png")
    print_table(results)
    print(f"plot: {output / 'transfer.png'}   numbers: {output / RESULTS}")
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(outcomes)} runs failed, {wrong[0].name}: {outcomes[wrong[0]]}; see log.txt in their "
            "folders, mend it and run the same command again: until then they count as infinitely bad"
        )
    if len(failed) == len(outcomes):
        raise UserError(f"all {len(failed)} runs failed, {failed[0].name}: {outcomes[failed[0]]}")
    if failed:
        print(f"{len(failed)} of {len(outcomes)} runs diverged: infinitely bad, and not run again")
    if best is not None:
        print(f"the run it recommends, {best.name} at width {wide}: stack {output / OVERLAY} on the configuration")
        if ends := grid_ends(results["recommended"]):
            print(f"warning: {ends}")
        if names := results["recommended"]["apart"]:
            print(f"warning: no run had its {' and '.join(names)} together; train one, or sweep with --grid product")
        for other in judged_otherwise(transfers, best, by):
            print(f"warning: it goes by {metric_label(by)} (--recommend-by); the best would be {other}")


def _plan(options: Any, overrides: Sequence[str], project: Project) -> Plan:
    """Everything that can be wrong without building anything."""
    from dopr_lightning.training import find_config, quiet, resolve

    quiet()
    widths = sorted(numbers("--widths", options.widths, int))
    seeds = seed_numbers(options.seeds)
    if not all(width > 0 for width in widths):
        raise UserError(f"--widths {options.widths}: a width is a positive whole number")
    if options.episodes < 0:
        raise UserError(f"--episodes {options.episodes}: 0 for no rollouts, or more")
    if options.recommend_by == "rollouts" and not options.episodes:
        raise UserError("--recommend-by rollouts: there are none; add --episodes 20")
    if options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}")
    for flag in ("cpus_per_trial", "gpus_per_trial"):
        value = getattr(options, flag)
        if not 0 <= value < math.inf or (value == 0 and flag == "cpus_per_trial"):
            raise UserError(f"--{flag.replace('_', '-')} {value:g}: must be positive")
    if options.engine == "inline" and (options.ray_address or options.gpus_per_trial):
        raise UserError("--ray-address and --gpus-per-trial are Ray's; add --engine ray")
    parametrizations = options.parametrizations.split(",")
    for name in parametrizations:
        if name not in get_args(Parametrization) or parametrizations.count(name) > 1:
            raise UserError(f"--parametrizations {options.parametrizations}: mup, standard, or mup,standard")
    arm = _arm(options.optimizer)
    refuse_ours(overrides, OURS, "a sweep")
    if arm and any(override.partition("=")[0] == "--model.optimizer.base" for override in overrides):
        raise UserError("--model.optimizer.base and --optimizer are the same thing; give one")

    # The rollouts of a sweep judge its runs when they end; on the way they would only cost time.
    configs = [f"--config={find_config(name)}" for name in options.config]
    base = (*configs, "--rollout.episodes=0", *overrides, *(arm.arguments(None, 0.01) if arm else []))
    # Without muP: what it is based on is not known yet.
    config = resolve([*base, "--model.mup=null"], project)
    if config["checkpoint"].get("monitor", "").startswith("rollout/"):  # no checkpoint is kept, none need be chosen
        base = (*base, "--checkpoint.monitor=null", "--checkpoint.save_top_k=1")
        config = resolve([*base, "--model.mup=null"], project)
    arguments = config["model"]["network"].get("init_args", {})
    scales = network_scales(config["model"]["network"]["class_path"])
    dopr = dopr_of(config)
    if arm and arm.dopr and sum(c["class_path"].endswith(".DoPr") for c in config["trainer"]["callbacks"]) > 1:
        raise UserError("both --optimizer and the configuration bring DoPr; leave one out")
    optimizer = config["model"]["optimizer"]
    centre = Point(
        float(optimizer["lr"]),
        float(optimizer["weight_decay"]),
        None if dopr is None else dopr["damping"],
        **{name: optimizer["lr_by_role"].get(role) for name, role in ROLES.items()},
    )
    return Plan(
        base,
        config,
        arm.name if arm else f"{'' if dopr is None else 'dopr-'}{optimizer['base']}",
        scales,
        {width: scaled(arguments, scales, width) for width in widths},
        centre,
        _values(options, centre),
        parametrizations,
        seeds,
        options.grid == "product",
        project,
    )


def _arm(name: str | None) -> Arm | None:
    if name is None:
        return None
    arms = parse_arms(name)
    if len(arms) > 1:
        raise UserError(f"--optimizer {name}: a sweep is of one optimizer; run one for each")
    return arms[0]


def _values(options: Any, centre: Point) -> dict[str, list[float]]:
    """The values of each hyperparameter that is swept."""
    flags = {"lr": "learning_rates", "weight_decay": "weight_decays", "damping": "dampings"}
    flags |= {name: f"{name}s" for name in ROLES}
    values: dict[str, list[float]] = {}
    for name in HYPERPARAMETERS:
        flag, text = f"--{flags[name].replace('_', '-')}", getattr(options, flags[name])
        if text is not None:
            values[name] = sorted(numbers(flag, text, float))
            if not all(0 < value < math.inf for value in values[name]):
                raise UserError(f"{flag} {text}: values must be positive; they are compared by their ratios")
    if options.lr_octaves is not None and "lr" in values:
        raise UserError("--learning-rates and --lr-octaves both say which learning rates; give one")
    if options.lr_octaves is not None or not values:
        octaves = OCTAVES if options.lr_octaves is None else options.lr_octaves
        if not 0 < octaves <= 20:
            raise UserError(f"--lr-octaves {octaves:g}: octaves on either side of the configuration's rate, 2 say")
        steps = round(2 * octaves)
        values = {"lr": [float(f"{centre.lr * 2 ** (k / 2):.4g}") for k in range(-steps, steps + 1)], **values}
    if "damping" in values and centre.damping is None:
        raise UserError("--dampings: there is no DoPr in this configuration; use --optimizer dopr-adamw, say")
    return values


def _constant(config: Mapping[str, Any], scales: Sequence[str]) -> dict[str, Any]:
    """The configuration without what is swept: the same for all runs, and for later ones in the same folder."""
    same = Point(0.0, 0.0, 0.0 if dopr_of(config) is not None else None, **dict.fromkeys(ROLES, 0.0)).put_into(config)
    same["model"]["optimizer"]["lr_by_role"].pop("condition")  # folders from before it could be swept have none
    for key in scales:
        same["model"]["network"]["init_args"].pop(key, None)
    return same


def _keep_results(path: Path, plan: Plan) -> None:
    """Refuse to replace results by fewer."""
    if not path.exists():
        return
    old = json.loads(path.read_text())
    if lost := _lost_values(old, plan) or _lost_combinations(old, plan):
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


def _check(plan: Plan, rollouts: bool) -> dict[str, Any]:
    """Build every width, so that mistakes show before hours of training, and say what the task is."""
    from dopr_lightning.training import CLI

    quiet_building()
    parameters = {}
    for width, keywords in plan.keywords.items():
        for parametrization in plan.parametrizations:
            try:
                cli: Any = CLI(
                    [*plan.arguments(keywords, parametrization, plan.centre), "--trainer.logger=false"],
                    run=False,
                    project=plan.project,
                )
            except UserError as error:
                raise UserError(f"--widths {width}: {error}") from error
        parameters[width] = sum(p.numel() for p in cli.model.parameters())
    if rollouts:
        require_rollouts(cli, "a sweep with --episodes")
    cli.datamodule.train_dataloader()
    check_steps(cli)
    return task_of(cli) | {"parameters": parameters}


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


def _parser(command: str) -> Parser:
    parser = Parser(
        prog=f"{command} sweep",
        allow_abbrev=False,
        description="Train one task at several widths and values of its hyperparameters, and report how far the best "
        "values move with the width, under muP and under the standard parametrisation. Any option of 'dopr fit' may "
        "follow (--trainer.max_steps 500). Finished runs are reused and interrupted ones resumed.",
        epilog=f"example: {command} sweep --config humanoid.yaml --optimizer dopr-adamw --widths 64,128,256,512 "
        f"--lr-octaves 2 --output runs/sweep; then: {command} fit --config humanoid.yaml --config dopr.yaml "
        "--model.network.width 2048 --mup.from_sweep runs/sweep",
    )
    add = parser.add_argument
    add("--config", action="append", required=True, help=f"as in {command} fit; may be given several times")
    add("--optimizer", help="as in dopr compare, dopr-muon say; default: the configuration's")
    add(
        "--widths",
        required=True,
        help="comma-separated values of the network's width (of a list of channels, the first); what else scales "
        "follows in the configuration's proportions, and the narrowest is muP's base",
    )
    add("--learning-rates", help="comma-separated; under muP, those of the narrowest width")
    add(
        "--lr-octaves",
        type=float,
        help="in place of --learning-rates: so many octaves on either side of the configuration's, in steps of "
        f"sqrt(2); default, where nothing else is swept: {OCTAVES:g}",
    )
    add("--weight-decays", help="comma-separated")
    add("--dampings", help="comma-separated; of DoPr")
    add("--input-rates", help="comma-separated multipliers of the input layers' learning rate, 0.125,0.25,0.5,1 say")
    add("--readout-rates", help="comma-separated multipliers of the readouts' learning rate")
    add("--condition-rates", help="of what sees one row per sample: FiLM, adaptive norms, the embedding of time")
    add(
        "--grid",
        choices=("lines", "product"),
        default="lines",
        help="lines: each hyperparameter in turn, the others at the configuration's values; product: every "
        "combination, and for each value of one the best of the others; default: %(default)s",
    )
    add("--seeds", default="0,1,2", help="a run for each; default: %(default)s")
    add(
        "--episodes",
        type=int,
        default=0,
        help="rollouts per run, of its final weights; 0: judge by validation loss alone; default: %(default)s",
    )
    add("--parametrizations", default="mup,standard", help="mup, standard or both; default: %(default)s")
    add(
        "--output", type=folder, required=True, help="folder for the runs, results.json, transfer.png, recommended.yaml"
    )
    add("--recommend-width", type=int, help="of the run to recommend; default: the widest")
    add(
        "--recommend-by",
        choices=("loss", "rollouts"),
        default="loss",
        help="what the recommended values are best by; rollouts are what counts, and take many seeds and --episodes to "
        "place a value; default: %(default)s",
    )
    add(
        "--engine",
        choices=("inline", "ray"),
        default="inline",
        help="inline: worker processes on this machine; ray: Ray Tune, with files that all its machines see; default: "
        "%(default)s",
    )
    add("--workers", type=int, default=cores(), help="inline: runs at once, sharing the cores; default: %(default)s")
    add("--ray-address", help="of a running Ray cluster; default: one on this machine, for this command only")
    add("--cpus-per-trial", type=float, default=1.0, help="ray: reserved per run; default: %(default)s")
    add("--gpus-per-trial", type=float, default=0.0, help="ray: a fraction shares a GPU; default: %(default)s")
    return parser
