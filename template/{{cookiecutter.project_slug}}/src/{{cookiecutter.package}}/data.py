"""The demonstrations."""

from pathlib import Path

import lightning as L
import numpy as np
import torch
from dopr_lightning.errors import UserError
from torch.utils.data import DataLoader, TensorDataset


class Demonstrations(L.LightningDataModule):
    """Batches of (observation, action) in random order.

    Args:
        path: An .npz file with `observations` (steps, observation_dim) and `actions`
            (steps, action_dim).
        batch_size: Steps per batch.
    """

    def __init__(self, path: Path, batch_size: int = 256) -> None:
        super().__init__()
        if not path.is_file():
            raise UserError(f"{path}: no such file; see README.md for how to write one")
        with np.load(path, allow_pickle=False) as file:
            if missing := {"observations", "actions"} - set(file):
                raise UserError(f"{path}: lacks {' and '.join(sorted(missing))}")
            self.observations = torch.from_numpy(file["observations"]).float()
            self.actions = torch.from_numpy(file["actions"]).float()
        self.batch_size = batch_size
        self.observation_dim = self.observations.shape[1]
        self.action_dim = self.actions.shape[1]

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        dataset = TensorDataset(self.observations, self.actions)
        return DataLoader(dataset, self.batch_size, shuffle=True)
