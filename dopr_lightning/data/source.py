"""What a task is: demonstrations, and the environment they were given in."""

from __future__ import annotations

from abc import ABC, abstractmethod

from dopr_lightning.data.convention import Convention
from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.environment import EnvironmentSpec


class Source(ABC):
    """Subclass this to bring your own task; ``__init__`` takes plain values and reads nothing."""

    @property
    @abstractmethod
    def environment(self) -> EnvironmentSpec | None:
        """The environment to roll policies out in; None as long as there is none."""

    @abstractmethod
    def load(self) -> Demonstrations:
        """Read, or make, the demonstrations.

        Raises:
            UserError: They are missing or damaged.
        """

    def convention(self) -> Convention:
        """What the numbers mean; by default only that they are the environment's own.

        Raises:
            UserError: The demonstrations, which say so, are missing or damaged.
        """
        return Convention()
