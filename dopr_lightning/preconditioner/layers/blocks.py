"""A wide layer's covariance in equal diagonal pieces, so that no piece is larger than one can afford."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dopr_lightning.preconditioner.layers.base import DenseLayer


class BlockDiagonal(DenseLayer):
    """A dense layer whose coordinates are split into consecutive pieces with a covariance each.

    The pieces are the fewest of at most ``max_dim`` coordinates, all of one size. Where the coordinates do not divide
    evenly, the last piece of each block ends with coordinates that are always 0: their covariance is 0, so damping
    keeps them apart from the others, and they add nothing to the trace.

    The pieces of a block share the damping that it has as a whole, so where its covariance is block-diagonal nothing is
    lost, and a piece of small inputs is whitened no more than it would be beside the others.

    Args:
        layer: The layer.
        max_dim: Largest size of a covariance, less than the layer's.
    """

    def __init__(self, layer: DenseLayer, max_dim: int) -> None:
        self.layer = layer
        self.kind = layer.kind
        self.functional = layer.functional
        self.rearranges = layer.rearranges
        self.name = layer.name
        self.modules = layer.modules
        self.homogeneous = layer.homogeneous
        self.key = layer.key
        self._prefix, self._weight, self._bias = layer._prefix, layer._weight, layer._bias
        self._weight_span = layer._weight_span
        self.pieces = -(-layer.dim // max_dim)
        self.dim = -(-layer.dim // self.pieces)
        self.blocks = layer.blocks * self.pieces

    @property
    def whole_dim(self) -> int:
        return self.layer.dim

    @property
    def rearrangement(self) -> Hashable:
        return super().rearrangement, self.layer.rearrangement

    def positions(self, mask: Tensor) -> Tensor:
        return self.layer.positions(mask)

    def grid(self, x: Tensor) -> tuple[int, ...]:
        return self.layer.grid(x)

    def joins(self, x: Tensor) -> bool:
        return self.layer.joins(x)

    def check_sharding(self) -> None:
        self.layer.check_sharding()

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        return self.layer.input(args, kwargs)

    def rows(self, x: Tensor) -> Tensor:
        return self._split(self.layer.rows(x))

    def gradient(self) -> Tensor:
        return self._split(self.layer.gradient())

    def write(self, matrix: Tensor) -> None:
        matrix = matrix.unflatten(0, (self.layer.blocks, self.pieces)).transpose(1, 2).flatten(2)
        self.layer.write(matrix[..., : self.layer.dim])

    def _split(self, matrix: Tensor) -> Tensor:
        """(blocks, n, d) -> (blocks * pieces, n, size)."""
        padding = self.pieces * self.dim - self.layer.dim
        if padding:
            matrix = F.pad(matrix, (0, padding))
        return matrix.unflatten(2, (self.pieces, self.dim)).transpose(1, 2).flatten(0, 1)
