"""What a trial does: train, then judge by rollouts."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TextIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from dopr_lightning.experiments.trial import DIVERGED, DivergedError, Record, Report, Trial, note_settings, write_json
from dopr_lightning.preemption import supersede_preempted_checkpoint
from dopr_lightning.rollout.callback import RolloutEvaluation
from dopr_lightning.training import CLI, quiet
from dopr_lightning.versions import versions


def run_trial(trial: Trial, report: Report) -> Record:
    """Train, from the last checkpoint if there is one, then judge the EMA weights by rollouts on fixed seeds.

    Everything that would be printed goes to ``log.txt`` in the trial's folder.

    Raises:
        DivergedError: The training loss, or what was trained, is not finite. That is kept as a record is.
    """
    note_settings(trial.folder, trial.settings)
    try:
        with (trial.folder / "log.txt").open("a") as log, _output_to(log):
            record = _train_and_judge(trial, report)
    except DivergedError as error:
        said = {"message": str(error), "settings": trial.settings, "versions": versions()}
        write_json(said, trial.folder / DIVERGED)
        _drop_checkpoints(trial)
        raise
    write_json(asdict(record), trial.folder / "record.json")
    _drop_checkpoints(trial)
    return record


def _drop_checkpoints(trial: Trial) -> None:
    if not trial.keep_checkpoints:
        shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Send what is printed to ``log``, and what Lightning logs: its handlers keep the stream they were made with."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    handlers = [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    streams = [handler.setStream(log) for handler in handlers]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


class _Progress(Callback):
    """Reports steps, watches the loss, and keeps the time spent on training alone, also over interruptions."""

    def __init__(self, name: str, report: Report) -> None:
        self._name, self._report = name, report
        self.trained = False
        self.seconds = 0.0
        self.diverged = torch.tensor(False)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.trained = True
        steps = trainer.estimated_stepping_batches  # infinite where time decides
        self._steps = trainer.max_steps if math.isinf(steps) else int(steps)
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seconds += time.perf_counter() - self._since

    def on_validation_end(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        if "loss" in outputs:  # not of manual optimization, nor of a batch that was passed over
            # On the device: it is read, and waited for, with every report only.
            self.diverged = self.diverged.to(module.device) | ~outputs["loss"].isfinite()
        if trainer.global_step % max(1, self._steps // 100) == 0:
            self._report(self._name, trainer.global_step, self._steps)
            if self.diverged:
                raise DivergedError(
                    f"diverged: the training loss is not finite, by step {trainer.global_step} of {self._steps}"
                )

    def on_train_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._since

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


def _train_and_judge(trial: Trial, report: Report) -> Record:
    quiet()
    cli = CLI(
        [
            *trial.arguments,
            f"--seed_everything={trial.seed}",
            f"--rollout.first_seed={trial.first_seed}",
            f"--rollout.report_episodes={trial.episodes}",
            f"--checkpoint.dirpath={trial.folder / 'checkpoints'}",
            f"--trainer.default_root_dir={trial.folder}",
            "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
            f"--trainer.logger.save_dir={trial.folder}",
            "--trainer.logger.name=",
            "--trainer.logger.version=",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ],
        run=False,
        project=trial.project,
    )
    cli.parser.save(cli.config, str(trial.folder / "config.yaml"), skip_check=True, overwrite=True)
    trainer, progress = cli.trainer, _Progress(trial.name, report)
    trainer.callbacks.append(progress)  # type: ignore[attr-defined]
    last = trial.folder / "checkpoints" / "last.ckpt"
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
        # Stopped between its last step and its record, there was nothing to train, and so nobody put the average in
        # place.
        finished = None if progress.trained else last
        supersede_preempted_checkpoint(trainer)
        (metrics,) = trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=finished, verbose=False)
    except DivergedError:
        raise
    except Exception as error:
        # Whatever was the first to stumble over them: a preconditioner, a rollout.
        if progress.diverged or not all(parameter.isfinite().all() for parameter in cli.model.parameters()):
            raise DivergedError(f"diverged: {error}") from error
        raise
    if not math.isfinite(metrics["test/loss"]):
        raise DivergedError("diverged: the validation loss is not finite")
    rollout = next(c for c in trainer.callbacks if isinstance(c, RolloutEvaluation))  # type: ignore[attr-defined]
    return Record(
        val_loss=metrics["test/loss"],
        episodes=[episode.value for episode in rollout.latest],
        train_seconds=progress.seconds,
        settings=trial.settings,
        versions=versions(),
        steps=trainer.global_step,
    )
