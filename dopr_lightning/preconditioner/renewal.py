"""What does a refresh of the low-rank solver find out, of all covariances with equally many directions at once?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dopr_lightning.preconditioner.certificate import (
    Floats,
    Ints,
    coefficients,
    relative_error,
    required_rank,
    tail_mean,
)
from dopr_lightning.preconditioner.covariance import collected, usable
from dopr_lightning.preconditioner.subspace import SHIFT, core_eigenpairs
from dopr_lightning.preconditioner.threads import ToHost, in_background, pinned

if TYPE_CHECKING:
    from dopr_lightning.preconditioner.lowrank import LowRankStack


class Known(NamedTuple):
    """What is known of B covariances of which k directions are tracked: arrays, or tensors on the host.

    Attributes:
        eigenvalues: (B, k).
        coefficients: Of the directions in the update, relative to the floor's, (B, k); 0 beyond the rank in use.
        trace: (B,).
        floor: lambda', the damping with the mean of the eigenvalues that are not tracked, (B,).
        error: Certified relative error of M, (B,).
        weight: Of the average over refreshes, (B,).
    """

    eigenvalues: Any
    coefficients: Any
    trace: Any
    floor: Any
    error: Any
    weight: Any


NUMBERS = 4
"""Of :class:`Known`, those that are no vectors of k."""


class Renewal:
    """One refresh of stacks on one device that track equally many directions.

    What is k x k per covariance is done on the host, for all of them at once: stack by stack it would be some 300 small
    operators each. Numbers there are arrays in float64, see :mod:`~.certificate`. The host waits for the device once,
    in :meth:`solve`.

    Args:
        stacks: Whose sums are complete, or will be by what is queued. Their projections are queued.
    """

    def __init__(self, stacks: Sequence[LowRankStack]) -> None:
        self.stacks = stacks
        self.device, self.dtype = stacks[0].device, stacks[0].dtype
        self.tracked, self.options = stacks[0].tracked, stacks[0].options
        self.sizes = [stack.blocks for stack in stacks]
        # Of this thread: another may be held to fewer.
        self.workers = torch.get_num_threads() if _host_is_idle(self.device) else 1
        self.dims = np.repeat([stack.dim for stack in stacks], self.sizes)
        known = np.concatenate([stack.known.numpy() for stack in stacks])
        self.number, self.last = known.dtype, known.astype(np.float64)
        last = known_fields(self.last, self.tracked)
        self.weight, share = collected(last.weight, self.options.ema)  # without ema, all of it new
        above, tail = above_tail(last.eigenvalues, last.trace, self.dims)
        kept = (1 - share)[:, None]
        past = np.concatenate([share[:, None], kept * last.trace[:, None], kept * tail, kept * above], axis=1)
        facts, numbers = self._factors(self._upload(pinned(torch.from_numpy(past), self.device)))
        self.images, cores = zip(
            *(stack.project(part) for stack, part in zip(stacks, numbers.split(self.sizes), strict=True)), strict=True
        )
        self._download = ToHost(facts, torch.cat(cores, dim=1))

    def _factors(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """What the average is made of: factors of the sums, of the identity and of each direction, (B, 2 + k).

        In units of its trace, and on the device, where the sums are. Returned second; first comes what :meth:`solve`
        needs to know, (3, B): rows, this refresh's trace, and that of the average.

        Args:
            past: The new statistics' share, and of the past, times its own: trace, tail, and eigenvalues above that.
        """
        share, kept_trace, kept = past[:, 0], past[:, 1], past[:, 2:]
        rows = torch.cat([stack.counts for stack in self.stacks]).double()
        per_row = rows.clamp(min=1).reciprocal()
        seen = torch.cat([stack.trace_sums for stack in self.stacks]).double() * per_row
        average = torch.addcmul(kept_trace, share, seen)
        # What is not usable divides by anything: such blocks keep what they have.
        numbers = torch.cat([(share * per_row)[:, None], kept], dim=1) / average[:, None]
        numbers[:, 1] += SHIFT
        return torch.stack([rows, seen, average]), numbers.to(self.dtype)

    def begin(self, deferred: bool) -> Callable[[], Solution]:
        """:meth:`solve`, to be called; if that is later, and the host idle until then, a thread has begun with it."""
        return in_background(self.solve, self.device) if deferred and _host_is_idle(self.device) else self.solve

    def solve(self) -> Solution:
        """What the host does, for :meth:`adopt`; may run in a thread of its own."""
        options = self.options
        facts, core_and_gram = self._download.wait()
        rows, seen, trace = facts.numpy()
        damping, fresh = self._damping(trace), self._damping(seen)
        valid = usable(trace, damping, self.dtype) & usable(seen, fresh, self.dtype)
        # A piece that is nothing beside the others: its inverse is 1 / lambda, and it keeps the directions it has.
        negligible = valid & (trace <= torch.finfo(self.dtype).eps * damping)
        found, rotation, trusted = core_eigenpairs(
            core_and_gram, torch.from_numpy(valid & ~negligible), workers=self.workers
        )
        resolved = trusted.numpy()
        good = resolved | negligible
        # Any numbers will do where nothing can be trusted: such blocks keep what they have.
        trace, damping = np.where(good, trace, 1), np.where(good, damping, 1)
        eigenvalues = np.where(resolved[:, None], found.numpy() * trace[:, None], 0)
        error = relative_error(eigenvalues, np.where(resolved, trace, 1), np.where(resolved, damping, 1), self.dims)
        error[negligible] = 0
        needed = required_rank(error, options.max_error)
        # Directions are dropped only if the others do twice as well as they must, so that they do not come back.
        ample = required_rank(error, options.max_error / 2)
        # Multiples of 8 take less time than the fewer directions they replace.
        rank = np.minimum(-(-needed // 8) * 8, self.tracked)
        c, floor = coefficients(eigenvalues, trace, damping, self.dims, rank)
        numbers = np.stack([trace, floor, np.take_along_axis(error, rank[:, None], 1)[:, 0], self.weight], axis=1)
        new = np.concatenate([eigenvalues, c, numbers], axis=1)
        with np.errstate(over="ignore"):  # a floor that is infinite leaves nothing of the gradient
            known = np.where(good[:, None], new, self.last).astype(self.number)
        derived, fields = multipliers(known, self.tracked), known_fields(known, self.tracked)
        used = np.count_nonzero(fields.coefficients, axis=-1)
        outcome = [rows, seen, good, derived[:, -1], fields.error, used, needed * good, ample * good]
        return Solution(
            rotation=pinned(rotation, self.device),
            known=torch.from_numpy(known),
            derived=pinned(torch.from_numpy(derived), self.device),
            resolved=None if resolved.all() else pinned(trusted, self.device),
            outcome=torch.from_numpy(np.stack(outcome)),
        )

    def adopt(self, solution: Solution) -> Iterable[tuple[LowRankStack, Tensor]]:
        """Renew the stacks; returns what their :meth:`LowRankStack.accept` is told."""
        parts = zip(
            self.stacks,
            self.images,
            self._upload(solution.rotation).split(self.sizes),
            solution.known.split(self.sizes),
            self._upload(solution.derived).split(self.sizes),
            [None] * len(self.stacks)
            if solution.resolved is None
            else self._upload(solution.resolved).split(self.sizes),
            strict=True,
        )
        for stack, *part in parts:
            stack.renew(*part)
        return zip(self.stacks, solution.outcome.split(self.sizes, dim=1), strict=True)

    def _damping(self, traces: Floats) -> Floats:
        parts = zip(self.stacks, torch.from_numpy(traces).split(self.sizes), strict=True)
        return torch.cat([stack.damping(part) for stack, part in parts]).numpy()

    def _upload(self, numbers: Tensor) -> Tensor:
        """To the device in one piece."""
        return numbers.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Solution:
    """What :meth:`Renewal.solve` has found, on the host, blocks first but in ``outcome``.

    Attributes:
        rotation: (B, k, k), see :meth:`LowRankStack.renew`, as for the next three.
        known: (B, 2 k + 4).
        derived: (B, k + 1).
        resolved: (B,), or None where all are.
        outcome: What :meth:`LowRankStack.accept` is told, (8, B).
    """

    rotation: Tensor
    known: Tensor
    derived: Tensor
    resolved: Tensor | None
    outcome: Tensor


def _host_is_idle(device: torch.device) -> bool:
    """Whether the host's cores have little to do in a step of training."""
    return device.type != "cpu"


def known_fields(known: Any, tracked: int) -> Known:
    """Views of an array or a tensor (B, 2 k + 4), by name."""
    return Known(known[:, :tracked], known[:, tracked : 2 * tracked], *known[:, 2 * tracked :].T)


def multipliers(known: NDArray[Any], tracked: int) -> NDArray[Any]:
    """What the update multiplies with: each direction's coefficient, and 1, divided by the floor, (B, k + 1)."""
    fields = known_fields(known, tracked)
    return np.concatenate([fields.coefficients, np.ones_like(fields.floor)[:, None]], axis=1) / fields.floor[:, None]


def above_tail(eigenvalues: Floats, trace: Floats, dim: int | Ints) -> tuple[Floats, Floats]:
    """By how much the eigenvalues exceed the mean of those not tracked, (B, k), and that, (B, 1)."""
    tail = tail_mean(eigenvalues, trace, dim)[:, -1:]
    return eigenvalues - tail, tail
