r"""Sharded weights: which part of a gradient is here, may it be preconditioned here, and whose rows count?

:math:`M = G (\Sigma + \lambda I)^{-1}` treats every row of G alike. So each rank rewrites the rows of its own shard
with the inverse that all ranks share, and no gradient is gathered: under FSDP2 and column-wise tensor parallelism,
which give each rank some of a layer's outputs, that is all there is to do. What splits a layer's input among ranks is
refused.

Statistics are pooled over all ranks that hold the model, those of one tensor-parallel group too. Where these see the
same rows, sums and counts both grow by the number of ranks and the mean stays what it is; where they see different ones
(sequence parallelism) their rows belong together; and in both cases they get the same inverse to the last bit, so that
replicated weights cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which it shares memory with; empty on ranks that an uneven split leaves without.

    A gradient of which each rank holds a summand (``Partial``) is served as well: the product is linear in it.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_offset(tensor: Tensor) -> int:
    """The index that the first row of :func:`local` has in the whole tensor; 0 if the tensor is whole."""
    if not isinstance(tensor, DTensor):
        return 0
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]


def check_sharding(name: str, weight: Tensor, to_matrix: Callable[[Tensor], Tensor]) -> None:
    """Refuse a weight whose shards are not whole rows of its gradient's matrix.

    Args:
        name: The weight's public name.
        weight: The weight, sharded or not.
        to_matrix: Rearranges a tensor of the weight's shape into the matrix (blocks, m, features), as the layer does
            with the gradient.

    Raises:
        ValueError: Names the weight, and the way out.
    """
    if not isinstance(weight, DTensor):
        return
    # Not isinstance(placement, Shard): FSDP2 on top of tensor parallelism has a placement type of its own.
    dims = {
        placement.dim
        for size, placement in zip(weight.device_mesh.shape, weight.placements, strict=True)
        if size > 1 and hasattr(placement, "dim")
    }
    refused = [dim for dim in sorted(dims) if not _splits_rows(weight.shape, dim, to_matrix)]
    if not refused:
        return
    sharded = f"{name}: its shape {tuple(weight.shape)} is sharded along dimension {refused[0]}"
    for dim in range(weight.dim()):
        if _splits_rows(weight.shape, dim, to_matrix):
            raise ValueError(
                f"{sharded}, so its gradient would have to be gathered to meet the inverse covariance of its input. "
                f"Shard it along dimension {dim} (ColwiseParallel in place of RowwiseParallel, or "
                f"fully_shard(..., shard_placement_fn=lambda parameter: Shard({dim}))), or exclude the module."
            )
    raise ValueError(f"{sharded}, which gives ranks unequal parts of its groups. Exclude the module.")


def _splits_rows(shape: torch.Size, dim: int, to_matrix: Callable[[Tensor], Tensor]) -> bool:
    """Whether a part of a weight along ``dim`` holds whole rows of its matrix, and the same rows of every block."""
    if dim > 1:  # a convolution counts the taps of its kernel
        return False
    index = torch.arange(shape[dim]).view(-1, *[1] * (len(shape) - dim - 1)).expand(shape)
    matrix = to_matrix(index)
    return torch.equal(matrix.amin((0, 2)), matrix.amax((0, 2)))


def reshard(model: nn.Module) -> None:
    """Let ``model`` show its weights as its optimizer has them.

    FSDP2 leaves the weights of its outermost module gathered after a forward without a backward: other objects, which
    neither tell how they are sharded nor ever receive a gradient.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
