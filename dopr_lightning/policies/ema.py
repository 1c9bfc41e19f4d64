"""Which weights are evaluated? An exponential moving average of those trained, on Lightning's own callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

from dopr_lightning.errors import UserError
from dopr_lightning.policies.sharding import is_sharded
from dopr_lightning.preconditioner.sharding import local

_IN_ONE_FILE = StateDictOptions(full_state_dict=True, cpu_offload=True)

HALVES = ("bf16-true", "16-true")
"""Lightning's names of weights in half precision."""


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

    Integer buffers (counters) are copied: they have no average. Of weights that are cut up (FSDP2) each process moves
    its own part.
    """
    averages, current = [local(tensor) for tensor in averages], [local(tensor) for tensor in current]
    if averages[0].is_floating_point():
        # a + w (c - a) returns a itself when c equals a, so buffers that do not change do not drift.
        torch._foreach_lerp_(averages, current, 1 - ema_decay(int(n), decay, warmup_power))
    else:
        torch._foreach_copy_(averages, current)


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
    * after ``fit``, ``validate`` and ``test`` of a checkpoint evaluate its average;
    * under FSDP2 the average is cut up as the weights are.

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
        """Forget an earlier fit, its step count included, and copy the model while it is whole.

        Raises:
            UserError: Weights are of half precision, or checkpoints would be cut up, too.
        """
        if stage != "fit":
            return
        if trainer.precision in HALVES:
            raise UserError(
                f"EMA: with precision={trainer.precision} the average would stand still, since its steps are less than "
                "half precision resolves; use bf16-mixed, whose weights are float32"
            )
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise UserError(
                "EMA: the average is saved in one file; set save_distributed_checkpoint=False of the strategy, or take "
                "dopr_lightning.policies.sharding.FSDP2, which does"
            )
        self._average_is_in_model = False
        self._latest_update_step = 0
        mesh, pl_module._device_mesh = pl_module._device_mesh, None  # which cannot be copied, and would cut it up
        pl_module.configure_model()
        self._average_model = AveragedModel(pl_module, pl_module.device, use_buffers=True, **self._kwargs)
        pl_module._device_mesh = mesh

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the copy up to date with the model, which is now set up, on its device and in its precision."""
        average = self._average_model
        assert average is not None
        trainer.precision_plugin.convert_module(average.module).to(pl_module.device)
        if is_sharded(pl_module):
            copy = cast(pl.LightningModule, average.module)
            copy._device_mesh = pl_module._device_mesh
            copy.configure_model()
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

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where a checkpoint of a finished run left nothing to train, which no ``on_train_end`` ends."""
        if not self._average_is_in_model:
            self._swap_models(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as ``state_dict`` and the trained weights as ``current_model_state``, wherever they are."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        average = self._average_model
        if average is not None and is_sharded(pl_module):
            checkpoint["state_dict"] = get_model_state_dict(average.module, options=_IN_ONE_FILE)
        if self._average_is_in_model:
            swapped = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = swapped

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both sets of weights to resume; to evaluate, the average already loaded is all that is wanted."""
        if trainer.state.fn == TrainerFn.FITTING and is_sharded(pl_module):
            self._load_shards(pl_module, checkpoint)
        elif trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        else:
            self._average_model = None
            self._average_is_in_model = False

    def _load_shards(self, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Resume under FSDP2, whose strategy has moved the average from the checkpoint into the model."""
        assert self._average_model is not None
        self._average_model.module.load_state_dict(pl_module.state_dict())
        if "current_model_state" in checkpoint:
            self._average_model.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
            set_model_state_dict(pl_module, checkpoint["current_model_state"], options=_IN_ONE_FILE)

    @torch.no_grad()
    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        assert self._average_model is not None
        for average, current in zip(_tensors(self._average_model.module), _tensors(pl_module), strict=True):
            held = average.clone()
            average.copy_(current)
            current.copy_(held)
        self._average_is_in_model = not self._average_is_in_model


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers, or this process's part of them."""
    return (local(tensor.detach()) for tensor in chain(module.parameters(), module.buffers()))
