"""In which order are sums pooled over ranks, inverses found, and shared?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dopr_lightning.preconditioner.distributed import Gathering, Reduction, assign, rank, world_size
from dopr_lightning.preconditioner.lowrank import LowRankStack, begin_refresh
from dopr_lightning.preconditioner.stack import Stack


@dataclass(frozen=True)
class Refreshed:
    """Stacks whose new inverses wait to be accepted.

    Attributes:
        outcomes: What :meth:`Stack.accept` is to be told, on the device.
        finish: If the refresh was deferred, gives the same of the low-rank stacks.
        bytes_sent: What this rank handed to collectives.
    """

    outcomes: dict[Stack, Tensor]
    finish: Callable[[], dict[Stack, Tensor]]
    bytes_sent: int


def refresh(stacks: Sequence[Stack], group: dist.ProcessGroup | None, *, deferred: bool) -> Refreshed:
    """Pool the stacks' sums over ranks and find the inverses, each of the exact ones on one rank.

    Communication is asynchronous: the low-rank solver begins when all its sums have arrived, the others stack by stack.
    They come between its two halves, where the host would only wait for the device.

    Args:
        stacks: The same on all ranks, in the same order.
        group: The ranks.
        deferred: Leave to ``finish`` what the host does for the low-rank solver.
    """
    for stack in stacks:
        stack.close()
    with labelled("dopr::reduce"):
        reduction = Reduction([*(s.counts for s in stacks), *(s.sums for s in stacks)], group)
    shares = assign([s.blocks for s in stacks], [s.cost for s in stacks], world_size(group))
    low_rank = [stack for stack in stacks if isinstance(stack, LowRankStack)]

    def wait_for(index: int) -> None:
        reduction.wait(index)
        reduction.wait(len(stacks) + index)

    with labelled("dopr::solve"):
        for stack in low_rank:
            wait_for(stacks.index(stack))
        finish = begin_refresh(low_rank, deferred=deferred)
        outcomes = {}
        for index, stack in enumerate(stacks):
            if stack not in low_rank:
                wait_for(index)
                outcomes[stack] = stack.refresh(shares[index][rank(group)])
        if not deferred:
            outcomes |= finish()
    with labelled("dopr::reduce"):
        shared = [(i, inverses) for i, stack in enumerate(stacks) if (inverses := stack.shared) is not None]
        gathering = Gathering([inverses for _, inverses in shared], [shares[i] for i, _ in shared], group)
        renewed = Reduction([outcomes[stacks[i]][2] for i, _ in shared], group)
        for position in range(len(shared)):
            renewed.wait(position)
        gathering.wait()
    return Refreshed(outcomes, finish, reduction.bytes + gathering.bytes + renewed.bytes)


def labelled(name: str) -> AbstractContextManager[Any]:
    """A label for profilers, which costs nothing without one."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()
