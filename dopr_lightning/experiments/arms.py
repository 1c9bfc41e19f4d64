"""What is compared: a base optimizer, alone or with DoPr in front of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from dopr_lightning.errors import UserError, did_you_mean
from dopr_lightning.optim import BASES

PREFIX = "dopr-"


@dataclass(frozen=True)
class Arm:
    """One optimizer.

    Args:
        base: Name of the base optimizer.
        dopr: Whether DoPr rewrites the gradients first.
        options: Options of DoPr's that differ from their defaults, ``("solver=lowrank", "update_every=10")``.
    """

    base: str
    dopr: bool
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``"muon"``, ``"dopr-muon"`` or ``"dopr-muon+solver=lowrank+update_every=10"``."""
        return "+".join([f"{PREFIX if self.dopr else ''}{self.base}", *self.options])

    def arguments(self, lr: float | None, damping: float) -> list[str]:
        """Command-line arguments of ``dopr fit`` that make a configuration this arm.

        Args:
            lr: Learning rate; None leaves the configuration's.
            damping: Of DoPr, where the arm has it.
        """
        chosen = [f"--model.optimizer.base={self.base}"]
        if lr is not None:
            chosen.append(f"--model.optimizer.lr={lr}")
        if self.dopr:
            chosen += ["--trainer.callbacks+=dopr_lightning.DoPr", f"--trainer.callbacks.damping={damping}"]
            chosen += [f"--trainer.callbacks.{option}" for option in self.options]
        return chosen


def parse_arms(names: str) -> list[Arm]:
    """Arms from ``"adamw,dopr-adamw,dopr-adamw+solver=lowrank+update_every=10"``.

    Raises:
        UserError: An unknown or repeated name, options where there is no DoPr, or one that it does not have.
    """
    arms = []
    for text in names.split(","):
        name, *options = text.strip().split("+")
        arms.append(Arm(name.removeprefix(PREFIX), name.startswith(PREFIX), tuple(options)))
    for arm in arms:
        if arm.options and not arm.dopr:
            raise UserError(f"{arm.name!r}: options after + are DoPr's, as in {PREFIX}{arm.base}+update_every=10")
        if arm.base not in BASES:
            known = ", ".join(BASES)
            raise UserError(f"unknown optimizer {arm.name!r}; choose from {known}, each also as {PREFIX}NAME")
        _check_options(arm)
    if len({(arm.base, arm.dopr, frozenset(arm.options)) for arm in arms}) < len(arms):
        raise UserError(f"--optimizers {names}: an optimizer is named twice")
    return arms


def _check_options(arm: Arm) -> None:
    """Refuse options that DoPr does not have, with the arm's name; it checks their values itself.

    Raises:
        UserError: There is none of that name, or it is given no value, or two.
    """
    from dopr_lightning.callback import DoPr

    known = inspect.signature(DoPr).parameters
    for option in arm.options:
        name, _, value = option.partition("=")
        if name not in known:
            hint = did_you_mean(name, known) or f"; choose from {', '.join(known)}"
            raise UserError(f"{arm.name!r}: DoPr has no option {name!r}{hint}")
        if not value:
            raise UserError(f"{arm.name!r}: {name} needs a value, as in update_every=10")
        if sum(other.partition("=")[0] == name for other in arm.options) > 1:
            raise UserError(f"{arm.name!r}: {name} is given twice")
