"""Where the preconditioner meets Lightning's hooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from logging import getLogger
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dopr_lightning.internals import is_lightnings, skips_backward, steps_logged, will_skip
from dopr_lightning.preconditioner import ActivationPreconditioner
from dopr_lightning.preconditioner.covariance import DampingScale
from dopr_lightning.preconditioner.coverage import NothingToPreconditionError, check_still_frozen
from dopr_lightning.preconditioner.layers import ConvCovariance, Layer, named_modules
from dopr_lightning.preconditioner.options import check_options
from dopr_lightning.preconditioner.solvers import Solver
from dopr_lightning.preconditioner.summary import Summary, joined

log = getLogger(__name__)


class DoPr(pl.Callback):
    """Precondition every gradient with its layer's activation covariance before the optimizer takes its step.

    The rewrite happens in ``on_before_optimizer_step``. There gradients are averaged over ranks and unscaled (but for
    fused optimizers, which unscale in their step; M scales along), and the window of accumulated batches is complete.
    Gradient clipping comes after and sees what the optimizer will see. Under data parallelism covariances are pooled
    over ranks, so ranks stay bit-identical, with the low-rank solver on CPUs of one kind (docs/multi-gpu.md). The state
    travels in Lightning's checkpoints. A step that a gradient scaler skips (``precision="16-mixed"``) leaves no trace.

    Layers whose weights no optimizer holds are left alone. With several optimizers (manual optimization) each has
    statistics and a cadence of its own, for the layers whose weights it holds. Use ``toggle_optimizer``, or rows that
    one network saw for the other's loss count for both.

    Args:
        damping: See :class:`~dopr_lightning.preconditioner.preconditioner.ActivationPreconditioner`, as for the rest.
        damping_scale: ``"trace"`` or ``"mean"``.
        update_every: Refresh covariances every this many optimizer steps.
        ema: Weight of past covariances at a refresh.
        solver: ``"exact"``, ``"lowrank"`` or ``"auto"``.
        max_error: Relative error that the low-rank solver's certificate may show.
        conv: ``"channel"`` or ``"patch"``.
        bias: Precondition each bias with its weight.
        max_dim: Split larger covariances into blocks on the diagonal, which share their damping.
        max_rows: Use at most so many rows of each input.
        max_failures: Raise after so many failed refreshes of one layer in a row.
        include: Globs on module names to cover. None: all.
        exclude: Globs on module names to leave alone.
        log_every: Log per parameter, every this many steps and at no cost between: condition number, effective rank,
            cosine between M and G, RMS of M, failures, and of the low-rank solver rank and certified error. Costs an
            eigenvalue decomposition per exactly solved layer each time. None: never.
        overlap: Finish a refresh in the next step, so that host and GPU need not wait for each other.

    Attributes:
        preconditioners: One :class:`ActivationPreconditioner` per optimizer while fitting, else empty; None for an
            optimizer that holds nothing to precondition.

    Raises:
        TypeError: An argument is of another type.
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
        solver: Solver = "auto",
        max_error: float = 0.2,
        conv: ConvCovariance = "channel",
        bias: bool = False,
        max_dim: int | None = None,
        max_rows: int | None = None,
        max_failures: int = 10,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        log_every: int | None = None,
        overlap: bool = False,
    ) -> None:
        self.options: dict[str, Any] = {
            "damping": damping,
            "damping_scale": damping_scale,
            "update_every": update_every,
            "ema": ema,
            "solver": solver,
            "max_error": max_error,
            "conv": conv,
            "bias": bias,
            "max_dim": max_dim,
            "max_rows": max_rows,
            "max_failures": max_failures,
            "include": include,
            "exclude": exclude,
            "overlap": overlap,
        }
        check_options(**self.options, log_every=log_every)
        self.log_every = log_every
        self.preconditioners: list[ActivationPreconditioner | None] = []
        self._last: list[ActivationPreconditioner] = []  # those of a fit that has ended, for its summary
        self._masked_nothing = False  # and said so
        self._without_gradients = False
        self._frozen: Sequence[Layer] = ()  # where an optimizer holds nothing to precondition
        # What a checkpoint held, until training starts; what a fit ended with, for a checkpoint saved after it. None
        # in between, when the preconditioners have it.
        self._state: dict[str, Any] | None = {}

    @property
    def state_key(self) -> str:
        """The key of its state in checkpoints, which tells several DoPr of a trainer apart by what they cover."""
        chosen = {name: sorted(globs) for name in ("include", "exclude") if (globs := self.options[name])}
        return self._generate_state_key(**chosen) if chosen else super().state_key

    @contextmanager
    def mask(self, mask: Tensor) -> Iterator[None]:
        """Leave rows out of the statistics, padding tokens say, for forwards inside.

        It does something in a fit of a Trainer that has this very callback.

        Args:
            mask: See :meth:`~dopr_lightning.preconditioner.preconditioner.ActivationPreconditioner.mask`.

        Example:
            >>> def training_step(self, batch, batch_idx):  # of a module that was given the callback
            ...     with self.dopr.mask(batch["tokens"] != PADDING):
            ...         return self.loss(batch)
        """
        # Without gradients it is somebody predicting, who counts no rows anyway.
        if not self.preconditioners and not self._masked_nothing and torch.is_grad_enabled():
            self._masked_nothing = True
            log.warning(
                "this DoPr's mask leaves nothing out: no Trainer fits with it. The one to take is that in "
                "Trainer(callbacks=[...]), not another or a copy"
            )
        with ExitStack() as stack:
            for preconditioner in self._made:
                stack.enter_context(preconditioner.mask(mask))
            yield

    def summary(self) -> Summary:
        """One row per parameter: covered, with the size and spectrum of its covariance, or why not. Prints as a table.

        Of the fit that runs, or of the last one, whose statistics stay on its device until the next. Costs an
        eigenvalue decomposition per exactly solved layer. One rank may call it alone.

        Raises:
            RuntimeError: No fit with this very callback has begun in this process.
        """
        made = self._made or self._last
        if not made:
            raise RuntimeError(
                "this DoPr has nothing to say yet: no Trainer that has it in callbacks=[...] has begun a fit in "
                "this process. Before one, print(ActivationPreconditioner(model).summary())"
            )
        return joined([preconditioner.summary() for preconditioner in made])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit; the checkpoint of this one, if there is one, is loaded after this."""
        if stage == "fit":
            self._state, self._last = {}, []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hook the model; not in ``setup``, where an EMA callback would copy it.

        Raises:
            ValueError: Nothing in the model is left to cover, or another DoPr covers some of it too; or the strategy
                keeps gradients where they cannot be rewritten.
        """
        if is_lightnings(trainer.strategy, "DeepSpeedStrategy", "FSDPStrategy"):
            raise ValueError(
                f"DoPr cannot rewrite gradients under {type(trainer.strategy).__name__}, which keeps them in a form of "
                "its own; take strategy='ddp', or FSDP2 (docs/multi-gpu.md)"
            )
        self._remove()  # where another callback's on_exception kept an earlier fit from it
        self._without_gradients = False
        preconditioner = ActivationPreconditioner(pl_module, **self.options)
        self.preconditioners = [preconditioner]
        self._look_around(trainer, pl_module, preconditioner)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Now that the optimizers are there: one preconditioner each. Go on from a checkpoint.

        Raises:
            ValueError: No optimizer holds the weight of a layer that is covered, or one is LBFGS.
        """
        if len(trainer.optimizers) > 1 or any(_leaves_some_out(o, pl_module) for o in trainer.optimizers):
            self._remove()
            self.preconditioners = [self._for(optimizer, pl_module) for optimizer in trainer.optimizers]
            if not self._made:
                raise ValueError("nothing to precondition: no optimizer holds the weight of a layer that DoPr covers")
            self._made[0].share_masks(self._made[1:])
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise ValueError(
                "LBFGS evaluates the loss several times in a step, and would be given M in place of the gradients that "
                "it compares; take adamw, muon or another optimizer, or leave DoPr out"
            )
        if self._state:
            self._load(self._state["preconditioners"])
        self._state = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Rewrite the gradients."""
        preconditioner = self._of(optimizer, trainer)
        if skips_backward(trainer):  # weight averaging renews its batch norms
            return
        if preconditioner is None:
            check_still_frozen(self._frozen)
            return
        if all(parameter.grad is None for parameter in _parameters(optimizer)):  # training_step returned None
            self._without_gradients = True
            preconditioner.discard()
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and will_skip(scaler, optimizer):
            preconditioner.discard()
            return
        # Not the trainer's count, which under manual optimization is of batches: it may pass over every multiple.
        measure = self.log_every is not None and preconditioner.steps % self.log_every == 0
        preconditioner.step(measure=measure)
        if measure and trainer.is_global_zero:
            metrics = _metrics(preconditioner)
            for logger in trainer.loggers:  # on the x axis of all that Lightning logs
                logger.log_metrics(metrics, step=steps_logged(trainer))

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Forget the rows of gradients that never came to a step."""
        preconditioner = self._of(optimizer, trainer)
        if preconditioner is not None:
            preconditioner.discard()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the last refresh while the model is on its device. Say so if no step came by."""
        for preconditioner in self._made:
            preconditioner.settle()
        batches = steps_logged(trainer)
        if batches and not any(preconditioner.steps for preconditioner in self._made):
            if not pl_module.automatic_optimization:
                why = (
                    "no step of an optimizer came by. Step what self.optimizers() returns; use_pl_optimizer=False "
                    "keeps Lightning's hooks out"
                )
            elif self._without_gradients:
                why = "when an optimizer was to step its parameters had no gradients (.grad)"
            else:  # all were skipped by a gradient scaler
                return
            log.warning("DoPr rewrote no gradient in %d batches: %s.", batches, why)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks off."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks off: Lightning skips ``teardown`` after an exception."""
        try:
            try:
                for preconditioner in self._made:
                    preconditioner.settle()
            finally:  # a state without that refresh
                self._stop()
        except RuntimeError as error:  # must not take the place of the one that ended the fit
            log.warning("after the exception that ended the fit, DoPr's own end failed too: %s", error)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A trainer's only DoPr takes a checkpoint's only state whatever its key: other layers are refused."""
        own, states = type(self).__qualname__, checkpoint.get("callbacks", {})
        saved = [key for key in states if key == own or str(key).startswith(f"{own}{{")]
        if len(saved) == 1 and sum(isinstance(callback, DoPr) for callback in trainer.callbacks) == 1:  # type: ignore[attr-defined]
            states[self.state_key] = states[saved[0]]

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint, during a fit or after it."""
        if self._state is not None:
            return self._state
        return {"preconditioners": [None if p is None else p.state_dict() for p in self.preconditioners]}

    def __getstate__(self) -> dict[str, Any]:
        """Copies have the options alone: a module that is given the callback may keep it among its hyperparameters."""
        lent = ("log", "log_dict")  # the module's own methods, which Lightning puts here
        own = {name: value for name, value in self.__dict__.items() if name not in lent}
        return {**own, "preconditioners": [], "_last": [], "_frozen": (), "_state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this while a fit starts: the state is put to use in ``on_train_start``.

        Its finders of rates and batch sizes also do in the middle of training, to undo their search.
        """
        if self._state is None:
            self._load(state_dict["preconditioners"])
        else:
            self._state = state_dict

    def _look_around(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, preconditioner: ActivationPreconditioner
    ) -> None:
        """Refuse a second rewriting of a gradient, and point out who may unfreeze what is not covered."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for other in callbacks[: callbacks.index(self)]:
            for earlier in other._made if isinstance(other, DoPr) else []:
                if shared := sorted(preconditioner.covered & earlier.covered):
                    raise ValueError(
                        f"{shared[0]}: two DoPr callbacks cover it, and would precondition its gradient twice; give "
                        "each an include of its own"
                    )
        tuners = [callback for callback in callbacks if is_lightnings(callback, "BaseFinetuning")]
        if tuners and preconditioner.frozen:
            exclude = [*self.options["exclude"], *_frozen_globs(preconditioner, pl_module)]
            log.warning(
                "%s may unfreeze layers in the middle of the fit, which DoPr then stops; to leave those that are "
                "frozen now to the base optimizer: DoPr(exclude=%s)",
                type(tuners[0]).__name__,
                exclude,
            )

    @property
    def _made(self) -> list[ActivationPreconditioner]:
        return [preconditioner for preconditioner in self.preconditioners if preconditioner is not None]

    def _for(self, optimizer: Optimizer, model: pl.LightningModule) -> ActivationPreconditioner | None:
        try:
            return ActivationPreconditioner(model, parameters=_parameters(optimizer), **self.options)
        except NothingToPreconditionError as error:
            self._frozen = error.frozen
            return None

    def _of(self, optimizer: Optimizer, trainer: pl.Trainer) -> ActivationPreconditioner | None:
        index = 0 if len(trainer.optimizers) == 1 else [id(o) for o in trainer.optimizers].index(id(optimizer))
        return self.preconditioners[index]

    def _load(self, states: list[dict[str, Any] | None]) -> None:
        if len(states) != len(self.preconditioners):
            raise ValueError(
                f"the checkpoint holds DoPr's state for {len(states)} optimizers, this run has "
                f"{len(self.preconditioners)}"
            )
        for preconditioner, state in zip(self.preconditioners, states, strict=True):
            if preconditioner is not None and state is not None:
                preconditioner.load_state_dict(state)

    def _stop(self) -> None:
        if self.preconditioners:
            self._last = self._made
            try:
                self._state = self.state_dict()
            finally:
                self._remove()

    def _remove(self) -> None:
        for preconditioner in self._made:
            preconditioner.remove()
        self.preconditioners, self._frozen = [], ()


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _leaves_some_out(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether there are parameters that are trained, and not by this optimizer.

    Not where it holds others than the model's, flattened ones say: what it trains cannot be told then.
    """
    held = {id(parameter) for parameter in _parameters(optimizer)}
    parameters = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    return held <= parameters.keys() and any(trained for key, trained in parameters.items() if key not in held)


def _frozen_globs(preconditioner: ActivationPreconditioner, model: nn.Module) -> list[str]:
    """Few patterns for the modules of its frozen layers, which match none that it covers."""
    covered = preconditioner.covered
    frozen = {id(module) for layer in preconditioner.frozen for module in layer.modules}
    globs = []
    for name in (name for name, module in named_modules(model) if id(module) in frozen):
        around = [f"{name[: dot.start()]}." for dot in re.finditer(r"\.", name)]
        free = (prefix for prefix in around if not any(parameter.startswith(prefix) for parameter in covered))
        globs.append(next((f"{prefix}*" for prefix in free), name))
    return list(dict.fromkeys(globs))


def _metrics(preconditioner: ActivationPreconditioner) -> dict[str, float]:
    """What there is to see of each covered parameter, by TensorBoard tags."""
    names = ("condition_number", "effective_rank", "cosine", "update_rms", "failures", "rank", "error")
    return {
        f"dopr/{name}/{row.parameter}": float(value)
        for row in preconditioner.summary()
        if row.covered
        for name in names
        if (value := getattr(row, name)) is not None
    }
