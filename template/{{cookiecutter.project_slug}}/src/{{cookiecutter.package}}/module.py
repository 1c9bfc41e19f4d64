"""The policy: its network, its loss, its optimizer."""

import lightning as L
from dopr_lightning import configure_optimizers
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn


class Policy(L.LightningModule):
    """Behaviour cloning: an MLP from an observation to the expert's action.

    Args:
        observation_dim: Numbers in an observation.
        action_dim: Numbers in an action.
        width: Units per hidden layer.
        lr: Learning rate at the start; it falls to 0 along a cosine.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, width: int = 256, lr: float = {{ {"adamw": "1e-3", "muon": "3e-3", "sgd": "1e-2"}[cookiecutter.base_optimizer] }}
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.network = nn.Sequential(
            nn.Linear(observation_dim, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, action_dim),
        )

    def forward(self, observation: Tensor) -> Tensor:
        return self.network(observation)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        observation, action = batch
        loss = nn.functional.mse_loss(self(observation), action)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        base = "{{ cookiecutter.base_optimizer }}"
        return configure_optimizers(self, base=base, lr=self.lr, schedule="cosine")
