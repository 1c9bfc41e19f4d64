"""What a person reads in the terminal while a policy is trained and judged: what, how far, how good, and where."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from dopr_lightning.callback import DoPr
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.rollout.callback import RolloutEvaluation
from dopr_lightning.saving import LastCheckpoint, run_folder
from dopr_lightning.words import METRIC_LABELS, duration

QUIET_PARTS = 10
"""Without a terminal there is no bar; then so many lines tell how far the training is."""


class Narrator(Callback):
    """Says at the start what is trained on what, at each evaluation how good it is, and in the end where results are.

    Args:
        bar: Whether a progress bar shows how far the training is.
    """

    def __init__(self, bar: bool) -> None:
        self.bar = bar
        self._since = (0.0, 0)
        self._said = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what is about to happen, now that nothing stands in its way."""
        self._since = (time.perf_counter(), trainer.global_step)
        self._said = trainer.global_step
        folder = run_folder(trainer)  # a collective call: on every rank
        if not trainer.is_global_zero or not isinstance(pl_module, PolicyModule):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        task, held = data.environment, data.provenance
        optimizer = pl_module.optimizer_config
        size = sum(p.numel() for p in pl_module.network.parameters())
        dopr = any(isinstance(callback, DoPr) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        limits = (trainer.max_steps, "steps"), (trainer.max_epochs or -1, "epochs")
        # max_time alone may end it.
        length = next((f"{limit} {unit}" for limit, unit in limits if limit > 0), "any number of steps")
        devices = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
        judged = (
            f"{task.title}, judged by {METRIC_LABELS[task.metric]} over at most {task.max_steps} steps"
            if task
            else "not judged by rollouts yet"
        )
        print(
            f"task:      {judged}; "
            f"{held['train_episodes']} demonstrations ({held['train_steps']} steps), "
            f"{held['validation_episodes']} more held out, from {held['source']}\n"
            f"policy:    {type(pl_module.algorithm).__name__}, {type(pl_module.network).__name__} of {size:,} "
            f"parameters; observes {pl_module.observe}, predicts {pl_module.horizon}, acts for {pl_module.act} steps\n"
            f"optimizer: {'DoPr-' if dopr else ''}{optimizer.base}, learning rate {optimizer.lr:g}, {length} of "
            f"{data.batch_size} windows on {devices}\n"
            f"results:   {'none are kept of a fast_dev_run' if trainer.fast_dev_run else folder}",  # type: ignore[attr-defined]
            flush=True,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        """Without a bar, say now and then how far it is."""
        step, steps = trainer.global_step, trainer.max_steps
        part = max(1, steps // QUIET_PARTS)
        # Batches of one step pass by with the same count, and manual optimization may leave some out.
        if self.bar or steps <= 0 or not trainer.is_global_zero or step // part == self._said // part:
            return
        self._said = step
        began, first = self._since
        left = (time.perf_counter() - began) / (step - first) * (steps - step)
        loss = outputs.get("loss")  # none of manual optimization, or of a batch that was passed over
        said = "" if loss is None else f"training loss {float(loss):.4g}, "
        print(f"step {step} of {steps}: {said}about {duration(left)} left", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how good the averaged weights are, on the seeds that choose a checkpoint."""
        if not trainer.sanity_checking:
            fitting = trainer.state.fn == TrainerFn.FITTING
            self._say(trainer, f"step {trainer.global_step}" if fitting else "validated", "val/loss")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how good they are on the seeds that are reported, and where everything is."""
        folder = run_folder(trainer)  # a collective call: on every rank
        self._say(trainer, "reported", "test/loss")
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        savers = (saver for saver in trainer.checkpoint_callbacks if isinstance(saver, LastCheckpoint))
        where = [f"checkpoint: {saver.last_model_path}" for saver in savers if saver.last_model_path]
        drawn = [logger.log_dir for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        where.append(f"curves: tensorboard --logdir {drawn[0]}" if drawn else f"logged: {folder}")
        print("   ".join(where), flush=True)

    def _say(self, trainer: L.Trainer, what: str, loss: str) -> None:
        if not trainer.is_global_zero:
            return
        values = {name: value.item() for name, value in trainer.callback_metrics.items()}
        said = [f"held-out loss {values[loss]:.4g}"] if loss in values else []
        judge = next((c for c in trainer.callbacks if isinstance(c, RolloutEvaluation)), None)  # type: ignore[attr-defined]
        if judge is not None and judge.latest:
            metric = trainer.datamodule.environment.metric  # type: ignore[attr-defined]
            seeds = [episode.seed for episode in judge.latest]
            said.append(f"{METRIC_LABELS[metric]} {values[f'rollout/{metric}']:.4g} in {_rollouts(seeds)}")
            low, high = values["rollout/ci95_low"], values["rollout/ci95_high"]
            if not math.isnan(low):  # one return says nothing of the spread
                said.append(f"95 % interval {low:.4g} .. {high:.4g}")
            if restarts := sum(episode.restarts > 0 for episode in judge.latest):
                said.append(f"{restarts} of them begun again after a crash")
        print(f"{what}: {', '.join(said)}", flush=True)


def _rollouts(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"1 rollout (seed {seeds[0]})"
    return f"{len(seeds)} rollouts (seeds {seeds[0]} to {seeds[-1]})"


class StepBar(RichProgressBar):
    """Lightning's, for a run that a number of steps ends: one bar over all of them, in place of one per epoch."""

    @property
    def total_train_batches(self) -> int | float:
        """What the bar runs up to."""
        return self.trainer.max_steps if self._by_steps else super().total_train_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the bar of the epoch before."""
        if not self._by_steps or self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        done = trainer.global_step - 1 if self._by_steps else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """As Lightning's, without the number of the run's folder."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training  " if self._by_steps else super()._get_train_description(current_epoch)

    @property
    def _by_steps(self) -> bool:
        return self.trainer.max_steps > 0
