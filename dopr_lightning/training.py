"""From YAML and command line to trainer, policy and data: LightningCLI, with what every run here has."""

from __future__ import annotations

import gc
import json
import logging
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch.distributed.device_mesh import DeviceMesh

from dopr_lightning import checkpoint, proxy
from dopr_lightning.configuration import NOTHING_TO_JUDGE, packaged_configs, reason, reason_with_place
from dopr_lightning.console import Narrator, StepBar
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError, is_remote, output_folder
from dopr_lightning.internals import preempted_checkpoint
from dopr_lightning.policies.ema import EMA
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.preemption import Preemption, supersede_preempted_checkpoint
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.rollout.callback import RolloutEvaluation
from dopr_lightning.saving import LastCheckpoint, run_folder

DESCRIPTIONS = {
    "fit": "Train a policy; configurations stack, and any value can be set after them. "
    "Example: {command} fit --config walker2d.yaml --config dopr.yaml --trainer.max_steps 500",
    "validate": "Held-out loss and rollouts of a checkpoint's EMA weights, on the seeds that choose one. With --ckpt "
    "the checkpoint says all the rest; --rollout.*, --trainer.* and --data.* may follow. "
    "Example: {command} validate --ckpt last.ckpt",
    "test": "Held-out loss and rollouts of a checkpoint's EMA weights, on the seeds that are reported. With --ckpt the "
    "checkpoint says all the rest; --rollout.*, --trainer.* and --data.* may follow. "
    "Example: {command} test --ckpt last.ckpt --rollout.report_episodes 100",
}


# Where other values came from, and what a person puts up with today.
NOT_SETTINGS = ("mup", "accept_versions")


class CLI(LightningCLI):
    """A policy on demonstrations, with EMA weights, rollouts and checkpoints.

    The policy's sizes and window come from the data, and one ``seed_everything`` seeds weights, batches and noise.
    DoPr is an ordinary callback of the trainer: ``dopr.yaml`` adds it.

    Args:
        args: The command line's; None for ``sys.argv``.
        run: Whether there is a verb first, which is then run; without, everything is only built.
        project: Whose policy and data.

    Raises:
        UserError: A mistake in the arguments or a configuration file, in one line where jsonargparse prints pages.
    """

    def __init__(self, args: Sequence[str] | None = None, *, run: bool = True, project: Project = LIBRARY) -> None:
        self.project = project
        texts = {verb: {"description": text.format(command=project.command)} for verb, text in DESCRIPTIONS.items()}
        try:
            super().__init__(
                project.policy or PolicyModule,
                project.data or DemonstrationData,
                args=None if args is None else list(packaged_configs(args)),
                run=run,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=_SaveConfig if run else None,
                # An abbreviation would be a misspelling that is guessed at.
                parser_kwargs={"prog": project.command, "exit_on_error": False, "allow_abbrev": False} | texts,
            )
        except ArgumentError as error:
            words = sys.argv[1:] if args is None else args
            verb = next((word for word in words[:1] if word in DESCRIPTIONS), "fit")  # `resolve` has options only
            parser = getattr(self, "_subcommand_parsers", {}).get(verb, self.parser)
            known = [action.dest for action in parser._actions]
            said = reason_with_place(error, words, known)
            raise UserError(
                f"{said}{'' if said.endswith('?') else ';'} see: {project.command} {verb} --help"
            ) from error

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, fill in what a sweep found, and refuse a ``--ckpt_path`` that is no checkpoint before it is opened.

        Raises:
            UserError: Nothing can be written where the run is to be; the checkpoint is missing, or is not what
                ``torch.save`` writes; the sweep is of another configuration, or a value is given that it gives too.
        """
        super().parse_arguments(parser, args)
        subcommand = self.config.get("subcommand")
        config = self.config[subcommand] if subcommand else self.config
        if isinstance(config["trainer.callbacks"], Namespace):  # one, which Lightning takes without a list
            config["trainer.callbacks"] = [config["trainer.callbacks"]]
        if config.get("mup.from_sweep") is not None:
            self._take_from_sweep(config, sys.argv[1:] if args is None else args)
        # A run's checkpoints are first written at its first validation; who judges one only reads where they lie.
        written = ["trainer.default_root_dir", *(["checkpoint.dirpath"] if subcommand in (None, "fit") else [])]
        for place in filter(None, map(config.get, written)):
            if not is_remote(place):  # checkpoints may be, and `run_folder` looks where the rest goes
                output_folder(place)
        if subcommand:
            self._choose_what_is_shown(config["trainer"])
        path = config.get("ckpt_path")
        # Lightning has words of its own for what it finds, and reads what is remote.
        if path not in (None, "best", "last", "hpc") and not is_remote(path):
            checkpoint.require_file(path, "--ckpt_path")
        elif path is None and subcommand in ("validate", "test"):
            raise UserError(NOTHING_TO_JUDGE)

    def _choose_what_is_shown(self, trainer: Namespace) -> None:
        """Our own words, and a bar where there is a terminal, unless the user chose otherwise."""
        listed = [str(callback.class_path) for callback in trainer.callbacks or []]
        if trainer.enable_progress_bar is None:
            trainer.enable_progress_bar = sys.stdout.isatty()
        if trainer.enable_model_summary is None:
            trainer.enable_model_summary = False
        shown: list[Callback] = [Narrator(bar=trainer.enable_progress_bar)]
        if trainer.enable_progress_bar and not any(name.endswith("ProgressBar") for name in listed):
            shown.append(StepBar())
        self.trainer_defaults = self.trainer_defaults | {"callbacks": shown}

    def _take_from_sweep(self, config: Namespace, args: Sequence[str]) -> None:
        """Put a sweep's numbers into the configuration, which then no longer depends on the sweep's folder."""
        proxy.refuse_given(args)
        folder = Path(config["mup.from_sweep"])
        found = proxy.recommended(folder, self.plain_config())
        config["mup.from_sweep"] = None
        config["model.optimizer.lr"] = found["lr"]
        config["model.optimizer.weight_decay"] = found["weight_decay"]
        config["model.optimizer.lr_by_role"] = found["lr_by_role"]
        config["model.mup"] = Namespace(found["mup"])
        if found["damping"] is not None:
            config["trainer.callbacks"][-1]["init_args.damping"] = found["damping"]

    def plain_config(self) -> dict[str, Any]:
        """The whole configuration of the verb as plain values."""
        text = self.parser.dump(self.config, format="json", skip_validation=True, skip_link_targets=False)
        verb, plain = self.config.get("subcommand"), json.loads(text)
        plain = plain[verb] if verb else plain
        plain = {key: value for key, value in plain.items() if key not in NOT_SETTINGS}
        return plain | ({"classes": self.project.classes} if self.project.classes else {})

    def instantiate_classes(self) -> None:
        """Build everything.

        Raises:
            UserError: A value is refused by what it is for.
        """
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UserError(reason(error)) from error
        accept = self._get(self.config, "accept_versions", default=False)
        self.trainer.callbacks.append(Preemption())  # type: ignore[attr-defined]
        self.trainer.callbacks.append(checkpoint.SelfDescription(self.plain_config(), accept))  # type: ignore[attr-defined]

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
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.add_argument(
            proxy.FLAG,
            type=str | None,
            default=None,
            help=f"the --output of a {self.project.command} sweep of this configuration: train with the learning rate, "
            "weight decay and damping it found on narrower networks, under its muP",
        )
        parser.add_argument(
            "--accept_versions",
            type=bool,
            default=False,
            help="go on from a checkpoint that was trained with another version of the simulator",
        )
        # The last state to resume from, at every validation and at the end. Rollouts are noisy, so choosing the best is
        # left to you.
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{step}"})
        for name in ("observation_dim", "action_dim"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for name in ("observe", "horizon", "act"):
            parser.link_arguments(f"data.{name}", f"model.{name}")
        for room in ("data", "model"):
            parser.link_arguments("seed_everything", f"{room}.seed", compute_fn=int)

    def after_fit(self) -> None:
        """Judge the final EMA weights by rollouts, on the seeds that are reported."""
        supersede_preempted_checkpoint(self.trainer)
        self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


class _ParseOnly(CLI):
    def instantiate_classes(self) -> None:
        pass


def resolve(arguments: Sequence[str], project: Project = LIBRARY) -> dict[str, Any]:
    """The whole configuration that ``arguments`` (of a verb) amount to, as plain values, without building anything.

    A project's own classes are named under ``"classes"``.
    """
    return _ParseOnly(arguments, run=False, project=project).plain_config()


class _SaveConfig(SaveConfigCallback):
    """Beside the logs; a second run in the same folder goes into its own ``version_N``, so nothing is overwritten.

    Under SLURM N is the job's number, which a requeued job keeps: it goes on in its folder.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file.

        Raises:
            UserError: Another run's file is there: without a logger there is no ``version_N``, and one may be told N.
        """
        if self.already_saved:  # by the fit that this is the test of
            return
        folder = run_folder(trainer)
        path = folder / self.config_filename
        held = trainer.strategy.broadcast(path.read_text() if trainer.is_global_zero and path.is_file() else None)
        mine = self.parser.dump(self.config, skip_none=False)
        requeued = preempted_checkpoint(trainer) is not None
        if held is not None and not (requeued and yaml.safe_load(held) == yaml.safe_load(mine)):
            way = "--trainer.default_root_dir" if trainer.logger is None else "version of the logger"
            raise UserError(f"{folder} holds another run ({self.config_filename}); choose another {way}")
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(mine)
        self.already_saved = True


def run(verb: str, arguments: Sequence[str], project: Project = LIBRARY) -> None:
    """Run ``dopr fit``, ``validate`` or ``test``."""
    quiet()
    joined = dist.is_initialized()
    # In a context of its own, which is dropped: jsonargparse leaves its parser in a variable, and all that was built.
    copy_context().run(CLI, [verb, *arguments], project=project)
    # Not after an error, where others may wait for this process: they learn of its end by it.
    if dist.is_initialized() and not joined:
        leave_groups()


def leave_groups() -> None:
    """End every process group, and with it the group's threads.

    Lightning leaves that to the interpreter's end, where a thread that then lets go of a tensor asks for an interpreter
    that is no more: now and then that aborts the process. A group's threads end with the last reference to it. One is
    in the policy, cut up, and one in each device mesh, which DTensor's caches hold.
    """
    gc.collect()
    for held in gc.get_objects():
        if type(held) is DeviceMesh:
            # Of some versions of torch; others look groups up by their names.
            getattr(held, "_pg_registry", {}).clear()
    dist.destroy_process_group()


def quiet() -> None:
    """Silence what says nothing about the user's run. Once or many times is the same: every trial calls it."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_no_tips)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor.*")
    # Logging counts steps over epochs.
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    # Every rank logs the same numbers of rollouts, of which each was run once; of held-out windows a few may repeat.
    warnings.filterwarnings("ignore", message=r".*recommended to use `self.log\('rollout/.*")
    warnings.filterwarnings("ignore", message=".*Using `DistributedSampler` with the dataloaders.*")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
    # Ours goes on with the batch that was next.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # Its last.ckpt is refused, of a run that does not go on with it.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule`.*")


def _no_tips(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return "Tip:" not in said and not said.startswith(("TPU available: False", "GPU available: False"))
