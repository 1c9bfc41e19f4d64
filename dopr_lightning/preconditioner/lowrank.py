r"""Low-rank solver: the leading directions of the covariance, tracked without ever forming it.

Under damping relative to the trace only a few tens of eigenvalues exceed :math:`\lambda`, whatever the width, so the
inverse is a multiple of the identity but for them (:mod:`~dopr_lightning.preconditioner.subspace`). A refresh
accumulates :math:`\Sigma U = \frac{1}{n} Z^\top (Z U)` over micro-batches and ranks, where U is the last refresh's
basis: 4 n k d_in FLOPs and O(d_in k) memory and traffic. A step costs 4 d_out d_in r, a share 2 r / (3 n) of forward
and backward whatever the width.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from dopr_lightning.preconditioner.covariance import RunningMean, mean_over_rows, usable
from dopr_lightning.preconditioner.exact import ExactStack
from dopr_lightning.preconditioner.inverse import keep_last_good
from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.spectrum import Spectrum, spectrum_of_eigenvalues
from dopr_lightning.preconditioner.stack import Failure, Stack, StackOptions, subtract_low_rank
from dopr_lightning.preconditioner.subspace import (
    coefficients,
    nystrom,
    probe,
    random_basis,
    relative_error,
    required_rank,
    tail_mean,
)

FIRST_RANK = 48
"""Directions to start with: they meet the default tolerance on every layer of the Humanoid policies at any width
(docs/results/rank)."""

GRAIN = 16
"""Directions come and go by so many, so that shapes change rarely."""

WARM_UP = 3
"""The first so many steps all refresh: from random directions, subspace iteration takes a few to settle."""


class LowRankStack(Stack):
    """Bases (blocks, d, k), of which each layer uses as many directions as its certificate asks for.

    Attributes:
        tracked: Directions k.
        ranks: Directions in use, per layer.
        errors: Certified relative error of M with them, per layer (see
            :func:`~dopr_lightning.preconditioner.subspace.relative_error`); NaN before the first refresh.
        unattainable: The tolerance asks for more directions than :attr:`limit`.
        limit: Most directions to track: beyond a quarter of the dimension the exact solver is cheaper.
    """

    solver = "lowrank"

    def __init__(self, layers: Sequence[Layer], options: StackOptions) -> None:
        super().__init__(layers, options)
        self.ranks = [0] * len(self.layers)
        self.errors = [math.nan] * len(self.layers)
        self.limit = max(self.dim // 4, min(FIRST_RANK, self.dim))
        self.tracked = min(FIRST_RANK, self.limit)
        self.unattainable = False
        self.warned = False
        self._scales: list[float] = [1.0] * self.blocks

    @property
    def sums(self) -> Tensor:
        return self._sums

    def to_exact(self) -> ExactStack:
        """A stack with full covariances for the same layers, with the inverses and the average of this one."""
        exact = ExactStack(self.layers, self.options)
        exact.adopt(self, self.inverse())
        if self._running is not None:
            above, tail = self._above_tail()
            leading = (self._basis * above[:, None]) @ self._basis.mT
            identity = torch.eye(self.dim, dtype=self.dtype, device=self.device)
            exact.adopt_average(self, leading + tail[..., None] * identity, self._running.weight)
        return exact

    def inverse(self) -> Tensor:
        """The approximate inverses as matrices, (blocks, d, d)."""
        identity = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        return self._inverse_floor[:, None, None] * identity - self._basis @ self._right

    @property
    def addresses(self) -> Hashable:
        if not self._allocated:
            return None
        return self._left.data_ptr(), self._right.data_ptr(), self._inverse_floor.data_ptr(), self.tracked

    def apply(self, *, fixed: bool = False) -> None:
        for index, part in enumerate(self.slices):
            layer = self._dense(index)
            if not layer.has_gradient or self.refreshed_at[index] is None:
                continue
            # Directions beyond the rank have coefficients of 0.
            r = self.tracked if fixed else self.ranks[index]
            known = layer.blocks == 1 and not fixed
            scale = self._scales[part.start] if known else self._inverse_floor[part, None, None]
            gradient = layer.gradient().to(self.dtype)
            layer.write(subtract_low_rank(gradient, self._left[part, :r].mT, self._right[part, :r], scale))

    def accept(self, outcome: Sequence[Sequence[float]], step: int) -> list[Failure]:
        failed = super().accept(outcome, step)
        _, _, _, scales, errors, ranks, needed, ample = outcome
        self._scales = list(scales)
        # Layers that were not renewed still use what they have.
        most, enough = 0, max(self.ranks)
        for index, part in enumerate(self.slices):
            if self.refreshed_at[index] == step:
                self.ranks[index] = int(max(ranks[part]))
                self.errors[index] = max(errors[part])
                most, enough = max(most, int(max(needed[part]))), max(enough, int(max(ample[part])))
        if self.refreshes >= WARM_UP:
            self._fit_tracked(most, enough)
        return failed

    def spectrum(self, index: int) -> Spectrum | None:
        if not self._allocated or self.refreshed_at[index] is None:
            return None
        part = self.slices[index]
        values, trace = self._eigenvalues[part], self._trace[part]
        tail = tail_mean(values, trace, self.dim)[:, -1:].expand(-1, self.dim - values.shape[1])
        return spectrum_of_eigenvalues(torch.cat([values, tail], dim=1).sort(-1)[0])

    def _allocate(self) -> None:
        def on_host(*shape: int) -> Tensor:
            return torch.zeros(self.blocks, *shape, dtype=self.dtype)

        basis = random_basis(self.blocks, self.dim, self.tracked, seed=self.dim, device=self.device, dtype=self.dtype)
        self._eigenvalues, self._coefficients = on_host(self.tracked), on_host(self.tracked)
        # Until a first refresh succeeds no direction counts and the gradient stays as it is.
        self._trace, self._floor, self._error = on_host(), 1 + on_host(), on_host() + math.nan
        self._inverse_floor = torch.ones(self.blocks, dtype=self.dtype, device=self.device)
        self._running = RunningMean(self._inverse_floor, self.options.ema) if self.options.ema else None
        self._make_sums()
        self._make_factors(basis)

    def _make_sums(self) -> None:
        """One buffer for image and trace, so that they are one message between ranks."""
        size = self.blocks * self.dim * self.tracked
        self._sums = torch.zeros(size + self.blocks, dtype=self.dtype, device=self.device)
        self._image = self._sums[:size].view(self.blocks, self.tracked, self.dim)  # transposed
        self._trace_sums = self._sums[size:]

    def _make_factors(self, basis: Tensor) -> None:
        # Directions as contiguous rows: products with few of them take two thirds of the time (measured, CPU).
        self._left = basis.mT.contiguous()
        self._basis = self._left.mT
        self._right = torch.empty_like(self._left)
        self._derive()

    def _clear(self) -> None:
        self._sums.zero_()
        self._test = probe(self._basis, seed=self.refreshes).mT.contiguous()

    def _add(self, layer: Layer, part: slice, x: Tensor, mask: Tensor | None) -> int | Tensor:
        rows, count = self._rows(layer, x, mask)
        self._image[part].baddbmm_((rows @ self._test[part].mT).mT, rows)
        norms = torch.linalg.vector_norm(rows, dim=(1, 2))
        self._trace_sums[part].addcmul_(norms, norms)
        return count

    def refresh(self, share: slice) -> Tensor:
        mean_over_rows(self._image, self.counts)
        mean_over_rows(self._trace_sums, self.counts)
        test, image, trace = self._test.mT, self._image.mT, self._trace_sums
        valid = usable(self.counts, trace)
        new_trace = trace
        if self._running is not None:
            image, new_trace = self._blend(test, image, trace, valid)
        basis, eigenvalues, good = nystrom(test, image, new_trace)
        # What follows is small, and done on the host.
        facts = torch.stack([self.counts.double(), trace.double(), valid.double(), new_trace.double()]).cpu()
        new_trace = facts[3].to(self.dtype)
        damping = self._damping(new_trace)
        good = good & facts[2].bool() & (1 / damping).isfinite()
        # Any numbers will do where nothing can be trusted: such blocks keep what they have.
        safe_trace, damping = torch.where(good, new_trace, 1), torch.where(good, damping, 1)
        eigenvalues = torch.where(good[:, None], eigenvalues, 0)
        error = relative_error(eigenvalues, safe_trace, damping, self.dim)
        needed = required_rank(error, self.options.max_error)
        # Directions are dropped only if the others do twice as well as they must, so that they do not come back.
        ample = required_rank(error, self.options.max_error / 2)
        # Multiples of 8 take less time than the fewer directions they replace.
        rank = (-(-needed // 8) * 8).clamp(max=self.tracked)
        new_coefficients, floor = coefficients(eigenvalues, safe_trace, damping, self.dim, rank)
        for new, last in (
            (basis, self._basis),
            (eigenvalues, self._eigenvalues),
            (new_coefficients, self._coefficients),
            (safe_trace, self._trace),
            (floor, self._floor),
            (error.gather(1, rank[:, None])[:, 0], self._error),
        ):
            keep_last_good(new, last, good)
        self._derive()
        needed, ample = torch.where(good, needed, 0), torch.where(good, ample, 0)
        fields = [*facts[:2], good, 1 / self._floor, self._error, rank, needed, ample]
        return torch.stack([field.double() for field in fields])

    def _blend(self, test: Tensor, image: Tensor, trace: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Image and trace of the average over refreshes, of which the past is known as basis, eigenvalues and tail."""
        assert self._running is not None
        share = self._running.share(valid)
        above, tail = self._above_tail()
        past = tail[..., None] * test + self._basis @ (above[..., None] * (self._basis.mT @ test))
        past_trace = self._trace.to(self.device, non_blocking=True)
        return torch.lerp(past, image, share[:, None, None]), torch.lerp(past_trace, trace, share)

    def _above_tail(self) -> tuple[Tensor, Tensor]:
        """On the device, by how much the eigenvalues exceed the mean of those not tracked, (B, k), and it, (B, 1)."""
        tail = tail_mean(self._eigenvalues, self._trace, self.dim)[:, -1:]
        return (self._eigenvalues - tail).to(self.device, non_blocking=True), tail.to(self.device, non_blocking=True)

    def _derive(self) -> None:
        """Renew what :meth:`apply` reads, where it is: recorded launches (:mod:`.replay`) know it by its address."""
        self._inverse_floor.copy_(1 / self._floor, non_blocking=True)
        scale = (self._coefficients / self._floor[:, None]).to(self.device, non_blocking=True)
        torch.mul(scale[..., None], self._left, out=self._right)

    def _fit_tracked(self, needed: int, ample: int) -> None:
        """Track more directions if the tolerance asks for them, fewer if that leaves it far away."""
        self.unattainable = needed > self.tracked >= self.limit
        if needed > self.tracked and self.tracked < self.limit:
            self._track(min(self.tracked + GRAIN, self.limit))
        elif ample + GRAIN <= self.tracked - GRAIN:
            self._track(self.tracked - GRAIN)

    def _track(self, count: int) -> None:
        missing = count - self.tracked
        if missing > 0:
            tail = tail_mean(self._eigenvalues, self._trace, self.dim)[:, -1:]
            fresh = random_basis(
                self.blocks, self.dim, count, seed=self.dim + count, device=self.device, dtype=self.dtype
            )
            # Orthonormal columns that complete the basis, whose own columns come out first and up to their signs.
            basis = torch.cat(
                [self._basis, torch.linalg.qr(torch.cat([self._basis, fresh], -1))[0][..., self.tracked : count]], -1
            )
            self._eigenvalues = torch.cat([self._eigenvalues, tail.expand(-1, missing)], -1)
            self._coefficients = torch.nn.functional.pad(self._coefficients, (0, missing))
        else:
            basis = self._basis[..., :count]
            self._eigenvalues = self._eigenvalues[:, :count].clone()
            self._coefficients = self._coefficients[:, :count].clone()
        self.tracked = count
        self._make_sums()
        self._make_factors(basis)

    def _prepare_load(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        self.tracked = tensors[0]["basis"].shape[-1]
        self._allocated = False
        self.allocate()

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        super().load_state_dict(state)
        self._derive()
        self._scales = (1 / self._floor).tolist()
        self.errors = [float(self._error[part].max()) for part in self.slices]
        ranks = self._coefficients.count_nonzero(-1).tolist()
        self.ranks = [max(ranks[part]) for part in self.slices]

    def _tensors(self, index: int) -> dict[str, Tensor]:
        part = self.slices[index]
        tensors = {
            "basis": self._basis,
            "eigenvalues": self._eigenvalues,
            "coefficients": self._coefficients,
            "trace": self._trace,
            "floor": self._floor,
            "error": self._error,
        }
        if self._running is not None:
            tensors["weight"] = self._running.weight
        return {name: tensor[part] for name, tensor in tensors.items()}
