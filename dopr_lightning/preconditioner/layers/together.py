"""The gradients of several layers alike, in as few operators as those of one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dopr_lightning.preconditioner.layers.base import DenseLayer, MatrixLayer


def one_shape(layers: Sequence[DenseLayer]) -> bool:
    """Whether what is here of the gradients is of one shape: shards of weights of one shape may differ in size."""
    return len({layer.weight_gradient.shape for layer in layers}) == 1


def gradients(layers: Sequence[DenseLayer]) -> Tensor:
    """:meth:`DenseLayer.gradient` of layers of one kind and :func:`one_shape`, side by side, (blocks, m, d)."""
    rearranging = _for_all(layers)
    if rearranging is None:
        return torch.cat([layer.gradient() for layer in layers])
    matrix = rearranging.to_matrix(torch.cat([layer.weight_gradient for layer in layers]))
    return matrix.unflatten(1, (len(layers), matrix.shape[1] // len(layers)))[0]


def write(layers: Sequence[DenseLayer], matrices: Tensor) -> None:
    """Put matrices shaped like :func:`gradients` back."""
    rearranging = _for_all(layers)
    if rearranging is None:
        for layer, part in zip(layers, matrices.split([layer.blocks for layer in layers]), strict=True):
            layer.write(part)
        return
    into = [layer.weight_gradient for layer in layers]
    outputs, *rest = into[0].shape  # 0 of them, where there are more ranks than outputs
    together = rearranging.to_weight(matrices.flatten(0, 1)[None], torch.Size([len(into) * outputs, *rest]))
    torch._foreach_copy_(into, together.unflatten(0, (len(into), outputs)).unbind())


def _for_all(layers: Sequence[DenseLayer]) -> MatrixLayer | None:
    """The layer that rearranges the gradients of all, one behind the other, if one can."""
    able = [layer for layer in layers if isinstance(layer, MatrixLayer) and layer.outputs_first]
    if len(able) < len(layers) or able[0].blocks > 1 or able[0].homogeneous:
        return None
    ways = {(type(layer).to_matrix, type(layer).to_weight) for layer in able}
    return able[0] if len(ways) == 1 else None
