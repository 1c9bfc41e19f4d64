"""A project of its own on the toy task: ``python -m toy_project fit ...`` trains its policy on its data."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from toy_task import ToyTask

from dopr_lightning.cli import main
from dopr_lightning.data import Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.policies.algorithms import Regression
from dopr_lightning.policies.module import Batch, PolicyModule
from dopr_lightning.project import Project


class Policy(PolicyModule):
    """Weights its loss, and says so in its checkpoints.

    Args:
        weight: Of the loss.
        arguments: Of PolicyModule.
    """

    def __init__(self, weight: float = 1.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.weight = weight

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.weight * super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["weight"], checkpoint["world"] = self.weight, self.trainer.world_size


class PassesOver(PolicyModule):
    """Leaves the first batch of each epoch out."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return super().training_step(batch, batch_idx) if batch_idx else None


class Regresses(PolicyModule):
    """Leaves no choice of its algorithm."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(algorithm=Regression(), **arguments)


class Manual(PolicyModule):
    """Optimises by hand, and tells Lightning no loss."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


class Data(DemonstrationData):
    """Needs no source to be named.

    Args:
        source: Of the demonstrations.
        arguments: Of DemonstrationData.
    """

    def __init__(self, source: Source = ToyTask(), **arguments: Any) -> None:  # noqa: B008  # read only
        super().__init__(source, **arguments)


# When it runs, its classes are to be found by others under the name of the module, not of the program.
if __name__ == "__main__":
    import toy_project

    sys.exit(main(project=Project(toy_project.Policy, toy_project.Data, command="python -m toy_project")))
