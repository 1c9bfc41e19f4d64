"""When does a run leave that SLURM asks to? Between two steps, all processes at once."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment

from dopr_lightning.internals import cluster_environment, next_preempted_checkpoint, preempted_checkpoint

AGREE_EVERY = 8
"""Steps after which several processes ask each other whether one was asked: that waits for the device."""


class Preemption(Callback):
    """Puts off what Lightning does at SLURM's signal until a step is complete, with all its micro-batches.

    Lightning saves a checkpoint and has the job requeued as soon as the signal arrives: in the middle of a step, when
    some weights may have been updated and others not, and on each process in another step. In a validation, with its
    rollouts, the signal waits for the end. Without SLURM, or without ``auto_requeue``, this does nothing.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._leave: Any = None
        self._asked: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handler."""
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            assert environment.requeue_signal is not None
            self._signal, self._asked = environment.requeue_signal, None
            self._leave = signal.signal(self._signal, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let Lightning do what it would have done, if it is time."""
        if self._signal is None or batch_idx % trainer.accumulate_grad_batches:
            return
        asked = self._asked is not None
        if trainer.world_size > 1:
            due = trainer.global_step % AGREE_EVERY == 0
            asked = due and trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self._asked = None
            self._leave(self._signal, None)
            drop_older(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put Lightning's handler back: after training there are no steps to wait for."""
        if self._signal is not None:
            signal.signal(self._signal, self._leave)
            self._signal = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = signum


def supersede_preempted_checkpoint(trainer: Trainer) -> None:
    """After a fit that was preempted under SLURM: make its end what Lightning finds there.

    Lightning looks for the checkpoint of a preemption whenever none is named, also for a test: it would judge the
    weights that the run had then. And the same command, should it be run again, has nothing left to do.
    """
    if SLURMEnvironment.detect() and preempted_checkpoint(trainer) is not None:
        trainer.save_checkpoint(next_preempted_checkpoint(trainer))
        drop_older(trainer)


def drop_older(trainer: Trainer) -> None:
    """Remove what earlier preemptions left, once a newer checkpoint is complete: the newest is what is gone on from."""
    found = (
        (int(match[1]), path)
        for path in Path(trainer.default_root_dir).glob("hpc_ckpt_*")
        if (match := re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", path.name))
    )
    for _, path in sorted(found)[:-1]:
        trainer.strategy.remove_checkpoint(path)  # on rank zero
