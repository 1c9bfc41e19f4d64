"""Whose policy and data do the verbs train? The library's, or those of a project of your own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dopr_lightning.data.module import DemonstrationData
    from dopr_lightning.policies.module import PolicyModule


@dataclass(frozen=True)
class Project:
    """What is trained under a command of your own: ``main(project=Project(policy=Policy, command="my-robot"))``.

    Every verb takes it along, into worker processes by reference: the classes must be importable there.

    Args:
        policy: The LightningModule; None for the library's. What its ``__init__`` takes beyond that can be configured.
        data: The LightningDataModule; None for the library's.
        command: What is typed to run it, for help and errors.
    """

    policy: type[PolicyModule] | None = None
    data: type[DemonstrationData] | None = None
    command: str = "dopr"

    @property
    def classes(self) -> dict[str, str]:
        """Names of its own classes: they decide what a run finds, as its configuration does."""
        own = {"policy": self.policy, "data": self.data}
        return {key: f"{cls.__module__}.{cls.__qualname__}" for key, cls in own.items() if cls is not None}


LIBRARY = Project()
