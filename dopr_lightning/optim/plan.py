"""Which part of a base optimizer takes a parameter, and with which multipliers? The table that groups are made from."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn

from dopr_lightning.mup import MupSpec, WeightDecayRule, rules
from dopr_lightning.optim.bases import BASES, Base
from dopr_lightning.optim.roles import check_mapping, parameter_roles


@dataclass(frozen=True)
class Assignment:
    """What becomes of one parameter. The multipliers are 1 without muP.

    Args:
        name: In the model.
        shape: Its sizes.
        role: See :func:`~dopr_lightning.optim.roles.parameter_roles`.
        main: Whether the base's own algorithm takes it, or the one for the rest.
        decays: Whether weight decay applies: to matrices, not to vectors.
        lr: Multiplier of the learning rate, its role's among it.
        weight_decay: Multiplier of the weight decay.
        eps: Multiplier of eps, where the algorithm has one.
        initial_value: What :meth:`MupSpec.initialize` multiplies its initial values by.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    main: bool
    decays: bool
    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    initial_value: float = 1.0


def plan(
    model: nn.Module,
    base: Base,
    *,
    roles: Mapping[str, str] | None = None,
    mup: MupSpec | None = None,
    weight_decay_rule: WeightDecayRule = "independent",
    lr_by_role: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Assignment]:
    """An entry per trainable parameter of ``model``, in its order; arguments as of :func:`make_optimizer`.

    Raises:
        TypeError: ``mup`` is no MupSpec, or ``roles`` or ``lr_by_role`` no mapping.
        ValueError: Unknown role or rule, nothing to train, a spec of another model, a base whose scaling with the width
            is not known, or a role's multiplier that is not positive, or of a role that nothing has.
    """
    if not isinstance(mup, MupSpec | None):
        raise TypeError(f"mup must be a MupSpec, as MupSpec.from_factory makes it, got {mup!r}")
    check_mapping("lr_by_role", lr_by_role, 'roles to multipliers of the learning rate, {"input": 0.25}')
    role_of = parameter_roles(model, roles, known=mup.roles(model) if mup else None)
    if not role_of:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    rules.check_weight_decay_rule(weight_decay_rule)  # also where it has nothing to say
    by_role = dict(lr_by_role or {})
    _check_roles(by_role, role_of.values())
    growth = mup.growth(model) if mup else {}
    initial = mup.multiplier_of_initial_values(model) if mup else {}
    found = []
    for name, role in role_of.items():
        main = base.roles is None or role in base.roles
        multipliers: dict[str, float] = {"lr": by_role.get(role, 1.0)}
        if mup:
            update = _update(base, main, options or {})
            # Rounded, so that what differs by rounding alone shares a group.
            lr = float(f"{rules.learning_rate(growth[name], *update):.12g}")
            multipliers = {
                "lr": lr * by_role.get(role, 1.0),
                # Of the width alone: a role's rate scales its decay as well, at every width alike.
                "weight_decay": rules.weight_decay(lr, weight_decay_rule),
                "eps": rules.eps(growth[name]),
                "initial_value": initial[name],
            }
        shape = tuple(model.get_parameter(name).shape)
        found.append(Assignment(name, shape, role, main, decays=role != "vector", **multipliers))
    return found


def is_positive(value: object) -> bool:
    """Whether it is a number, one in a tensor perhaps, above 0 and finite."""
    return isinstance(value, Real | Tensor) and bool(0 < value < math.inf)  # type: ignore[operator]


def _check_roles(by_role: Mapping[str, float], present: Collection[str]) -> None:
    for role, multiplier in by_role.items():
        if not is_positive(multiplier):
            raise ValueError(f"lr_by_role: the multiplier of {role!r} must be positive, got {multiplier!r}")
        if role not in present:
            raise ValueError(
                f"lr_by_role: no trainable parameter has the role {role!r}; there are {', '.join(sorted(set(present)))}"
            )


def _update(base: Base, main: bool, options: Mapping[str, Any]) -> tuple[rules.Growth, Mapping[str, Any]]:
    """How the algorithm's update grows, and the options that it hangs on."""
    if not main:
        return base.rest_growth, base.rest_options
    if base.growth is None:
        known = [name for name, other in BASES.items() if other.algorithm is base.algorithm and other.growth]
        raise ValueError(
            f"how {base.algorithm.__name__}'s update grows with the width is not known, and muP needs to know; "
            + (
                f"pass base={known[0]!r} in place of the class, which says so"
                if known
                else "register a dopr_lightning.optim.Base in BASES that says so (growth=), and name that"
            )
        )
    return base.growth, {**base.options, **options}
