"""How good is a checkpoint? Policy, demonstrations and environment are those it says it was trained with."""

from __future__ import annotations

import logging
import tempfile
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader

from dopr_lightning import checkpoint
from dopr_lightning.configuration import packaged_configs, reason
from dopr_lightning.console import Narrator
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.deploy import image_sizes, rebuild, speed
from dopr_lightning.errors import Parser, UserError
from dopr_lightning.rollout.callback import RolloutEvaluation
from dopr_lightning.rollout.workers import env_pool
from dopr_lightning.training import quiet

log = logging.getLogger(__name__)


def run(verb: str, arguments: Sequence[str], command: str = "dopr") -> None:
    """Run ``dopr validate --ckpt FILE`` or ``dopr test --ckpt FILE``.

    Args:
        verb: ``"validate"`` or ``"test"``.
        arguments: With ``--ckpt``; further ones change rollouts, trainer, or where the demonstrations lie.
        command: What is typed before the verb.

    Raises:
        UserError: The checkpoint cannot be rebuilt, or is not of what is here.
    """
    quiet()
    prog = f"{command} {verb}"
    found = Parser(prog=prog, add_help=False, allow_abbrev=False)
    found.add_argument("--ckpt", required=True)
    path = found.parse_known_args(arguments)[0].ckpt
    held = checkpoint.read(path)
    record = held[checkpoint.KEY]

    options = _parsed(prog, arguments, record)
    checkpoint.check_versions(record, options.accept_versions)
    data = RecordedData(record, _demonstrations(record, options))
    if data.environment is not None:
        with env_pool(data.environment, 1, 1) as pool:
            pool.describe()
    policy = rebuild(path, held)
    if data.demonstrations is None:
        policy.validation_step = policy.test_step = _nothing  # type: ignore[method-assign]
    given = options.trainer.pop("callbacks", None) or []
    given = given if isinstance(given, list) else [given]
    callbacks = [options.rollout, Narrator(bar=False), Stopwatch(image_sizes(record)), *given]
    trainer = Trainer(**options.trainer.as_dict(), callbacks=callbacks)
    # With its path, or on a SLURM machine Lightning would take the weights of a preempted run that lies here.
    getattr(trainer, verb)(policy, datamodule=data, ckpt_path=path)


class RecordedData(LightningDataModule):
    """What a checkpoint says of its data, and the held-out windows where the demonstrations are here.

    Args:
        record: Of the checkpoint.
        demonstrations: Those it was trained on; ``None`` where they are not on this machine.
    """

    def __init__(self, record: Mapping[str, Any], demonstrations: DemonstrationData | None) -> None:
        super().__init__()
        self.record = record
        self.demonstrations = demonstrations

    @property
    def environment(self) -> EnvironmentSpec | None:
        """The environment to roll the policy out in, if the checkpoint has one."""
        return checkpoint.environment_of(self.record)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out windows; else one empty batch, for Lightning has no epoch without, and so no rollouts."""
        if self.demonstrations is None:
            return DataLoader([{}], batch_size=None)  # type: ignore[arg-type]
        self.demonstrations.trainer = self.trainer
        return self.demonstrations.val_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """As in validation."""
        return self.val_dataloader()


class Stopwatch(Callback):
    """Says how fast the policy acts, where it was evaluated.

    Args:
        image_sizes: Height and width of each camera's images.
    """

    def __init__(self, image_sizes: Mapping[str, tuple[int, int]]) -> None:
        self.image_sizes = image_sizes

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it."""
        with pl_module.gathered():  # type: ignore[operator]
            found = speed(pl_module, self.image_sizes)  # type: ignore[arg-type]
        if trainer.is_global_zero:
            print(found)

    on_test_end = on_validation_end


def _nothing(batch: Any, batch_idx: int) -> None:
    """The step on an empty batch."""


def _parsed(prog: str, arguments: Sequence[str], record: Mapping[str, Any]) -> Namespace:
    """The options, with trainer's and rollout's objects made; the checkpoint's own values are the defaults."""
    parser = LightningArgumentParser(
        prog=prog,
        description="Judge a checkpoint: policy, data and environment are those it was trained with",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", action=ActionConfigFile)
    parser.add_argument("--ckpt", type=str)
    parser.add_argument("--accept_versions", type=bool, default=False)
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_class_arguments(RolloutEvaluation, "rollout")
    parser.add_argument("--data", type=dict)
    one = {"devices": 1, "enable_checkpointing": False, "enable_model_summary": False}
    parser.set_defaults({f"trainer.{name}": value for name, value in one.items()})
    with tempfile.TemporaryDirectory() as folder:
        recorded = Path(folder) / "recorded.yaml"
        kept = {name: record["config"][name] for name in ("rollout", "data")}
        kept["trainer"] = {"precision": record["config"]["trainer"].get("precision")}
        recorded.write_text(yaml.safe_dump(kept))
        try:
            config = parser.parse_args([f"--config={recorded}", *packaged_configs(arguments)])
            return parser.instantiate_classes(config)
        except (ArgumentError, ValueError) as error:
            raise UserError(f"{reason(error)}; with --ckpt can be given: --trainer.*, --rollout.*, --data.*") from error


def _demonstrations(record: Mapping[str, Any], options: Namespace) -> DemonstrationData | None:
    """Those the checkpoint was trained on, if they are here.

    Raises:
        UserError: Others are here.
    """
    try:
        data = instantiate(checkpoint.class_of(record, "data"), options.data)
        environment, _ = data.environment, data.provenance
    except (UserError, ArgumentError) as error:
        log.warning("the held-out loss is left out, for want of the demonstrations: %s", reason(error))
        return None
    checkpoint.check_environment(record, environment)
    checkpoint.check_data(record, data)
    return data


def instantiate(cls: type[DemonstrationData], config: Mapping[str, Any]) -> DemonstrationData:
    """The data module of a recorded configuration."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(cls, "data", subclass_mode="class_path" in config)
    return parser.instantiate_classes(parser.parse_object({"data": dict(config)})).data
