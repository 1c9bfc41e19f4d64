"""From YAML and command line to trainer, policy and data: LightningCLI, with what every run here has."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from dopr_lightning.configs import locate
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.policies.ema import EMA
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.rollout.callback import RolloutEvaluation

__all__ = ["CLI", "quiet", "resolve", "run"]


class CLI(LightningCLI):
    """A policy on demonstrations, with EMA weights, rollouts and checkpoints.

    The policy's sizes and window come from the data, and one ``seed_everything`` seeds weights, batches and noise.
    DoPr is an ordinary callback of the trainer: ``dopr.yaml`` adds it.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True, **options: Any) -> None:
        super().__init__(
            PolicyModule,
            DemonstrationData,
            args=None if args is None else list(_packaged_configs(args)),
            run=run,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=_SaveConfig if run else None,
            parser_kwargs={"prog": "dopr"},
            **options,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs that are Trainer methods."""
        return {verb: {"model", "dataloaders", "datamodule"} for verb in ("validate", "test")} | {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks every run has, and tie together what must agree."""
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(RolloutEvaluation, "rollout")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        # The last state to resume from, at every validation: rollouts are noisy, so choosing the best is left to you.
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{step}"})
        for name in ("observation_dim", "action_dim"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for name in ("observe", "horizon", "act"):
            parser.link_arguments(f"data.{name}", f"model.{name}")
        for room in ("data", "model"):
            parser.link_arguments("seed_everything", f"{room}.seed", compute_fn=int)


class _ParseOnly(CLI):
    def instantiate_classes(self) -> None:
        pass


def resolve(arguments: Sequence[str]) -> dict[str, Any]:
    """The whole configuration that ``arguments`` (of a verb) amount to, as plain values, without building anything."""
    cli = _ParseOnly(arguments, run=False)
    return json.loads(cli.parser.dump(cli.config, format="json", skip_validation=True, skip_link_targets=False))


class _SaveConfig(SaveConfigCallback):
    """Beside the logs; a second run in the same folder goes into its own ``version_N``, so nothing is overwritten."""


def run(verb: str, arguments: Sequence[str]) -> None:
    """Run ``dopr fit``, ``validate`` or ``test``."""
    quiet()
    CLI([verb, *arguments])


def quiet() -> None:
    """Silence what says nothing about the user's run."""

    class NoTips(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return "Tip:" not in record.getMessage()

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(NoTips())
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")


def _packaged_configs(args: Sequence[str]) -> Iterator[str]:
    """Resolve ``--config NAME`` to a file of the package where there is none of that name here."""
    yield from args[:1]
    for flag, value in pairwise(args):
        yield locate(value) if flag in ("--config", "-c") else value
