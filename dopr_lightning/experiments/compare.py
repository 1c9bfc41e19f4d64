"""``dopr compare``: does an optimizer help in closed loop? One task, equal budget, seeds and tuning for every arm."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dopr_lightning.configuration import find_config
from dopr_lightning.errors import Parser, UserError, output_folder
from dopr_lightning.experiments.arms import Arm, parse_arms
from dopr_lightning.experiments.command import (
    build,
    check_task,
    numbers,
    options_parser,
    parse,
    quiet_building,
    refuse_dopr,
    refuse_reserved,
    seed_numbers,
)
from dopr_lightning.experiments.report import arm_results, paired_differences, plot, print_table
from dopr_lightning.experiments.runner import cores, run_all
from dopr_lightning.experiments.trial import (
    DATA,
    Failure,
    Outcome,
    Record,
    Trial,
    check_settings,
    common_steps,
    earlier_results,
    note_settings,
    write_json,
)
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.proxy import dopr_of
from dopr_lightning.versions import versions

RESERVED = {
    "--seed_everything": "--seeds",
    "--model.optimizer.base": "--optimizers",
    "--rollout.report_episodes": "--episodes",
    "--checkpoint.dirpath": "--output",
    "--trainer.default_root_dir": "--output",
}
"""Options of ``dopr fit`` that a comparison sets itself, and how it is told."""

TUNING_SEED = 1000
"""First training seed of the tuning runs, so that no reported run was chosen by its own luck."""


def main(arguments: Sequence[str], project: Project = LIBRARY) -> None:
    """Run the comparison and write its results.

    Raises:
        UserError: A mistake in the arguments, found before anything is trained; or runs that failed.
    """
    options, overrides = parse(_parser(project.command), arguments)
    seeds = seed_numbers(options.seeds)
    if not 0 < options.damping < math.inf:
        raise UserError(f"--damping must be positive, got {options.damping}; 0.01 is a good start")
    for name in ("episodes", "workers", "tuning_seeds", "tuning_episodes"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    rates, tuning_seeds = _tuning_grid(options, seeds)
    refuse_reserved(overrides, RESERVED, "a comparison")

    from dopr_lightning.training import resolve

    quiet_building()
    base = [*(f"--config={find_config(name)}" for name in options.config), *overrides]
    config = resolve(base, project)
    refuse_dopr(config)
    arms = parse_arms(options.optimizers)  # modules that the configuration names may have added to BASES
    task = _check(base, arms, options.damping, project)
    output: Path = options.output
    settings = {
        "config": config,
        "episodes": options.episodes,
        "damping": options.damping,
        DATA: task["data"]["sha256"],
    }
    check_settings(output, settings)
    _refuse_lost_results(output / "results.json", arms, seeds)
    note_settings(output, settings)

    resolved = functools.cache(functools.partial(resolve, project=project))  # the same for all seeds of an arm

    def trial(arm: Arm, lr: float | None, seed: int, folder: str, first_seed: int, episodes: int) -> Trial:
        chosen = (*base, *arm.arguments(lr, options.damping))
        name = f"{arm.name} seed {seed}" + (f" lr {lr:g} (tuning)" if folder.startswith("tuning") else "")
        return Trial(name, output / folder, chosen, resolved(chosen), seed, first_seed, episodes, project=project)

    tuning_episodes = options.tuning_episodes or options.episodes
    grid = [(arm, rate, seed) for arm in arms for rate in rates for seed in tuning_seeds]
    trials = [
        trial(arm, rate, seed, f"tuning/{arm.name}/lr-{rate:g}-seed-{seed}", task["selection_seed"], tuning_episodes)
        for arm, rate, seed in grid
    ]
    tuned = dict(zip(grid, run_all(trials, options.workers), strict=True))
    tuning = {arm: [_tuned(rate, [tuned[arm, rate, seed] for seed in tuning_seeds]) for rate in rates] for arm in arms}
    best = {arm: _best_rate(arm, tuning[arm]) if rates else None for arm in arms}

    runs = [(arm, seed) for arm in arms for seed in seeds]
    trials = [
        trial(arm, best[arm], seed, f"runs/{arm.name}/seed-{seed}", task["first_seed"], options.episodes)
        for arm, seed in runs
    ]
    found = dict(zip(runs, run_all(trials, options.workers), strict=True))
    outcomes = {arm: [found[arm, seed] for seed in seeds] for arm in arms}
    dopr = {arm: dopr_of(trial.config) for (arm, _), trial in zip(runs, trials, strict=True)}

    results = {
        "task": task["id"],
        "metric": task["metric"],
        "budget": {
            "steps": common_steps(found.values(), task["steps"]),
            "batch_size": task["batch_size"],
            "train_episodes": task["train_episodes"],
            "parameters": task["parameters"],
            "episodes_per_seed": options.episodes,
            "tuning_runs_per_arm": len(rates) * len(tuning_seeds),
            "episodes_per_tuning_run": tuning_episodes if rates else 0,
        },
        "versions": versions(),
        "data": task["data"],
        "arms": [
            arm_results(arm, seeds, outcomes[arm], task["metric"])
            | {"lr": best[arm] or task["lr"], "damping": (dopr[arm] or {}).get("damping")}
            | {"tuning": tuning[arm]}
            for arm in arms
        ],
        "differences": paired_differences(arms, outcomes),
    }
    write_json(results, output / "results.json")
    plot(results, output / "compare.png")
    print_table(results)
    for arm in arms:
        if rates and _at_end(tuning[arm]):
            print(f"{arm.name}: its best learning rate, {best[arm]:g}, lies at an end of the grid; give more of them")
    print(
        f"plot: {output / 'compare.png'}   numbers: {output / 'results.json'}   curves: tensorboard --logdir {output}"
    )


def _tuning_grid(options: Any, seeds: Sequence[int]) -> tuple[list[float], range]:
    """The learning rates to choose from, if any, and the training seeds of the runs that do.

    Raises:
        UserError: A rate is not positive, a seed is reported too, or nothing is tuned.
    """
    rates = numbers("--learning-rates", options.learning_rates, float) if options.learning_rates else []
    if not all(0 < rate < math.inf for rate in rates):
        raise UserError(f"--learning-rates {options.learning_rates}: a rate must be positive")
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + options.tuning_seeds)
    if rates and (reported := sorted(set(seeds) & set(tuning_seeds))):
        raise UserError(f"--seeds {reported[0]}: a run of that seed tunes the learning rate; report others")
    if not rates and (options.tuning_seeds > 1 or options.tuning_episodes):
        raise UserError("--tuning-seeds, --tuning-episodes: nothing is tuned; give --learning-rates too")
    return rates, tuning_seeds


def _refuse_lost_results(path: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
    """Refuse to replace results by fewer."""
    old = earlier_results(path, "arms") or {"arms": []}
    lost = {entry["name"] for entry in old["arms"]} - {arm.name for arm in arms}
    lost |= {f"seed {seed}" for entry in old["arms"] for seed in entry["seeds"] if seed not in seeds}
    if lost:
        raise UserError(f"{path} also has {', '.join(sorted(lost))}; name them again too, or choose another --output")


def _tuned(rate: float, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the tuning runs of one rate say, one per seed; a rate that failed once has failed."""
    if failed := [outcome for outcome in outcomes if isinstance(outcome, Failure)]:
        return {"lr": rate, "failed": failed[0].message}
    records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    per_seed = [record.mean for record in records]
    return {
        "lr": rate,
        "mean": fmean(per_seed),
        "per_seed": per_seed,
        "val_loss": fmean(record.val_loss for record in records),
    }


def _ranked(tuning: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rates with the best rollouts first, of level ones that of the lowest loss; without those that diverged."""
    finished = [entry for entry in tuning if "failed" not in entry]
    return sorted(finished, key=lambda entry: (-entry["mean"], entry["val_loss"], entry["lr"]))


def _best_rate(arm: Arm, tuning: Sequence[Mapping[str, Any]]) -> float:
    ranked = _ranked(tuning)
    if not ranked:
        raise UserError(f"{arm.name} failed at every learning rate: {tuning[0]['failed']}; give other --learning-rates")
    return ranked[0]["lr"]


def _at_end(tuning: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one rate is better than all others, and the smallest or largest of several."""
    rates, ranked = [entry["lr"] for entry in tuning], _ranked(tuning)
    level = len(ranked) > 1 and ranked[0]["mean"] == ranked[1]["mean"]
    return len(rates) > 1 and not level and ranked[0]["lr"] in (min(rates), max(rates))


def _parser(command: str) -> Parser:
    parser = options_parser(
        command,
        "compare",
        description="Train one task under several optimizers, with equal budget and seeds, and judge each by rollouts "
        f"of its EMA weights on the same fixed seeds. Any option of '{command} fit' may follow (--trainer.max_steps "
        "500). Finished runs are reused and interrupted ones resumed.",
        example="--config walker2d.yaml --optimizers adamw,dopr-adamw --output runs/walker2d",
    )
    parser.add_argument(
        "--optimizers",
        default="adamw,dopr-adamw,muon,dopr-muon",
        help="comma-separated; DoPr's own options may follow a name, as in dopr-adamw+solver=lowrank+update_every=10; "
        "default: %(default)s",
    )
    parser.add_argument("--seeds", default="0,1,2", help="a run for each; default: %(default)s")
    parser.add_argument("--episodes", type=int, default=20, help="rollouts per run; default: %(default)s")
    parser.add_argument(
        "--output", type=output_folder, required=True, help="folder for the runs, results.json and compare.png"
    )
    parser.add_argument("--damping", type=float, default=0.01, help="of the dopr arms; default: %(default)s")
    parser.add_argument(
        "--learning-rates",
        help="tune every arm on this grid first (comma-separated): a run for each, with a training seed of its own and "
        "judged on rollout seeds that are not reported; default: the configuration's rate for all",
    )
    parser.add_argument(
        "--tuning-seeds",
        type=int,
        default=1,
        help="runs for each learning rate of the grid, of which the mean counts: one run's rollouts say little where "
        "seeds differ much; default: %(default)s",
    )
    parser.add_argument(
        "--tuning-episodes",
        type=int,
        help="rollouts of each of these runs: 20 initial states may favour another rate than 100; default: --episodes",
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), help="runs at once, sharing the cores; default: %(default)s"
    )
    return parser


def _check(base: Sequence[str], arms: Sequence[Arm], damping: float, project: Project) -> dict[str, Any]:
    """Build everything, so that mistakes show before hours of training, and say what the task is."""
    from dopr_lightning.callback import DoPr
    from dopr_lightning.preconditioner import ActivationPreconditioner
    from dopr_lightning.rollout.callback import SELECTION_OFFSET

    # One arm per set of DoPr's options is enough: names and damping are checked, and all else they share.
    distinct = {(arm.dopr, arm.options): arm for arm in arms}
    for arm in distinct.values():
        cli = build([*base, *arm.arguments(None, damping)], project)
        for callback in cli.trainer.callbacks:
            if isinstance(callback, DoPr):  # whether its patterns match anything, only the policy can tell
                ActivationPreconditioner(cli.model, **callback.options).remove()
    task = check_task(cli, "a comparison")
    return task | {
        "selection_seed": task["first_seed"] + SELECTION_OFFSET,
        "parameters": sum(p.numel() for p in cli.model.parameters()),
        "lr": cli.model.optimizer_config.lr,
    }
