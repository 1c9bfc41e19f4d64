"""Which runs are a sweep? Widths of one network, and values of its hyperparameters."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dopr_lightning.errors import UserError
from dopr_lightning.proxy import sizes

ROLES = {"input_rate": "input", "readout_rate": "readout", "condition_rate": "condition"}
"""The roles whose share of the learning rate can be swept: those that touch a dimension which does not grow, and what
sees one row per sample, which Muon leaves to AdamW."""

HYPERPARAMETERS = ("lr", "weight_decay", "damping", *ROLES)

Parametrization = Literal["mup", "standard"]


@dataclass(frozen=True)
class Point:
    """Values of the hyperparameters.

    Args:
        lr: Learning rate.
        weight_decay: Weight decay.
        damping: DoPr's damping; None without DoPr.
        input_rate: Multiplier of the input layers' learning rate; None: none.
        readout_rate: The same of the readouts'.
        condition_rate: The same of the conditions'.
    """

    lr: float
    weight_decay: float
    damping: float | None
    input_rate: float | None = None
    readout_rate: float | None = None
    condition_rate: float | None = None

    @property
    def name(self) -> str:
        """``"lr 0.001 wd 1e-05 damping 0.01"``."""
        damping = "" if self.damping is None else f" damping {self.damping:g}"
        shares = "".join(f" {role} {share:g}" for role, share in self.lr_by_role.items())
        return f"lr {self.lr:g} wd {self.weight_decay:g}{damping}{shares}"

    @property
    def values(self) -> dict[str, float | None]:
        """By name; roles that have no rate of their own are left out."""
        found = dataclasses.asdict(self)
        return {name: value for name, value in found.items() if value is not None or name not in ROLES}

    @property
    def lr_by_role(self) -> dict[str, float]:
        """Multipliers of the learning rate."""
        shares = ((role, getattr(self, name)) for name, role in ROLES.items())
        return {role: share for role, share in shares if share is not None}

    def arguments(self) -> list[str]:
        """Of ``dopr fit``; DoPr must be the last callback."""
        damping = [] if self.damping is None else [f"--trainer.callbacks.damping={self.damping!r}"]
        shares = [f"--model.optimizer.lr_by_role.{role}={share!r}" for role, share in self.lr_by_role.items()]
        rates = [f"--model.optimizer.lr={self.lr!r}", f"--model.optimizer.weight_decay={self.weight_decay!r}"]
        return [*rates, *damping, *shares]

    def put_into(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a whole configuration, as plain values, with this point's."""
        changed = copy.deepcopy(dict(config))
        optimizer = changed["model"]["optimizer"]
        optimizer |= {"lr": self.lr, "weight_decay": self.weight_decay}
        optimizer["lr_by_role"] = optimizer.get("lr_by_role", {}) | self.lr_by_role
        if self.damping is not None:
            changed["trainer"]["callbacks"][-1]["init_args"]["damping"] = self.damping
        return changed


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        width: The first of the network's scaled keywords.
        parametrization: muP, or torch's own.
        point: Hyperparameters.
        seed: Of weights, batches and noise.
    """

    width: int
    parametrization: Parametrization
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """``"mup width 64 lr 0.001 wd 1e-05 seed 0"``."""
        return f"{self.parametrization} width {self.width} {self.point.name} seed {self.seed}"

    @property
    def folder(self) -> str:
        """``"mup/width-64/lr-0.001-wd-1e-05/seed-0"``."""
        point = self.point.name.replace(" ", "-")
        return f"{self.parametrization}/width-{self.width}/{point}/seed-{self.seed}"


def points(centre: Point, values: Mapping[str, Sequence[float]], product: bool) -> list[Point]:
    """Each hyperparameter's values with the others at the centre; or every combination.

    Args:
        centre: Where hyperparameters are that are not swept.
        values: Of the hyperparameters that are.
        product: Every combination.
    """
    if product:
        names = list(values)
        return [
            dataclasses.replace(centre, **dict(zip(names, combination, strict=True)))
            for combination in itertools.product(*values.values())
        ]
    found = [dataclasses.replace(centre, **{name: value}) for name in values for value in values[name]]
    return list(dict.fromkeys(found))  # the centre is on every line


def candidates(name: str, value: float, centre: Point, every: Sequence[Point], product: bool) -> list[Point]:
    """The points that speak for a value of a hyperparameter: the one on its line; or all that have it.

    Of several, the best speaks. All values have equally many, so none is favoured by it.
    """
    if not product:
        return [dataclasses.replace(centre, **{name: value})]
    return [point for point in every if getattr(point, name) == value]


def scaled(network: Mapping[str, Any], scales: Sequence[str], width: int) -> dict[str, Any]:
    """The keywords of a network that make it so wide: all in proportion.

    Args:
        network: Its keywords as configured.
        scales: Those that scale, the width first; of a list, its first entry counts.
        width: The width wanted.

    Raises:
        UserError: A keyword would not be a whole number.
    """
    reference = size(network[scales[0]])

    def scale(key: str, value: int) -> int:
        if value * width % reference:
            # Of these multiples every size is whole.
            step = reference // math.gcd(reference, *(v for k in scales for v in sizes(network[k])))
            raise UserError(
                f"--widths {width}: {key} would be {value} x {width} / {reference}, not a whole number; use multiples "
                f"of {step}"
            )
        return value * width // reference

    return {
        key: [scale(key, v) for v in network[key]] if isinstance(network[key], list) else scale(key, network[key])
        for key in scales
    }


def size(value: Any) -> int:
    """The width that a scaled keyword names."""
    return sizes(value)[0]


def network_arguments(keywords: Mapping[str, Any]) -> list[str]:
    """Of ``dopr fit``."""
    return [f"--model.network.{key}={json.dumps(value)}" for key, value in keywords.items()]


def mup_arguments(parametrization: Parametrization, base: Mapping[str, Any]) -> list[str]:
    """Of ``dopr fit``: muP from the narrowest network on, or none."""
    return [f"--model.mup.base={json.dumps(base)}"] if parametrization == "mup" else ["--model.mup=null"]
