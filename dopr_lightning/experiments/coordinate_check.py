"""``dopr coord-check``: is a configuration's network parametrised rightly? A few steps at several widths say."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dopr_lightning.configuration import find_config
from dopr_lightning.errors import Parser, UserError, output_folder
from dopr_lightning.experiments.arms import Arm, parse_arms
from dopr_lightning.experiments.command import (
    build,
    network_scales,
    numbers,
    options_parser,
    parse,
    quiet_building,
    refuse_dopr,
    refuse_reserved,
    seed_numbers,
)
from dopr_lightning.experiments.coordinate_plot import Checks, plot, print_table
from dopr_lightning.experiments.coordinates import EXCEPTIONS, LEVELLING, TOLERANCE, coordinate_check
from dopr_lightning.experiments.sweep.grid import Parametrization, mup_arguments, network_arguments, scaled, size
from dopr_lightning.experiments.trial import earlier_results, write_json
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.versions import versions

RESERVED = {
    "--seed_everything": "--seeds",
    "--model.optimizer.base": "--optimizers",
    "--model.mup.base": "--widths (the narrowest is the base)",
    "--model.mup": "--widths (the narrowest is the base)",
    "--mup.from_sweep": "dopr fit for that",
    "--data.batch_size": "--windows",
}
"""Options of ``dopr fit`` that the check sets itself, and how it is told."""

NARROWEST, WIDEST = 1 / 8, 2
"""Relative to the configured width, where none are asked for."""


def main(arguments: Sequence[str], project: Project = LIBRARY) -> int:
    """Run the check, and write its table, results.json and coord_check.png.

    Returns:
        0 if every exponent under muP is right, else 1.

    Raises:
        UserError: A mistake in the arguments, found before anything is trained.
    """
    quiet_building()
    options, overrides = parse(_parser(project.command), arguments)
    task = _task(options, overrides, project)
    path: Path = options.output / "results.json"
    settings = {
        "config": task.config,
        "optimizers": [arm.name for arm in task.arms],
        "widths": list(task.keywords),
        "steps": options.steps,
        "seeds": task.seeds,
        "windows": options.windows,
        "damping": options.damping,
        "tolerance": options.tolerance,
        "standard": options.standard,
    }
    earlier = earlier_results(path, "checks")
    if earlier is not None and earlier.get("settings") != settings:
        raise UserError(f"{path} is of another check; choose another --output")

    parametrizations: list[Parametrization] = ["mup", "standard"] if options.standard else ["mup"]
    subjects = {
        (arm, kind): _Subject(task, arm, kind, options.damping) for arm in task.arms for kind in parametrizations
    }
    next(iter(subjects.values())).try_widths()
    checks: Checks = {}
    for (arm, kind), subject in subjects.items():
        print(f"{arm.name}, {kind}: training {len(task.keywords) * len(task.seeds)} networks", flush=True)
        found = coordinate_check(
            subject.build,
            subject.loss,
            list(task.keywords),
            steps=options.steps,
            seeds=task.seeds,
            dopr=subject.dopr,
            tolerance=options.tolerance,
            least=EXCEPTIONS.get(arm.base),
        )
        checks[arm.name, kind] = found
        print_table(f"{arm.name}, {kind}", found)

    passed = all(found.passed for (_, kind), found in checks.items() if kind == "mup")
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "coord_check.png"
    results = {
        "passed": passed,
        "settings": settings,
        "network": {str(width): keywords for width, keywords in task.keywords.items()},
        "levelling": LEVELLING,
        "versions": versions(),
        "checks": [
            {"optimizer": name, "parametrization": kind} | found.to_dict() for (name, kind), found in checks.items()
        ],
    }
    write_json(results, path)
    plot(checks, picture)
    print(f"plot: {picture}   numbers: {path}")
    for (name, kind), found in checks.items():
        if kind == "mup":
            worst = found.worst()
            print(f"{name}: {f'FAILED: {worst.diagnosis}' if worst else 'passed'}")
    return 0 if passed else 1


@dataclass(frozen=True)
class _Task:
    """What is checked.

    Args:
        base: Arguments of ``dopr fit`` that all networks share.
        config: What they amount to.
        keywords: The network's scaled keywords, by width.
        arms: Optimizers.
        seeds: Of the initial values.
        project: Whose policy and data.
    """

    base: tuple[str, ...]
    config: dict[str, Any]
    keywords: dict[int, dict[str, Any]]
    arms: list[Arm]
    seeds: list[int]
    project: Project


class _Subject:
    """One optimizer on one parametrisation: policies of every width, on one batch of the configuration's data."""

    def __init__(self, task: _Task, arm: Arm, parametrization: Parametrization, damping: float) -> None:
        from dopr_lightning.callback import DoPr

        narrowest = next(iter(task.keywords.values()))
        network = [*network_arguments(narrowest), *mup_arguments(parametrization, narrowest)]
        cli = build([*task.base, *arm.arguments(None, damping), *network], task.project)
        self.keywords = task.keywords
        self._class = type(cli.model)
        self.dopr: Mapping[str, Any] | None = next(
            (callback.options for callback in cli.trainer.callbacks if isinstance(callback, DoPr)), None
        )
        self._config = {key: value for key, value in cli.model.hparams.items() if key != "_instantiator"}
        # Beside the network: an algorithm may look at its numbers as it is made. A project's policy may have its own.
        self._made = {"algorithm": cli.model.algorithm} if "algorithm" in self._config else {}
        self._device = cli.trainer.strategy.root_device
        self._statistics = cli.datamodule.statistics()
        self._batch = next(iter(cli.datamodule.train_dataloader()))

    def try_widths(self) -> None:
        """Build every width without memory.

        Raises:
            UserError: The network cannot be so wide.
        """
        for width in self.keywords:
            try:
                with torch.device("meta"):
                    self._policy(width, mup=None, **self._made)
            except (UserError, ValueError) as error:
                raise UserError(f"--widths {width}: {error}") from error

    def build(self, width: int) -> tuple[nn.Module, Optimizer]:
        """For :func:`coordinate_check`: the rate is the configured one from the first step on."""
        from dopr_lightning.optim import make_optimizer

        policy = self._policy(width)
        policy.fit_normalizers(self._statistics)
        policy.to(self._device)
        return policy, make_optimizer(policy, **policy.optimizer_arguments)

    def loss(self, policy: Any) -> Tensor:
        """The policy's own; without a Trainer its step is 0 for ever, and so its noise is the same."""
        from lightning.fabric.utilities.apply_func import move_data_to_device

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*reference is not registered on the model.*")
            return policy.training_step(move_data_to_device(self._batch, self._device), 0)

    def _policy(self, width: int, **changes: Any) -> Any:
        from lightning.pytorch.cli import instantiate_module

        config = copy.deepcopy(self._config) | changes
        config["network"].setdefault("init_args", {}).update(self.keywords[width])
        return instantiate_module(self._class, config)


def _task(options: Any, overrides: Sequence[str], project: Project) -> _Task:
    """Everything that can be wrong without building anything."""
    from dopr_lightning.training import resolve

    seeds = seed_numbers(options.seeds)
    if options.steps < 1 or options.windows < 1:
        raise UserError(f"--steps and --windows must be at least 1, got {options.steps} and {options.windows}")
    for name in ("damping", "tolerance"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name} must be positive, got {getattr(options, name)}")
    refuse_reserved(overrides, RESERVED, "a coordinate check")

    base = (
        *(f"--config={find_config(name)}" for name in options.config),
        *overrides,
        f"--data.batch_size={options.windows}",
    )
    config = resolve([*base, "--model.mup=null"], project)
    refuse_dopr(config)
    arms = parse_arms(options.optimizers)  # modules that the configuration names may have added to BASES
    network = config["model"]["network"]
    scales = network_scales(network["class_path"])
    configured = size(network["init_args"][scales[0]])
    if options.widths is None:
        widths = [round(configured * NARROWEST * 2**k) for k in range(round(math.log2(WIDEST / NARROWEST)) + 1)]
        if configured % round(1 / NARROWEST):
            raise UserError(f"an eighth of {scales[0]} {configured} is no whole number; name --widths, three or more")
    else:
        widths = sorted(numbers("--widths", options.widths, int))
    if len(widths) < 3 or widths[0] < 1:
        raise UserError(f"--widths {options.widths}: an exponent needs three or more, each at least 1; 64,128,256,512")
    keywords = {width: scaled(network["init_args"], scales, width) for width in widths}
    return _Task(base, config, keywords, arms, seeds, project)


def _parser(command: str) -> Parser:
    parser = options_parser(
        command,
        "coord-check",
        description="Train a configuration's network for a few steps at several widths on one small batch, and measure "
        "how its activations and updates depend on the width. Under muP they must not: a learning rate, initial values "
        "or an architecture that do not follow its rules show as an exponent, and the exit status is 1. Any option of "
        f"'{command} fit' may follow (--model.optimizer.lr 1e-3).",
        example="--config humanoid.yaml --optimizers dopr-adamw,dopr-muon --output runs/check",
    )
    parser.add_argument(
        "--optimizers",
        default="adamw,dopr-adamw,dopr-muon",
        help=f"comma-separated, as in {command} compare; default: %(default)s",
    )
    parser.add_argument(
        "--widths",
        help="comma-separated, three or more over a factor of 16 say; the narrowest is muP's base. Of a network with "
        "several sizes, the first, and the others in proportion. Default: five, from an eighth of the configuration's "
        "width to twice it",
    )
    parser.add_argument("--steps", type=int, default=4, help="of training; default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="of the initial values, averaged over; default: %(default)s")
    parser.add_argument(
        "--windows",
        type=int,
        default=8,
        help="of data in the batch. Few: exponents are those of layers wider than the batch has rows; "
        "default: %(default)s",
    )
    parser.add_argument("--standard", action="store_true", help="show the standard parametrisation beside muP")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the exponents; default: %(default)s")
    parser.add_argument("--damping", type=float, default=0.01, help="of the dopr arms; default: %(default)s")
    parser.add_argument(
        "--output", type=output_folder, required=True, help="folder for results.json and coord_check.png"
    )
    return parser
