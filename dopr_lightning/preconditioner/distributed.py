"""What ranks tell each other on a refresh: sums of statistics, and the inverses each of them computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20
"""As large as DistributedDataParallel's buckets: small tensors share a message, large ones start on their own."""


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in ``group`` (None: the default group); 1 where no process group exists."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in ``group``; 0 where no process group exists."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


class Reduction:
    """Sums over ranks, in flight.

    Sums and counts travel, not means: ranks may see different numbers of rows. Every rank sends every layer, with
    zeros where a layer went unused, so ranks cannot disagree about what is sent.

    Args:
        tensors: Contiguous tensors to be overwritten with their sums over ranks.
        group: The data-parallel process group, None for the default one.

    Attributes:
        bytes: Bytes handed to the collectives.
    """

    def __init__(self, tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        self.bytes = 0
        self._buckets: dict[int, _Bucket] = {}
        if world_size(group) == 1:
            return
        for members in bucketise(tensors):
            parts = [tensors[i] for i in members]
            flat = parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
            work = dist.all_reduce(flat, group=group, async_op=True)
            assert work is not None
            bucket = _Bucket(parts, flat, work)
            self._buckets.update(dict.fromkeys(members, bucket))
            self.bytes += flat.nbytes

    def wait(self, index: int) -> None:
        """Return when tensor ``index`` holds its sum."""
        if index in self._buckets:
            self._buckets[index].wait()


@dataclass
class _Bucket:
    parts: list[Tensor]
    flat: Tensor
    work: dist.Work | None

    def wait(self) -> None:
        if self.work is None:
            return
        self.work.wait()
        self.work = None
        if len(self.parts) > 1:
            for part, values in zip(self.parts, self.flat.split([part.numel() for part in self.parts]), strict=True):
                part.copy_(values.view_as(part))


def bucketise(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of consecutive tensors of one dtype and device, at most :data:`BUCKET_BYTES` together unless alone."""
    buckets: list[list[int]] = []
    size = 0
    for index, tensor in enumerate(tensors):
        last = tensors[buckets[-1][-1]] if buckets else None
        fits = last is not None and last.dtype == tensor.dtype and last.device == tensor.device
        if fits and size + tensor.nbytes <= BUCKET_BYTES:
            buckets[-1].append(index)
            size += tensor.nbytes
        else:
            buckets.append([index])
            size = tensor.nbytes
    return buckets


def assign(counts: Sequence[int], costs: Sequence[float], ranks: int) -> list[list[slice]]:
    """Share inverses among ranks by their cost.

    Longest processing time first (as KAISA, arXiv 2107.01739): each inverse in turn, dearest first, goes to the rank
    with the least work so far. Inverses of one stack are interchangeable, so each rank's are made neighbours.

    Args:
        counts: Inverses per stack.
        costs: Cost of one inverse per stack, in any unit; 0 for a stack that every rank does itself.
        ranks: Number of ranks.

    Returns:
        Per stack, per rank: the slice of inverses it computes. Slices of a stack follow each other.
    """
    load = [0.0] * ranks
    shares: list[list[slice]] = [[slice(0, count)] * ranks for count in counts]
    for stack in sorted(range(len(counts)), key=lambda i: -costs[i]):
        if costs[stack] == 0:
            continue
        given = [0] * ranks
        for _ in range(counts[stack]):
            idlest = min(range(ranks), key=load.__getitem__)
            load[idlest] += costs[stack]
            given[idlest] += 1
        ends = [sum(given[: i + 1]) for i in range(ranks)]
        shares[stack] = [slice(end - n, end) for end, n in zip(ends, given, strict=True)]
    return shares


class Gathering:
    """Inverses in flight from the ranks that computed them to all others.

    Args:
        tensors: Per stack, the inverses (blocks, d, d), of which this rank has computed its own slice.
        shares: Per stack, per rank: who has computed what, from :func:`assign`.
        group: The process group the ranks are numbered in.

    Attributes:
        bytes: Bytes handed to the collectives.
    """

    def __init__(
        self, tensors: Sequence[Tensor], shares: Sequence[Sequence[slice]], group: dist.ProcessGroup | None
    ) -> None:
        self.bytes = 0
        self._works: list[dist.Work | None] = []
        if world_size(group) == 1:
            return
        for tensor, slices in zip(tensors, shares, strict=True):
            for source, part in enumerate(slices):
                if part.start == part.stop:
                    continue
                piece = tensor[part]
                self._works.append(dist.broadcast(piece, group=group, group_src=source, async_op=True))
                self.bytes += piece.nbytes

    def wait(self) -> None:
        """Return when every inverse has arrived."""
        for work in self._works:
            assert work is not None
            work.wait()
        self._works.clear()
