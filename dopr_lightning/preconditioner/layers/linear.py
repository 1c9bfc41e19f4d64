"""Linear maps: every leading position of the input is a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dopr_lightning.preconditioner.layers.base import ConvCovariance, MatrixLayer


class LinearMap(MatrixLayer):
    """y = W z at every leading position, with a weight (outputs, features) as it stands."""

    rearranges = True
    outputs_first = True
    features: int

    def joins(self, x: Tensor) -> bool:
        return x.dim() > 1

    def vectors(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, self.features)

    def to_matrix(self, gradient: Tensor) -> Tensor:
        return gradient[None]

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0]


class Linear(LinearMap):
    """:class:`torch.nn.Linear` with any leading dimensions."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Linear, *, conv: ConvCovariance, bias: bool) -> None:
        shape = module.out_features, module.in_features
        super().__init__(name, module, shape=shape, bias="bias" if bias else None)
        self.features = module.in_features
        self.dim = self.features + self.homogeneous
