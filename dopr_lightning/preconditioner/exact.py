r"""Exact solver: the covariance, its Cholesky factor, its inverse, one product with the gradient.

Per layer and step the product costs 2 d_out d_in^2 FLOPs, a share d_in / (3 n) of forward and backward; a refresh costs
n d_in^2 for the Gram product (half, by symmetry) and d_in^3 for the inverse. Where an inverse would not be used often
enough to pay for itself, its factor (d_in^3 / 3) is kept instead and solves for M.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dopr_lightning.preconditioner.covariance import RunningMean, mean_over_rows, usable
from dopr_lightning.preconditioner.inverse import damped_cholesky, inverse_from_cholesky, keep_last_good, known_good
from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.layers.together import gradients, one_shape, write
from dopr_lightning.preconditioner.packed import PackedSymmetric
from dopr_lightning.preconditioner.spectrum import Spectrum, spectrum_of_eigenvalues
from dopr_lightning.preconditioner.stack import Stack, StackOptions

WORKSPACE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Entries of the square matrices that are factorised at once, which is what a refresh needs for a moment: enough for
calls to be few (8 MiB in fp32), and on a GPU to keep it busy (256 MiB)."""

PAYS_OFF = 3
"""An inverse costs as much as the extra time of solving for so many times d_in rows of gradients (measured, CPU: a
solve takes 1.3 times a product's time, and the inverse 0.8 times a product of d_in rows)."""

SMALL = 1 << 18
"""Gradients up to this size share one batched product; for larger ones, copying them together costs more than the
calls it saves (1 MiB in fp32: they no longer fit a core's cache)."""


class ExactStack(Stack):
    """Packed covariances and their solutions, (blocks, d, d): inverses, or Cholesky factors.

    Attributes:
        factors: Whether the solutions are factors.
        solution: The inverses or factors.
    """

    solver = "exact"

    def __init__(self, layers: Sequence[Layer], options: StackOptions) -> None:
        super().__init__(layers, options)
        rows = self.entries / self.dim  # of the gradients as matrices
        self.factors = rows * options.update_every < PAYS_OFF * self.dim * self.blocks

    @property
    def sums(self) -> Tensor:
        return self._packed.flat

    @property
    def cost(self) -> float:
        return float(self.dim) ** 3

    @property
    def shared(self) -> Tensor:
        return self.solution

    def _allocate(self) -> None:
        # One packed copy of the covariances, unless they are averaged over refreshes.
        self._packed = PackedSymmetric(self.blocks, self.dim, dtype=self.dtype, device=self.device)
        self._running = RunningMean(self._packed.flat, self.options.ema) if self.options.ema else None
        # Identities until a first solution succeeds: such a layer's gradient stays as it is.
        identity = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        self.solution = identity.expand(self.blocks, -1, -1).clone()

    def _clear(self) -> None:
        self._packed.flat.zero_()

    def _add(self, layers: Sequence[Layer], part: slice, x: Tensor, mask: Tensor | None) -> int | Tensor:
        rows, count = self._rows(layers, x, mask)
        self._packed.add_gram(part, rows)
        return count

    def refresh(self, share: slice) -> Tensor:
        # Dividing the d^2 sums by their rows costs a pass over them, so lower() does it on the way, unless they are
        # averaged.
        self._per_row = self.counts.clamp(min=1).to(self.dtype).reciprocal()
        traces = self._packed.trace() * self._per_row
        damping = self.damping(traces)
        valid = usable(traces, damping, self.dtype)
        if self._running is not None:
            mean_over_rows(self._packed.flat, self.counts)
            self._running.update(self._packed.flat, valid)
            self._packed.flat.copy_(self._running.value)
            self._per_row.fill_(1)
            # usable() need not be asked again: an average of usable covariances is usable.
            damping = self.damping(self._packed.trace())
        good = torch.zeros_like(valid)
        chunk = max(1, WORKSPACE.get(self.device.type, WORKSPACE["cuda"]) // self.dim**2)
        for start in range(share.start, share.stop, chunk):
            part = slice(start, min(start + chunk, share.stop))
            solution, renewed = damped_cholesky(self._packed.lower(part, self._per_row), damping[part])
            if not self.factors:
                solution, renewed = inverse_from_cholesky(solution, renewed)
            good[part] = renewed & valid[part]
            if len(solution) == self.blocks and known_good(good):
                self.solution = solution.contiguous()  # all are new: no copy
            else:
                keep_last_good(solution, self.solution[part], good[part])
        return torch.stack([self.counts.double(), traces, good])

    @property
    def addresses(self) -> Hashable:
        return self.solution.data_ptr() if self._allocated and not self.factors else None

    def apply(self, *, fixed: bool = False) -> None:
        for run in self.runs:
            present = [i for i in run if self.layers[i].has_gradient]
            layers = [self._dense(i) for i in present]
            together = len(layers) > 1 and not self.factors and one_shape(layers)
            if together and layers[0].weight_gradient.numel() <= SMALL:
                write(layers, gradients(layers).to(self.dtype) @ self._solutions(present))
                continue
            for i, layer in zip(present, layers, strict=True):
                layer.write(self._solve(layer.gradient(), self.solution[self.slices[i]]))

    def _solutions(self, indices: Sequence[int]) -> Tensor:
        """Of some layers; a view where they stand side by side."""
        first, last = indices[0], indices[-1]
        if last - first == len(indices) - 1:
            return self.solution[self.slices[first].start : self.slices[last].stop]
        return torch.cat([self.solution[self.slices[i]] for i in indices])

    def _solve(self, gradient: Tensor, solution: Tensor) -> Tensor:
        gradient = gradient.to(self.dtype)
        if not self.factors:
            return gradient @ solution
        # In LAPACK's order and in place: cholesky_solve copies there and back (on a CPU with two threads this takes 0.7
        # of its time at d = 256, 0.8 from 512 on).
        columns = gradient.mT
        torch.linalg.solve_triangular(solution, columns, upper=False, out=columns)
        torch.linalg.solve_triangular(solution.mT, columns, upper=True, out=columns)
        return gradient

    def adopt(self, other: Stack, inverse: Tensor) -> None:
        """Go on where another stack of the same layers, in their order, stopped, with its inverses, (blocks, d, d)."""
        self.allocate()
        self.records = [replace(record) for record in other.records]
        self.refreshes = other.refreshes
        self.solution.copy_(inverse)
        if any(record.refreshed_at is not None for record in self.records):
            self.factors = False  # the adopted inverses may have to be kept beside new ones

    def adopt_average(self, covariance: Tensor, weight: Tensor) -> None:
        """Go on with an average over refreshes, (blocks, d, d), and its weight, (blocks,)."""
        assert self._running is not None
        self._packed.store(slice(None), covariance)
        self._running.value.copy_(self._packed.flat)
        self._running.weight.copy_(weight)

    def add_rows(self, layer: Layer, rows: Sequence[Tensor], counts: Tensor) -> None:
        """Count rows that another stack has extracted, (blocks, n, d) each, ``counts`` (blocks,) in all."""
        part = self.slices[self.index_of[layer]]
        for some in rows:
            self._packed.add_gram(part, some)
        self.counts[part] += counts

    def covariance(self, index: int) -> Tensor:
        """Lower triangles of the covariances of layer ``index`` at the last refresh, (blocks, d, d)."""
        return self._packed.lower(self.slices[index], self._per_row)

    def spectrum(self, index: int) -> Spectrum | None:
        if not self._current[index]:
            return None
        return spectrum_of_eigenvalues(torch.linalg.eigvalsh(self.covariance(index).double()))

    def _prepare_load(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        self.allocate()
        self.factors = "factor" in tensors[0]  # as the saving run had it, whose cadence may have been another

    def _tensors(self, index: int) -> dict[str, Tensor]:
        # Not only what the solution follows from: a layer may live on one older than its covariance.
        part = self.slices[index]
        tensors = {"factor" if self.factors else "inverse": self.solution[part]}
        if self._running is not None:
            tensors |= {"covariance": self._running.value[part], "weight": self._running.weight[part]}
        return tensors
