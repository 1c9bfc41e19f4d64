"""What do the commands that train a configuration many times have in common? Their options, and a first look."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dopr_lightning.errors import Parser, UserError, did_you_mean
from dopr_lightning.optim.schedules import check_schedule
from dopr_lightning.proxy import dopr_of

if TYPE_CHECKING:
    from dopr_lightning.data.environment import EnvironmentSpec
    from dopr_lightning.project import Project

T = TypeVar("T", int, float)


def options_parser(command: str, verb: str, *, description: str, example: str) -> Parser:
    """A parser of the command's own options, with those that all such commands have.

    Args:
        command: What is typed before the verb.
        verb: The command's name.
        description: What it does.
        example: Its options, as one would type them.
    """
    parser = Parser(
        prog=f"{command} {verb}",
        allow_abbrev=False,
        description=description,
        epilog=f"example: {command} {verb} {example}",
    )
    parser.add_argument(
        "--config", action="append", required=True, help=f"as in {command} fit; may be given several times"
    )
    return parser


def parse(parser: Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and those of ``dopr fit`` that follow.

    Raises:
        UserError: An option is a misspelling of the command's own.
    """
    options, overrides = parser.parse_known_args(arguments)
    own = [name for action in parser._actions for name in action.option_strings]
    for flag in (override.partition("=")[0] for override in overrides):
        if "." not in flag and (hint := did_you_mean(flag, own)):  # those of fit have a dot
            raise UserError(f"unrecognized {flag}{hint} see: {parser.prog} --help")
    return options, overrides


def numbers(flag: str, text: str, kind: type[T]) -> list[T]:
    """The numbers in the text of a comma-separated option.

    Raises:
        UserError: They are none, or one is there twice.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: give numbers separated by commas, 0,1,2") from None
    if len(set(found)) < len(found):
        raise UserError(f"{flag} {text}: a number is given twice")
    return found


def seed_numbers(text: str) -> list[int]:
    """The seeds in the text of ``--seeds``.

    Raises:
        UserError: One is none.
    """
    seeds = numbers("--seeds", text, int)
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"--seeds {text}: a seed is a number from 0 to {2**32 - 1}")
    return seeds


def refuse_reserved(overrides: Sequence[str], reserved: Mapping[str, str], what: str) -> None:
    """Refuse options of ``dopr fit`` that the command sets itself.

    Args:
        overrides: The options given.
        reserved: Those that are not the user's, and how the command is told.
        what: The command, ``"a sweep"``.

    Raises:
        UserError: Names the option and what to use.
    """
    for flag in (override.partition("=")[0] for override in overrides):
        if flag in reserved:
            raise UserError(f"{flag} is what {what} sets itself; use {reserved[flag]}")


def refuse_dopr(config: Mapping[str, Any], flag: str = "--optimizers") -> None:
    """Refuse a configuration with DoPr where an option says who has it.

    Args:
        config: The whole configuration, as plain values.
        flag: That option.

    Raises:
        UserError: It is there.
    """
    if dopr_of(config) is not None:
        raise UserError(f"the configuration brings DoPr; leave it out there, {flag} says who has it")


def quiet_building() -> None:
    """Silence what Lightning says of seeds and devices while everything is built: it is about no run."""
    from dopr_lightning.training import quiet

    quiet()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def build(arguments: Sequence[str], project: Project) -> Any:
    """Policy, data and trainer of these arguments of ``dopr fit``: a CLI that runs nothing and logs nowhere."""
    from dopr_lightning.training import CLI

    return CLI([*arguments, "--trainer.logger=false"], run=False, project=project)


def network_scales(class_path: str) -> Sequence[str]:
    """Keywords of a network that scale with the width, the width first.

    Raises:
        UserError: The network does not say.
    """
    module, _, name = class_path.rpartition(".")
    scales = getattr(getattr(importlib.import_module(module), name), "scales", ())
    if not scales:
        raise UserError(
            f"{name} does not say which of its keywords scale with the width; give it a class attribute, "
            "scales = ('width',)"
        )
    return scales


def check_task(cli: Any, rollouts: str | None) -> dict[str, Any]:
    """Find out what every run would otherwise find out for itself, and say what the task is.

    Args:
        cli: With the policy and the data.
        rollouts: The command that judges by rollouts, ``"a comparison"``; None without any.

    Returns:
        For results.json: what is trained on and judged by.

    Raises:
        UserError: The source names no environment, it is not installed, or the data do not fit it or the policy.
        ValueError: The run is too short for its schedule.
    """
    from dopr_lightning.rollout.evaluate import check_fit

    environment: EnvironmentSpec | None = cli.datamodule.environment
    if rollouts:
        if environment is None:
            source = type(cli.datamodule.source).__name__
            raise UserError(
                f"{rollouts} judges by rollouts, and {source} names no environment; give it one to roll out in"
            )
        check_fit(cli.model, environment, getattr(cli.datamodule, "image_sizes", {}))
    cli.datamodule.train_dataloader()
    optimizer, steps = cli.model.optimizer_config, cli.trainer.max_steps
    if steps > 0:  # else the epochs decide
        check_schedule(optimizer.schedule, optimizer.warmup_steps, steps)
    provenance = cli.datamodule.provenance
    first_seed = cli.config.rollout.first_seed
    if first_seed is None:
        first_seed = environment.first_seed if environment else 0
    return {
        "id": environment.title if environment else provenance["source"],
        "metric": environment.metric if environment else None,
        "first_seed": first_seed,
        "steps": steps,
        "batch_size": cli.datamodule.batch_size,
        "train_episodes": provenance["train_episodes"],
        "data": provenance,
    }
