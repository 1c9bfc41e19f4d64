"""Which weights are evaluated? An exponential moving average of those trained, on Lightning's own callback."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dopr_lightning.errors import UserError


def ema_decay(n: int, decay: float, warmup_power: float) -> float:
    """Return the weight of the old average at update ``n`` = 0, 1, ...: min(decay, 1 - (1 + n)^-power).

    It is 0 at the first update, which copies. Until the limit is reached the average looks back over a
    growing share of the run, so the random initial weights fade even in a run shorter than 1 / (1 - decay).
    Diffusion Policy's schedule (its power is 0.75), as in diffusers' ``EMAModel(use_ema_warmup=True)``.
    """
    return min(decay, 1 - (1 + n) ** -warmup_power)


@torch.no_grad()
def ema_update(
    averages: Sequence[Tensor], current: Sequence[Tensor], n: Tensor | int, *, decay: float, warmup_power: float
) -> None:
    """Move ``averages`` towards ``current`` in place; both lists are of one dtype on one device.

    Integer buffers (counters) are copied: they have no average.
    """
    if averages[0].is_floating_point():
        # a + w (c - a) returns a itself when c equals a, so buffers that do not change do not drift.
        torch._foreach_lerp_(list(averages), list(current), 1 - ema_decay(int(n), decay, warmup_power))
    else:
        torch._foreach_copy_(list(averages), list(current))


class EMA(WeightAveraging):
    """Averages the weights after every optimizer step; validation, tests and checkpoints use the average.

    Lightning's ``WeightAveraging`` holds the average, writes it to a checkpoint's ``state_dict`` (so plain
    loading gives the weights to deploy) with the trained weights beside it for resuming. This class adds the
    warm-up, and:

    * the average is in place from ``on_validation_start`` to ``on_validation_end``, so rollouts in anyone's
      ``on_validation_epoch_end`` see it, whatever the order of the callbacks;
    * it lives on the model's device, and starts from the model as training starts: Lightning copies the model
      before either its own ``setup`` (which may fit a normaliser) or its move to the device;
    * a checkpoint saved after ``fit`` returned, or while the average is in place, also resumes exactly;
    * after ``fit``, ``validate`` and ``test`` of a checkpoint evaluate its average.

    Args:
        decay: Limit of the weight of the old average; 0.999 looks back over about the last 1000 steps.
        warmup_power: How fast that limit is approached, see :func:`ema_decay`. 0.75 is Diffusion Policy's; it
            reaches 0.999 after 10^4 steps.

    Raises:
        UserError: ``decay`` is outside [0, 1), or ``warmup_power`` is not positive.
    """

    def __init__(self, decay: float = 0.999, warmup_power: float = 0.75) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must be at least 0 and below 1, got {decay}")
        if warmup_power <= 0:
            raise UserError(f"EMA: warmup_power must be positive, got {warmup_power}")
        super().__init__(multi_avg_fn=partial(ema_update, decay=decay, warmup_power=warmup_power))
        self.decay = decay
        self.warmup_power = warmup_power
        self._average_is_in_model = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit, its step count included, and copy the model."""
        if stage == "fit":
            self._average_is_in_model = False
            self._latest_update_step = 0
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the copy up to date with the model, which is now set up and on its device."""
        average = self._average_model
        assert average is not None
        average.module.to(pl_module.device)
        # AveragedModel asks its counter twice per update; on the CPU that does not wait for the device.
        average.n_averaged = average.n_averaged.cpu()
        if average.n_averaged == 0:
            average.module.load_state_dict(pl_module.state_dict())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average into the model, during a fit; after one it is already there."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_models(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the trained weights back; Lightning runs this before its checkpoint callbacks save."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_models(pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: the average is in place since :meth:`on_validation_start`."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: the average stays in place until :meth:`on_validation_end`."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the model, and keep the trained weights for a checkpoint that is saved later."""
        self._swap_models(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as ``state_dict`` and the trained weights as ``current_model_state``, wherever they are."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_is_in_model:
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both sets of weights to resume; to evaluate, the average already loaded is all that is wanted."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        else:
            self._average_model = None
            self._average_is_in_model = False

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._average_is_in_model = not self._average_is_in_model
