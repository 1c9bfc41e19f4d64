r"""Which rows does a layer's weight multiply, and how does its gradient look as a matrix over them?

Every covered layer computes, perhaps after a rearrangement, :math:`y = W z` for many rows :math:`z`. A
:class:`Layer` says what these rows are, and shows the gradient as the matrix :math:`G` whose columns are the
coordinates of :math:`z`, so that :math:`M = G (\Sigma + \lambda I)^{-1}` is the same product for all of them.
A new layer type is one class, made known by :func:`register_layer`.
"""

from dopr_lightning.preconditioner.layers.base import ConvCovariance, DenseLayer, DiagonalLayer, Layer, MatrixLayer
from dopr_lightning.preconditioner.layers.blocks import BlockDiagonal
from dopr_lightning.preconditioner.layers.registry import (
    layer_types,
    layers_of,
    named_modules,
    not_covered,
    public_name,
    register_layer,
)

__all__ = [
    "BlockDiagonal",
    "ConvCovariance",
    "DenseLayer",
    "DiagonalLayer",
    "Layer",
    "MatrixLayer",
    "layer_types",
    "layers_of",
    "named_modules",
    "not_covered",
    "public_name",
    "register_layer",
]
