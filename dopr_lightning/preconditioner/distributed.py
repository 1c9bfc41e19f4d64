"""Pooling statistics over data-parallel ranks: one all-reduce of sums and counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in ``group`` (None: the default group); 1 where no process group exists."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sums(sums: Sequence[Tensor], counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum statistics over ranks, in place.

    Sums and counts, not means: ranks may see different numbers of rows. Every rank sends every layer, with zeros
    where a layer went unused, so ranks cannot disagree about what is sent. Symmetric sums travel as their upper
    triangle.

    Args:
        sums: Stacks of second moments, (blocks, d, d) or (blocks, d); overwritten with the totals.
        counts: Rows per layer, float64 since a long window of a convolution passes 2^24 rows.
        group: The data-parallel process group, None for the default one.

    Returns:
        The total counts.
    """
    if world_size(group) == 1:
        return counts
    packed = torch.cat([_pack(stack) for stack in sums])
    work = dist.all_reduce(packed, group=group, async_op=True)
    dist.all_reduce(counts, group=group)
    assert work is not None
    work.wait()
    for stack, values in zip(sums, packed.split([_packed_size(stack) for stack in sums]), strict=True):
        _unpack(values, stack)
    return counts


def _packed_size(stack: Tensor) -> int:
    size = stack.shape[-1]
    return stack.shape[0] * (size if stack.dim() == 2 else size * (size + 1) // 2)


def _pack(stack: Tensor) -> Tensor:
    if stack.dim() == 2:
        return stack.flatten()
    row, column = torch.triu_indices(*stack.shape[1:], device=stack.device)
    return stack[:, row, column].flatten()


def _unpack(values: Tensor, stack: Tensor) -> None:
    if stack.dim() == 2:
        stack.copy_(values.view_as(stack))
        return
    row, column = torch.triu_indices(*stack.shape[1:], device=stack.device)
    triangle = values.view(stack.shape[0], -1)
    stack[:, row, column] = triangle
    stack[:, column, row] = triangle
