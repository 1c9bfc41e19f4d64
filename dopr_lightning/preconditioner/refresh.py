"""In which order are sums pooled over ranks, inverses found, and shared?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from dopr_lightning.preconditioner.distributed import Gathering, Reduction, assign, rank, world_size
from dopr_lightning.preconditioner.lowrank import LowRankStack
from dopr_lightning.preconditioner.stack import FinishRefresh, Stack


@dataclass(frozen=True)
class Refreshed:
    """Stacks whose new inverses wait to be accepted.

    Attributes:
        outcomes: What :meth:`Stack.accept` is to be told, on the device.
        finish: Gives the same of stacks that are not done yet, see :meth:`Stack.begin_refresh`.
        bytes_sent: What this rank handed to collectives.
    """

    outcomes: dict[Stack, Tensor]
    finish: FinishRefresh
    bytes_sent: int


def refresh(stacks: Sequence[Stack], group: dist.ProcessGroup | None, *, deferred: bool) -> Refreshed:
    """Pool the stacks' sums over ranks and find the inverses, each of the exact ones on one rank.

    Communication is asynchronous: a kind of stack begins when what it needs has arrived.

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
    mine = [share[rank(group)] for share in shares]

    def due(kind: type[Stack]) -> Iterator[tuple[Stack, slice]]:
        for index, stack in enumerate(stacks):
            if type(stack) is kind:
                reduction.wait(index)
                reduction.wait(len(stacks) + index)
                yield stack, mine[index]

    with labelled("dopr::solve"):
        kinds = dict.fromkeys(type(stack) for stack in stacks)
        finish = {kind: kind.begin_refresh(due(kind), deferred=deferred) for kind in kinds}
        later = finish.pop(LowRankStack, dict) if deferred else dict
        outcomes = {stack: outcome for kind in finish for stack, outcome in finish[kind]().items()}
    with labelled("dopr::reduce"):
        shared = [(i, inverses) for i, stack in enumerate(stacks) if (inverses := stack.shared) is not None]
        gathering = Gathering([inverses for _, inverses in shared], [shares[i] for i, _ in shared], group)
        renewed = Reduction([outcomes[stacks[i]][2] for i, _ in shared], group)
        for position in range(len(shared)):
            renewed.wait(position)
        gathering.wait()
    return Refreshed(outcomes, later, reduction.bytes + gathering.bytes + renewed.bytes)


def labelled(name: str) -> AbstractContextManager[Any]:
    """A label for profilers, which costs nothing without one."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()
