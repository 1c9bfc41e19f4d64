"""A Linear layer: every leading position is a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dopr_lightning.preconditioner.layers.base import ConvCovariance, MatrixLayer


class Linear(MatrixLayer):
    """:class:`torch.nn.Linear` with any leading dimensions: every leading position is a row."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Linear, *, conv: ConvCovariance, bias: bool) -> None:
        shape = module.out_features, module.in_features
        super().__init__(name, module, shape=shape, bias="bias" if bias else None)
        self.features = module.in_features
        self.dim = self.features + self.homogeneous

    def vectors(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, self.features)

    def to_matrix(self, gradient: Tensor) -> Tensor:
        return gradient[None]

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0]
