"""From a module and a few numbers to what ``LightningModule.configure_optimizers`` returns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from logging import getLogger
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from dopr_lightning.internals import averaging_rates, finds_batch_size, is_lightnings
from dopr_lightning.mup import MupSpec, WeightDecayRule, rules
from dopr_lightning.optim.bases import Choice, resolve
from dopr_lightning.optim.composite import CompositeOptimizer, apart
from dopr_lightning.optim.plan import Assignment, is_positive, plan
from dopr_lightning.optim.roles import guessed_ends
from dopr_lightning.optim.schedules import Schedule, make_scheduler

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

log = getLogger(__name__)


def make_optimizer(
    model: nn.Module,
    base: Choice = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    roles: Mapping[str, str] | None = None,
    mup: MupSpec | None = None,
    weight_decay_rule: WeightDecayRule = "independent",
    lr_by_role: Mapping[str, float] | None = None,
    **options: Any,
) -> Optimizer:
    """One Optimizer for all trainable parameters of ``model``.

    Args:
        model: Any module.
        base: ``"adamw"``, ``"muon"`` (torch's Muon on hidden matrices, its update's RMS matched to AdamW's; AdamW with
            the same rate on the rest), ``"adamuon"`` (likewise; under muP with ``scale="spectral"``),
            ``"signum"``, ``"lion"``, ``"soap"``, ``"sgd"`` (momentum 0.9), or any Optimizer class that takes parameter
            groups and steps without a closure, perhaps as a ``functools.partial`` with options.
        lr: Peak learning rate; under muP that of the base width.
        weight_decay: For matrices; biases, norms and other vectors are never decayed.
        roles: Overrides of :func:`~dopr_lightning.optim.roles.parameter_roles`, globs on parameter names to roles.
        mup: Scale rates, weight decay and eps with the width, so that those of the base width serve at any. The groups
            carry their multipliers as ``"lr_mult"`` and ``"wd_mult"``. None: standard parametrisation, the same numbers
            for all.
        weight_decay_rule: How weight decay follows the learning rate under muP, see
            :func:`~dopr_lightning.mup.rules.weight_decay`.
        lr_by_role: Multipliers of the learning rate by role, ``{"input": 0.25}``, beside muP's, or without it: one rate
            rarely serves layers of very different fan-in (Tensor Programs V, arXiv 2203.03466, tunes such multipliers
            too). They hold at every width. The groups carry the product as ``"lr_mult"``. Default: 1 for all.
        **options: Further keywords of the base's algorithm, ``betas=(0.9, 0.95)`` say.

    Raises:
        TypeError: ``model`` is no module, ``mup`` no MupSpec, or ``roles`` or ``lr_by_role`` no mapping.
        ValueError: Unknown base, role, rule or option, a rate that is not positive and finite, a weight decay that is
            negative or that the base does not have, nothing to train, a spec of another model, a base whose scaling
            with the width is not known, or a role that no parameter has.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, whose parameters' names and layers are looked at, got {type(model).__name__}; "
            "pass the model in place of its parameters"
        )
    if not is_positive(lr):
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    if weight_decay != 0 and not is_positive(weight_decay):
        raise ValueError(f"weight_decay must be finite and not negative, got {weight_decay!r}")
    chosen = resolve(base)
    entries = plan(
        model, chosen, roles=roles, mup=mup, weight_decay_rule=weight_decay_rule, lr_by_role=lr_by_role, options=options
    )
    if mup and (drawn := mup.as_torch_draws(model)):
        warnings.warn(
            f"{drawn[0]} is as torch drew it, in a model wider than its base {mup.base}: under muP it must start "
            "smaller. Call initialize(model) of the MupSpec before this, unless weights of a model that was "
            "initialised are loaded later",
            stacklevel=2,
        )

    def part(algorithm: Callable[..., Optimizer], main: bool, defaults: Mapping[str, Any]) -> list[Optimizer]:
        alike: dict[tuple[Any, ...], list[Assignment]] = {}
        for entry in entries:
            if entry.main is main:
                key = (not entry.decays, entry.lr, entry.weight_decay, entry.eps)
                alike.setdefault(key, []).append(entry)
        kinds = sorted(alike.items(), key=lambda kind: kind[0][0])
        groups = []
        for (vectors, lr_mult, decay_mult, _), members in kinds:
            group = {
                "params": [model.get_parameter(entry.name) for entry in members],
                "param_names": [entry.name for entry in members],
                "lr": lr * lr_mult,
                "weight_decay": 0.0 if vectors else weight_decay * decay_mult,
            }
            scaled = {"lr_mult": lr_mult} if mup or lr_by_role else {}
            if mup and group["weight_decay"]:
                scaled["wd_mult"] = decay_mult
            groups.append(group | scaled)
        if not groups:
            return []
        try:
            optimizer = algorithm(groups, lr=lr, **defaults)
        except TypeError as error:
            raise ValueError(f"{algorithm.__name__} does not accept these options: {error}") from error
        if weight_decay and "weight_decay" not in optimizer.defaults:
            raise ValueError(
                f"{algorithm.__name__} has no weight decay, and would ignore weight_decay={weight_decay}; leave it out"
            )
        for group, ((*_, multiplier), _) in zip(optimizer.param_groups, kinds, strict=True):
            if "eps" in group and multiplier != 1:
                group["eps"] = _times(group["eps"], multiplier)
        return [optimizer]

    defaults = {**chosen.options, **(chosen.mup_options if mup else {})}
    rest = dict(chosen.rest_options)
    if options.get("fused"):
        defaults.pop("foreach", None)  # torch refuses both
    if len({getattr(model.get_parameter(entry.name), "device_mesh", None) for entry in entries}) > 1:
        # Tensor parallelism of some layers: no one kernel takes what is sharded together with what is not.
        for common in (defaults, rest):
            common.update({"foreach": False} if "foreach" in common else {})
    return CompositeOptimizer(part(chosen.algorithm, True, defaults | options) + part(chosen.rest, False, rest))


def _times(eps: Any, multiplier: float) -> Any:
    """An optimizer's eps, several or none of which it may have, as Adafactor does."""
    if isinstance(eps, tuple):
        return tuple(_times(one, multiplier) for one in eps)
    return None if eps is None else eps * multiplier


def configure_optimizers(
    module: LightningModule,
    base: Choice = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    roles: Mapping[str, str] | None = None,
    mup: MupSpec | None = None,
    weight_decay_rule: WeightDecayRule = "independent",
    lr_by_role: Mapping[str, float] | None = None,
    **options: Any,
) -> OptimizerLRScheduler:
    """Return this from ``LightningModule.configure_optimizers``.

    Args:
        module: The LightningModule, ``self``.
        base: See :func:`make_optimizer`, as for ``lr``, ``weight_decay``, ``roles``, ``mup`` and ``options``.
        lr: Peak learning rate; under muP that of the base width.
        weight_decay: For matrices only.
        schedule: ``"constant"`` or ``"cosine"`` (to 0 at the last step), after ``warmup_steps`` of linear warm-up.
        warmup_steps: Optimizer steps.
        total_steps: Optimizer steps of the whole training. None: the Trainer's own estimate, if the cosine needs one.
        roles: Overrides of the parameters' roles.
        mup: Scale rates, weight decay and eps with the width.
        weight_decay_rule: How weight decay follows the learning rate under muP.
        lr_by_role: Multipliers of the learning rate by role, ``{"input": 0.25}``.
        **options: Further keywords of the base's algorithm.

    Returns:
        The optimizer alone where nothing moves its rate, so that a rate which Lightning's finder sets is kept.

    Raises:
        TypeError: As :func:`make_optimizer`.
        ValueError: As :func:`make_optimizer`; or an unknown schedule, a negative or fractional warm-up, or a cosine
            whose end is not known; or under muP a Trainer that clips the gradients of SGD by their norm, beyond the
            base width; or one that averages weights at rates of another ratio than muP's, or ``lr_by_role``'s.

    Example:
        >>> class Model(LightningModule):  # doctest: +SKIP
        ...     def configure_optimizers(self):
        ...         return configure_optimizers(self, base="muon", lr=3e-3, schedule="cosine", warmup_steps=500)
    """
    optimizer = make_optimizer(
        module,
        base,
        lr=lr,
        weight_decay=weight_decay,
        roles=roles,
        mup=mup,
        weight_decay_rule=weight_decay_rule,
        lr_by_role=lr_by_role,
        **options,
    )
    trainer: Trainer | None = getattr(module, "_trainer", None)  # a submodule has none, nor what Fabric runs
    if mup is not None and trainer is not None:
        _check_clipping(module, trainer, base, mup)
    if trainer is not None:
        _check_averaging(trainer, optimizer)
        _say_unfreezing(module, trainer)
    if mup is None and roles is None and (lr_by_role or resolve(base).roles):
        _say_guesses(module)
    if schedule == "constant" and warmup_steps == 0:
        return optimizer
    end: float = math.inf if total_steps is None else total_steps
    if schedule == "cosine" and total_steps is None:
        end = _estimate(module, trainer)
        if trainer and trainer.fast_dev_run:  # type: ignore[attr-defined]
            end += warmup_steps  # its few steps, which show that everything runs, may all be of the warm-up
    scheduler = make_scheduler(optimizer, schedule, warmup_steps, end)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _say_guesses(module: nn.Module) -> None:
    """Which matrices are taken for ends of the network by no more than their place, where something hangs on it."""
    from lightning.pytorch.utilities import rank_zero_info

    ends = guessed_ends(module)
    if ends:
        taken = " and ".join(f"{name} is the {role}" for name, role in ends.items())
        roles = ", ".join(f'"{name}": "{role}"' for name, role in ends.items())
        rank_zero_info(  # which Lightning shows by itself
            f"roles by order of registration: {taken}. If the network begins and ends elsewhere, or there are several, "
            f"say so: roles={{{roles}}}"
        )


def _say_unfreezing(module: nn.Module, trainer: Trainer) -> None:
    """Point out who may add groups in the middle of the fit, before it is lost."""
    tuners = [callback for callback in trainer.callbacks if is_lightnings(callback, "BaseFinetuning")]  # type: ignore[attr-defined]
    if tuners and trainer.is_global_zero and not all(p.requires_grad for p in module.parameters()):
        log.warning(
            "%s may unfreeze layers in the middle of the fit, and add their group to this optimizer, whose groups are "
            "fixed: the fit then stops. Return an optimizer of torch's from configure_optimizers, or unfreeze them in "
            "a fit of their own",
            type(tuners[0]).__name__,
        )


def _check_averaging(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse rates of another ratio now: the averaging would set them late in the fit, and that would be lost.

    Raises:
        ValueError: They are, one for all groups say, and the groups have multipliers of their own.
    """
    multipliers = [group.get("lr_mult", 1.0) for group in optimizer.param_groups]
    if len(set(multipliers)) == 1:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not is_lightnings(callback, "StochasticWeightAveraging"):
            continue
        rates = averaging_rates(callback)
        each = rates if isinstance(rates, list) else [rates] * len(multipliers)
        bases = [rate / multiplier for rate, multiplier in zip(each, multipliers, strict=False)]
        peak = optimizer.param_groups[0]["lr"] / multipliers[0]
        if len(each) != len(multipliers) or apart(bases, peak):
            raise ValueError(
                f"StochasticWeightAveraging(swa_lrs={rates}) does not keep the ratio that muP, or lr_by_role, gave the "
                f"rates of the {len(multipliers)} groups; give it a list: swa_lrs=[{each[0]:g} * group['lr_mult'] for "
                "group in make_optimizer(...).param_groups]"
            )


def _check_clipping(module: nn.Module, trainer: Trainer, base: Choice, mup: MupSpec) -> None:
    """Point out that the Trainer clips by a norm which changes with the width; refuse where steps are as long as it.

    The entries of a readout's gradient do not fall with the width, so that the norm over all parameters grows, in the
    end like sqrt(width). That of DoPr's M, which the clip sees in place of the gradient, falls.

    Raises:
        ValueError: The base is SGD, or another whose update grows as the gradient does.
    """
    if not _clips_by_norm(trainer) or not _grows(module, mup):
        return
    said = (
        f"gradient_clip_val={trainer.gradient_clip_val} under muP, in a model wider than its base {mup.base}: the norm "
        "that it is compared with changes with the width (that of all gradients grows, in the end like sqrt(width); "
        "that of DoPr's M falls), so that clipping acts differently at each width"
    )
    by_value = "Clipping by value is no way out: entries change with the width too"
    chosen = resolve(base)
    if rules.gradient in (chosen.growth, chosen.rest_growth):
        raise ValueError(
            f"{said}, and a step of {base} is as long as the clipped gradient: what was tuned narrow is wrong here. "
            f"Leave gradient_clip_val out, or take a base whose step is not, adamw say. {by_value}"
        )
    if trainer.is_global_zero:
        log.warning(
            "%s. Where it only catches outliers, as a bound well above the usual norms does, all is well; one that "
            "acts in usual steps should be left out, here and in the sweep. %s.",
            said,
            by_value,
        )


def _grows(module: nn.Module, mup: MupSpec) -> bool:
    """Whether the module is wider than the base."""
    return any(matrix.row_growth > 1 or matrix.col_growth > 1 for matrix in mup.growth(module).values())


def _clips_by_norm(trainer: Trainer) -> bool:
    """Whether the Trainer clips, and by norm, as it does unless told otherwise; a bound of 0 is none to Lightning."""
    return (trainer.gradient_clip_val or 0) > 0 and trainer.gradient_clip_algorithm in (None, "norm")


def _estimate(module: nn.Module, trainer: Trainer | None) -> float:
    """How many steps the trainer is going to take.

    Raises:
        ValueError: There is none, or a callback changes the batches of a step, or of an epoch, after this.
    """
    if trainer is None:
        raise ValueError(
            f"a cosine schedule must know its end, and {type(module).__name__} has no Trainer that tells it; give "
            "total_steps, or the LightningModule in a Trainer's fit"
        )
    if trainer.max_epochs != -1:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            searches = is_lightnings(callback, "BatchSizeFinder") and finds_batch_size(callback)
            if searches or is_lightnings(callback, "GradientAccumulationScheduler"):
                raise ValueError(
                    f"a cosine schedule must know its end, and {type(callback).__name__} moves it; set "
                    "Trainer(max_steps=...) without max_epochs, or total_steps"
                )
    return trainer.estimated_stepping_batches
