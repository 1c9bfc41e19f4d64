"""From a module and a few numbers to what ``LightningModule.configure_optimizers`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from dopr_lightning.optim.bases import resolve
from dopr_lightning.optim.composite import CompositeOptimizer
from dopr_lightning.optim.roles import parameter_roles
from dopr_lightning.optim.schedules import Schedule, make_scheduler

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.types import OptimizerLRScheduler


def make_optimizer(
    model: nn.Module,
    base: str | type[Optimizer] = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    roles: Mapping[str, str] | None = None,
    **options: Any,
) -> Optimizer:
    """One Optimizer for all trainable parameters of ``model``.

    Args:
        model: Any module.
        base: ``"adamw"``, ``"muon"`` (torch's Muon on hidden matrices, its update's RMS matched to AdamW's; AdamW with
            the same rate on the rest), ``"sgd"`` (momentum 0.9), or an Optimizer class.
        lr: Peak learning rate.
        weight_decay: For matrices; biases, norms and other vectors are never decayed.
        roles: Overrides of :func:`~dopr_lightning.optim.roles.parameter_roles`, globs on parameter names to roles.
        **options: Further keywords of the base's algorithm, ``betas=(0.9, 0.95)`` say.

    Raises:
        ValueError: Unknown base, role or option, a rate that is not positive, or nothing to train.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    chosen = resolve(base)
    role_of = parameter_roles(model, roles)
    if not role_of:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")

    def part(algorithm: type[Optimizer], names: list[str], defaults: Mapping[str, Any]) -> list[Optimizer]:
        groups = [
            {
                "params": [model.get_parameter(name) for name in chosen_names],
                "param_names": chosen_names,
                "weight_decay": decay,
            }
            for chosen_names, decay in (
                ([name for name in names if role_of[name] != "vector"], weight_decay),
                ([name for name in names if role_of[name] == "vector"], 0.0),
            )
            if chosen_names
        ]
        try:
            return [algorithm(groups, lr=lr, **defaults)] if groups else []  # type: ignore[call-arg]
        except TypeError as error:
            raise ValueError(f"{algorithm.__name__} does not accept these options: {error}") from error

    main = [name for name, role in role_of.items() if chosen.roles is None or role in chosen.roles]
    rest = [name for name in role_of if name not in set(main)]
    defaults = dict(chosen.options)
    if options.get("fused"):
        defaults.pop("foreach", None)  # torch refuses both
    return CompositeOptimizer(
        part(chosen.algorithm, main, defaults | options) + part(chosen.rest, rest, chosen.rest_options)
    )


def configure_optimizers(
    module: LightningModule,
    base: str | type[Optimizer] = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    schedule: Schedule = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    roles: Mapping[str, str] | None = None,
    **options: Any,
) -> OptimizerLRScheduler:
    """Return this from ``LightningModule.configure_optimizers``.

    Args:
        module: The LightningModule, ``self``.
        base: See :func:`make_optimizer`, as for ``lr``, ``weight_decay``, ``roles`` and ``options``.
        lr: Peak learning rate.
        weight_decay: For matrices only.
        schedule: ``"constant"`` or ``"cosine"`` (to 0 at the last step), after ``warmup_steps`` of linear warm-up.
        warmup_steps: Optimizer steps.
        total_steps: Optimizer steps of the whole training. None: the Trainer's own estimate.
        roles: Overrides of the parameters' roles.
        **options: Further keywords of the base's algorithm.

    Example:
        >>> class Model(LightningModule):  # doctest: +SKIP
        ...     def configure_optimizers(self):
        ...         return configure_optimizers(self, base="muon", lr=3e-3, schedule="cosine", warmup_steps=500)
    """
    optimizer = make_optimizer(module, base, lr=lr, weight_decay=weight_decay, roles=roles, **options)
    steps = module.trainer.estimated_stepping_batches if total_steps is None else total_steps
    scheduler = make_scheduler(optimizer, schedule, warmup_steps, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
