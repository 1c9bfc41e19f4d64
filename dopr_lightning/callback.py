"""Where the preconditioner meets Lightning's hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from dopr_lightning.preconditioner import ActivationPreconditioner
from dopr_lightning.preconditioner.covariance import DampingScale
from dopr_lightning.preconditioner.layers import ConvCovariance
from dopr_lightning.preconditioner.preconditioner import check_options


class DoPr(pl.Callback):
    """Precondition every gradient with its layer's activation covariance before the optimizer takes its step.

    The rewrite happens in ``on_before_optimizer_step``: gradients are unscaled and averaged over ranks there, the
    window of accumulated batches is complete, and gradient clipping, which comes after, sees what the optimizer will
    see. Under DDP covariances are pooled over ranks, so ranks stay bit-identical. The state travels in Lightning's
    checkpoints.

    Args:
        damping: See :class:`~dopr_lightning.preconditioner.preconditioner.ActivationPreconditioner`, as for the rest.
        damping_scale: ``"trace"`` or ``"mean"``.
        update_every: Refresh covariances every this many optimizer steps.
        ema: Weight of past covariances at a refresh.
        conv: ``"channel"`` or ``"patch"``.
        bias: Precondition each bias with its weight.
        include: Globs on module names to cover. None: all.
        exclude: Globs on module names to leave alone.

    Attributes:
        preconditioner: The :class:`ActivationPreconditioner` while fitting, else None.

    Raises:
        ValueError: An argument is out of range; said at once, not after the data is loaded.

    Example:
        >>> trainer = pl.Trainer(callbacks=[DoPr(damping=0.01)])  # doctest: +SKIP
    """

    def __init__(
        self,
        damping: float = 0.01,
        damping_scale: DampingScale = "trace",
        update_every: int = 1,
        ema: float = 0.0,
        conv: ConvCovariance = "channel",
        bias: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        check_options(damping=damping, damping_scale=damping_scale, update_every=update_every, ema=ema, conv=conv)
        self.options: dict[str, Any] = {
            "damping": damping,
            "damping_scale": damping_scale,
            "update_every": update_every,
            "ema": ema,
            "conv": conv,
            "bias": bias,
            "include": include,
            "exclude": exclude,
        }
        self.preconditioner: ActivationPreconditioner | None = None
        # What a checkpoint held, until a fit uses it; what a fit ended with, for a checkpoint saved after it.
        self._state: dict[str, Any] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the model: not in ``setup``, where an EMA callback would copy the hooks with the model."""
        self.preconditioner = ActivationPreconditioner(pl_module, **self.options)
        if self._state and trainer.ckpt_path is not None:
            self.preconditioner.load_state_dict(self._state)
        self._state = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what would precondition gradients twice."""
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"DoPr needs one optimizer, {type(pl_module).__name__} has {len(trainer.optimizers)}; "
                "return one from dopr_lightning.configure_optimizers"
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Rewrite the gradients."""
        assert self.preconditioner is not None
        self.preconditioner.step()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks off: Lightning skips ``teardown`` after an exception."""
        self._stop()

    def _stop(self) -> None:
        if self.preconditioner is not None:
            self._state = self.preconditioner.state_dict()
            self.preconditioner.remove()
            self.preconditioner = None

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint, during a fit or after it."""
        return self._state if self.preconditioner is None else self.preconditioner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before ``on_fit_start``, where the state is put to use."""
        self._state = state_dict
