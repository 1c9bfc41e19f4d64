r"""Low-rank solver: the leading directions of the covariance, tracked without ever forming it.

Under damping relative to the trace only a few tens of eigenvalues exceed :math:`\lambda`, whatever the width, so the
inverse is a multiple of the identity but for them (:mod:`~dopr_lightning.preconditioner.subspace`). A refresh
accumulates :math:`\Sigma U = \frac{1}{n} Z^\top (Z U)` over micro-batches and ranks, where U is the last refresh's
basis: 4 n k d_in FLOPs and O(d_in k) memory and traffic. A step costs 4 d_out d_in r, a share 2 r / (3 n) of forward
and backward whatever the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dopr_lightning.preconditioner.exact import ExactStack
from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.layers.together import gradients, one_shape, write
from dopr_lightning.preconditioner.renewal import NUMBERS, Known, Renewal, above_tail, known_fields, multipliers
from dopr_lightning.preconditioner.spectrum import Spectrum, spectrum_of_eigenvalues
from dopr_lightning.preconditioner.stack import Failure, Stack, StackOptions, subtract_low_rank
from dopr_lightning.preconditioner.subspace import probe, products, random_basis

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
        known: What is known of the covariances, on the host: :class:`~.renewal.Known` side by side, (B, 2 k + 4).
        ranks: Directions in use, per layer.
        errors: Certified relative error of M with them, per layer (see
            :func:`~dopr_lightning.preconditioner.certificate.relative_error`); NaN before the first refresh.
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
        self._updates: list[tuple[Tensor, Tensor, Tensor | float]] = []  # made once per refresh, used at every step

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_updates": []}  # pickled views would come back as tensors of their own

    @property
    def sums(self) -> Tensor:
        return self._sums

    @property
    def trace_sums(self) -> Tensor:
        """Sums of the rows' squares, (blocks,), part of :attr:`sums`."""
        return self._sums[-self.blocks :]

    @property
    def _image(self) -> Tensor:
        """That of the test vectors, transposed, (blocks, k, d), the other part."""
        return self._sums[: -self.blocks].view(self.blocks, self.tracked, self.dim)

    @property
    def _basis(self) -> Tensor:
        return self._left.mT

    @property
    def _fields(self) -> Known:
        return known_fields(self.known, self.tracked)

    def to_exact(self) -> ExactStack:
        """A stack with full covariances for the same layers, with the inverses and the average of this one."""
        exact = ExactStack(self.layers, self.options)
        exact.adopt(self, self.inverse())
        if self.options.ema:
            above, tail = (part.to(self.device) for part in self._above_tail())
            leading = (self._basis * above[:, None]) @ self._basis.mT
            identity = torch.eye(self.dim, dtype=self.dtype, device=self.device)
            exact.adopt_average(leading + tail[..., None] * identity, self._fields.weight.to(self.device))
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
        if not (fixed or self._updates):
            self._updates = [self._update(index) for index in range(len(self.layers))]
        for run in self.runs if fixed else [[index] for index in range(len(self.layers))]:
            present = [i for i in run if self.layers[i].has_gradient and self.records[i].refreshed_at is not None]
            layers = [self._dense(i) for i in present]
            if len(present) == len(run) > 1 and one_shape(layers):
                part = slice(self.slices[run[0]].start, self.slices[run[-1]].stop)
                write(layers, subtract_low_rank(gradients(layers).to(self.dtype), *self._fixed_update(part)))
                continue
            for i, layer in zip(present, layers, strict=True):
                update = self._fixed_update(self.slices[i]) if fixed else self._updates[i]
                layer.write(subtract_low_rank(layer.gradient().to(self.dtype), *update))

    def _update(self, index: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """What :func:`subtract_low_rank` does to the gradient of a layer: left, right, scale."""
        part, r = self.slices[index], self.ranks[index]
        one = self.layers[index].blocks == 1
        scale = self._scales[part.start] if one else self._inverse_floor[part, None, None]
        return self._left[part, :r].mT, self._right[part, :r], scale

    def _fixed_update(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The same for some blocks, of tensors only: a recording would keep a number of the host as it was."""
        # Directions beyond the rank have coefficients of 0.
        return self._left[part].mT, self._right[part], self._inverse_floor[part, None, None]

    def refresh(self, share: slice) -> Tensor:
        return begin_refresh([self])()[self]

    def accept(self, outcome: Sequence[Sequence[float]], step: int) -> list[Failure]:
        failed = super().accept(outcome, step)
        _, _, _, scales, errors, ranks, needed, ample = outcome
        self._scales = list(scales)
        # Blocks that were not renewed still use what they have.
        self.ranks = [int(max(ranks[part])) for part in self.slices]
        most, enough = 0, max(self.ranks)
        for index, part in enumerate(self.slices):
            if self.records[index].refreshed_at == step:
                self.errors[index] = worst(errors[part])
                most, enough = max(most, int(max(needed[part]))), max(enough, int(max(ample[part])))
        if self.refreshes >= WARM_UP:
            self._fit_tracked(most, enough)
        self._updates = []
        return failed

    def spectrum(self, index: int) -> Spectrum | None:
        if not self._allocated or self.records[index].refreshed_at is None:
            return None
        part = self.slices[index]
        values, tail = self._fields.eigenvalues[part], self._above_tail()[1][part].expand(-1, self.dim - self.tracked)
        return spectrum_of_eigenvalues(torch.cat([values, tail], dim=1).sort(-1)[0])

    def _allocate(self) -> None:
        basis = random_basis(self.blocks, self.dim, self.tracked, seed=self.dim, device=self.device, dtype=self.dtype)
        # Until a first refresh succeeds no direction counts and the gradient stays as it is.
        self.known = torch.zeros(self.blocks, 2 * self.tracked + NUMBERS, dtype=self.dtype, device="cpu")
        fields = self._fields
        fields.floor.fill_(1)
        fields.error.fill_(math.nan)
        self._inverse_floor = torch.ones(self.blocks, dtype=self.dtype, device=self.device)
        self._make_sums()
        self._make_factors(basis)

    def _make_sums(self) -> None:
        """One buffer for image and trace, so that they are one message between ranks."""
        size = self.blocks * (self.dim * self.tracked + 1)
        self._sums = torch.zeros(size, dtype=self.dtype, device=self.device)

    def _make_factors(self, basis: Tensor) -> None:
        # Directions as contiguous rows: products with few of them take two thirds of the time (measured, CPU).
        self._left = basis.mT.contiguous()
        self._right = torch.empty_like(self._left)
        self._rederive()

    def _clear(self) -> None:
        self._sums.zero_()
        self._test = probe(self._basis, seed=self.refreshes).mT.contiguous()

    def _add(self, layers: Sequence[Layer], part: slice, x: Tensor, mask: Tensor | None) -> int | Tensor:
        rows, count = self._rows(layers, x, mask)
        add_rows(rows, self._test[part], self._image[part], self.trace_sums[part])
        return count

    def project(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        r"""The image of the test vectors under the average over refreshes, of which the past is known as eigenpairs.

        Args:
            numbers: The factors of this refresh's sums, of the identity, and of each direction, (B, 2 + k).

        Returns:
            The image, transposed, (B, k, d), and its :func:`~.subspace.products`.
        """
        image = self._test * numbers[:, 1, None, None]
        image.addcmul_(self._image, numbers[:, :1, None])
        if self.options.ema:
            image.baddbmm_((self._test @ self._basis).mul_(numbers[:, None, 2:]), self._left)
        return image, products(self._test.mT, image.mT)

    def renew(self, image: Tensor, rotation: Tensor, known: Tensor, derived: Tensor, resolved: Tensor | None) -> None:
        """Take over a new basis, :meth:`project`'s image rotated, and what is known of it.

        Args:
            image: (B, k, d).
            rotation: (B, k, k), in float64.
            known: For :attr:`known`.
            derived: :func:`~.renewal.multipliers` of them, on the device.
            resolved: Which bases are new, (B,), on the device; None for all.
        """
        basis = rotation.mT @ image.double()
        if resolved is None:
            self._left.copy_(basis)
        else:
            torch.where(resolved[:, None, None], basis.to(self.dtype), self._left, out=self._left)
        self.known.copy_(known)
        self._derive(derived)

    def _derive(self, derived: Tensor) -> None:
        """Renew what :meth:`apply` reads, where it is: recorded launches (:mod:`.replay`) know it by its address."""
        self._inverse_floor.copy_(derived[:, -1])
        torch.mul(derived[:, :-1, None], self._left, out=self._right)

    def _rederive(self) -> None:
        self._derive(torch.from_numpy(multipliers(self.known.numpy(), self.tracked)).to(self.device))

    def _above_tail(self) -> tuple[Tensor, Tensor]:
        """:func:`~.renewal.above_tail` of what is known, on the host and in the stack's dtype."""
        above, tail = above_tail(self._fields.eigenvalues.numpy(), self._fields.trace.numpy(), self.dim)
        return torch.from_numpy(above).to(self.dtype), torch.from_numpy(tail).to(self.dtype)

    def _fit_tracked(self, needed: int, ample: int) -> None:
        """Track more directions if the tolerance asks for them, fewer if that leaves it far away."""
        self.unattainable = needed > self.tracked >= self.limit
        if needed > self.tracked and self.tracked < self.limit:
            self._track(min(self.tracked + GRAIN, self.limit))
        elif ample + GRAIN <= self.tracked - GRAIN:
            self._track(self.tracked - GRAIN)

    def _track(self, count: int) -> None:
        missing = count - self.tracked
        eigenvalues, coefficients = self._fields.eigenvalues[:, :count], self._fields.coefficients[:, :count]
        basis = self._basis[..., :count]
        if missing > 0:
            _, tail = self._above_tail()
            fresh = random_basis(
                self.blocks, self.dim, count, seed=self.dim + count, device=self.device, dtype=self.dtype
            )
            # Orthonormal columns that complete the basis, whose own columns come out first and up to their signs.
            completed = torch.linalg.qr(torch.cat([basis, fresh], -1))[0]
            basis = torch.cat([basis, completed[..., self.tracked : count]], -1)
            eigenvalues = torch.cat([eigenvalues, tail.expand(-1, missing)], -1)
            coefficients = torch.nn.functional.pad(coefficients, (0, missing))
        self.tracked = count
        self.known = torch.cat([eigenvalues, coefficients, self.known[:, -NUMBERS:]], -1)
        self._make_sums()
        self._make_factors(basis)

    def _prepare_load(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        self.tracked = tensors[0]["basis"].shape[-1]
        self._allocated = False
        self.allocate()

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        super().load_state_dict(state)
        self._rederive()
        self._scales = (1 / self._fields.floor).tolist()
        errors = self._fields.error.tolist()
        self.errors = [worst(errors[part]) for part in self.slices]
        ranks = self._fields.coefficients.count_nonzero(-1).tolist()
        self.ranks = [max(ranks[part]) for part in self.slices]
        self._updates = []

    def _tensors(self, index: int) -> dict[str, Tensor]:
        part = self.slices[index]
        tensors = {
            "basis": self._basis,
            "eigenvalues": self._fields.eigenvalues,
            "coefficients": self._fields.coefficients,
            "trace": self._fields.trace,
            "floor": self._fields.floor,
            "error": self._fields.error,
        }
        if self.options.ema:
            tensors["weight"] = self._fields.weight
        return {name: tensor[part] for name, tensor in tensors.items()}


def worst(errors: Sequence[float]) -> float:
    """The largest of a layer's blocks; NaN are those that never had an inverse."""
    return max((error for error in errors if not math.isnan(error)), default=math.nan)


def begin_refresh(stacks: Sequence[LowRankStack], *, deferred: bool = False) -> Callable[[], dict[Stack, Tensor]]:
    """:meth:`Stack.refresh` of several, those with equally many directions together, in two halves.

    Args:
        stacks: Their sums are complete.
        deferred: The second half comes a step later. Where the host is idle, a thread works until then.

    Returns:
        The second half: called, it waits for the device and returns the outcome of each.
    """
    alike: dict[Hashable, list[LowRankStack]] = {}
    for stack in stacks:
        alike.setdefault((stack.device, stack.dtype, stack.tracked), []).append(stack)
    renewals = [Renewal(members) for members in alike.values()]  # all are queued before a thread begins
    begun = [(renewal, renewal.begin(deferred)) for renewal in renewals]
    return lambda: {stack: outcome for renewal, solve in begun for stack, outcome in renewal.adopt(solve())}


def add_rows(rows: Tensor, test: Tensor, image: Tensor, trace: Tensor) -> None:
    """Add to the sums over rows, in place: Z^T Z U to the image of the test vectors U, and tr Z^T Z.

    Args:
        rows: Z, (blocks, n, d).
        test: U^T, (blocks, k, d).
        image: (Z^T Z U)^T, (blocks, k, d).
        trace: (blocks,).
    """
    scores = torch.bmm(rows, test.mT)
    image.baddbmm_(scores.mT, rows)
    norms = torch.linalg.vector_norm(rows, dim=(1, 2))
    trace.addcmul_(norms, norms)
