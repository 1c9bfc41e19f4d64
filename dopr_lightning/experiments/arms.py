"""What is compared: a base optimizer, alone or with DoPr in front of it."""

from __future__ import annotations

from dataclasses import dataclass

from dopr_lightning.errors import UserError
from dopr_lightning.optim import BASES

PREFIX = "dopr-"


@dataclass(frozen=True)
class Arm:
    """One optimizer.

    Args:
        base: Name of the base optimizer.
        dopr: Whether DoPr rewrites the gradients first.
    """

    base: str
    dopr: bool

    @property
    def name(self) -> str:
        """``"muon"`` or ``"dopr-muon"``."""
        return f"{PREFIX if self.dopr else ''}{self.base}"

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
        return chosen


def parse_arms(names: str) -> list[Arm]:
    """Arms from ``"adamw,dopr-adamw"``.

    Raises:
        UserError: An unknown or repeated name.
    """
    arms = [Arm(name.strip().removeprefix(PREFIX), name.strip().startswith(PREFIX)) for name in names.split(",")]
    for arm in arms:
        if arm.base not in BASES:
            known = ", ".join(sorted(BASES))
            raise UserError(f"unknown optimizer {arm.name!r}; choose from {known}, each also as {PREFIX}NAME")
    if len(set(arms)) < len(arms):
        raise UserError(f"--optimizers {names}: an optimizer is named twice")
    return arms
