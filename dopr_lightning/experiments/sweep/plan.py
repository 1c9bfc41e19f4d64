"""What is swept? The options of ``dopr sweep``, and what they amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from dopr_lightning.configuration import find_config
from dopr_lightning.errors import Parser, UserError, output_folder
from dopr_lightning.experiments.arms import Arm, parse_arms
from dopr_lightning.experiments.command import (
    network_scales,
    numbers,
    options_parser,
    refuse_dopr,
    refuse_reserved,
    seed_numbers,
)
from dopr_lightning.experiments.runner import cores
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
from dopr_lightning.project import Project
from dopr_lightning.proxy import dopr_of

RESERVED = {
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

    @cached_property
    def points(self) -> list[Point]:
        """The hyperparameters of all runs."""
        return points(self.centre, self.values, self.product)

    @property
    def cells(self) -> list[Cell]:
        """All runs, the quick ones first."""
        return [
            Cell(width, parametrization, point, seed)
            for width in self.keywords
            for parametrization in self.parametrizations
            for point in self.points
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


def make_plan(options: Any, overrides: Sequence[str], project: Project) -> Plan:
    """Everything that can be wrong without building anything."""
    from dopr_lightning.training import resolve

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
    refuse_reserved(overrides, RESERVED, "a sweep")
    if options.optimizer and any(override.partition("=")[0] == "--model.optimizer.base" for override in overrides):
        raise UserError("--model.optimizer.base and --optimizer are the same thing; give one")

    # The rollouts of a sweep judge its runs when they end; on the way they would only cost time.
    configs = [f"--config={find_config(name)}" for name in options.config]
    base = (*configs, "--rollout.episodes=0", *overrides)
    # Without muP: what it is based on is not known yet.
    config = resolve([*base, "--model.mup=null"], project)
    arm = _arm(options.optimizer)  # modules that the configuration names may have added to BASES
    if arm:
        refuse_dopr(config, "--optimizer")
        base = (*base, *arm.arguments(None, 0.01))
        config = resolve([*base, "--model.mup=null"], project)
    if config["checkpoint"].get("monitor", "").startswith("rollout/"):  # no checkpoint is kept, none need be chosen
        base = (*base, "--checkpoint.monitor=null", "--checkpoint.save_top_k=1")
        config = resolve([*base, "--model.mup=null"], project)
    arguments = config["model"]["network"].get("init_args", {})
    scales = network_scales(config["model"]["network"]["class_path"])
    dopr = dopr_of(config)
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


def sweep_parser(command: str) -> Parser:
    """Of ``dopr sweep``."""
    parser = options_parser(
        command,
        "sweep",
        description="Train one task at several widths and values of its hyperparameters, and report how far the best "
        "values move with the width, under muP and under the standard parametrisation. Any option of "
        f"'{command} fit' may follow (--trainer.max_steps 500). Finished runs are reused and interrupted ones resumed.",
        example="--config humanoid.yaml --optimizer dopr-adamw --widths 64,128,256,512 "
        f"--lr-octaves 2 --output runs/sweep; then: {command} fit --config humanoid.yaml --config dopr.yaml "
        "--model.network.width 2048 --mup.from_sweep runs/sweep",
    )
    add = parser.add_argument
    add("--optimizer", help=f"as in {command} compare, dopr-muon say; default: the configuration's")
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
        "--output",
        type=output_folder,
        required=True,
        help="folder for the runs, results.json, transfer.png, recommended.yaml",
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
