r"""Exact solver: the covariance, its Cholesky factor, its inverse, one product with the gradient.

Per layer and step the product costs 2 d_out d_in^2 FLOPs, a share d_in / (3 n) of forward and backward; a refresh costs
n d_in^2 for the Gram product (half, by symmetry) and d_in^3 for the inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dopr_lightning.preconditioner.covariance import RunningMean, mean_over_rows, usable
from dopr_lightning.preconditioner.inverse import damped_inverse, keep_last_good
from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.packed import PackedSymmetric
from dopr_lightning.preconditioner.spectrum import Spectrum, spectrum_of_matrix
from dopr_lightning.preconditioner.stack import Stack, Statistics

WORKSPACE = 1 << 26
"""Entries of the square matrices that are factorised at once (256 MiB in fp32): what a refresh needs for a moment."""

SMALL = 1 << 18
"""Gradients up to this size share one batched product; for larger ones, copying them together costs more than the
calls it saves (1 MiB in fp32: they no longer fit a core's cache)."""


class ExactStack(Stack):
    """Packed covariances and their inverses, (blocks, d, d)."""

    solver = "exact"

    def __init__(self, layers: Sequence[Layer], statistics: Statistics) -> None:
        # Layers whose gradients have one shape stand side by side: their inverses are then a view, not a copy.
        super().__init__(sorted(layers, key=_gradient_shape), statistics)
        runs = [list(run) for _, run in groupby(self.layers, _gradient_shape)]
        self._runs = [[self._index[layer] for layer in run] for run in runs]

    @property
    def sums(self) -> Tensor:
        return self._packed.flat

    @property
    def cost(self) -> float:
        return float(self.dim) ** 3

    @property
    def shared(self) -> Tensor:
        return self.inverse

    def _allocate(self) -> None:
        # Sums, then their means: one packed copy of the covariances, unless they are averaged over refreshes.
        self._packed = PackedSymmetric(self.blocks, self.dim, dtype=self.dtype, device=self.device)
        self._running = RunningMean(self._packed.flat, self.options.ema) if self.options.ema else None
        # Identities until a first inverse succeeds: such a layer's gradient stays as it is.
        identity = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        self.inverse = identity.expand(self.blocks, -1, -1).clone()

    def _clear(self) -> None:
        self._packed.flat.zero_()

    def _add(self, layer: Layer, part: slice, x: Tensor, mask: Tensor | None) -> int | Tensor:
        rows, count = self._rows(layer, x, mask)
        self._packed.add_gram(part, rows)
        return count

    def _refresh(self, share: slice) -> Tensor:
        mean_over_rows(self._packed.flat, self.counts)
        traces = self._packed.trace()
        valid = usable(self.counts, traces)
        if self._running is not None:
            self._running.update(self._packed.flat, valid)
            self._packed.flat.copy_(self._running.value)
        damping = self._damping(self._packed.trace() if self._running is not None else traces)
        good = torch.zeros_like(valid)
        chunk = max(1, WORKSPACE // self.dim**2)
        for start in range(share.start, share.stop, chunk):
            part = slice(start, min(start + chunk, share.stop))
            inverse, renewed = damped_inverse(self._packed.lower(part), damping[part])
            good[part] = renewed & valid[part]
            keep_last_good(inverse, self.inverse[part], good[part])
        return torch.stack([self.counts.double(), traces.double(), good.double()])

    def apply(self) -> None:
        for run in self._runs:
            present = [i for i in run if self.layers[i].has_gradient]
            gradients = [self._dense(i).gradient() for i in present]
            # Shards of equally shaped weights may differ in size.
            together = len(present) > 1 and len({gradient.shape for gradient in gradients}) == 1
            if together and gradients[0].numel() <= SMALL:
                self._apply_together(present, gradients, whole=len(present) == len(run))
                continue
            for i, gradient in zip(present, gradients, strict=True):
                self._dense(i).write(gradient.to(self.dtype) @ self.inverse[self.slices[i]])

    def _apply_together(self, present: list[int], gradients: list[Tensor], whole: bool) -> None:
        if whole:
            inverse = self.inverse[self.slices[present[0]].start : self.slices[present[-1]].stop]
        else:
            inverse = torch.cat([self.inverse[self.slices[i]] for i in present])
        product = torch.cat(gradients).to(self.dtype) @ inverse
        for i, part in zip(present, product.split([g.shape[0] for g in gradients]), strict=True):
            self._dense(i).write(part)

    def adopt(self, other: Stack, inverse: Tensor) -> None:
        """Go on where another stack of the same layers stopped, with its inverses in its order, (blocks, d, d)."""
        self.allocate()
        for index, layer in enumerate(self.layers):
            theirs = other.layers.index(layer)
            self.refreshed_at[index] = other.refreshed_at[theirs]
            self.rows_seen[index] = other.rows_seen[theirs]
            self.failures[index] = other.failures[theirs]
            self.inverse[self.slices[index]] = inverse[other.slices[theirs]]

    def add_rows(self, layer: Layer, rows: Sequence[Tensor], counts: Tensor) -> None:
        """Count rows that another stack has extracted, (blocks, n, d) each, ``counts`` (blocks,) in all."""
        part = self.slices[self._index[layer]]
        for some in rows:
            self._packed.add_gram(part, some)
        self.counts[part] += counts

    def covariance(self, index: int) -> Tensor:
        """Lower triangles of the covariances of layer ``index`` at the last refresh, (blocks, d, d)."""
        return self._packed.lower(self.slices[index])

    def spectrum(self, index: int) -> Spectrum | None:
        if not self._allocated or self.rows_seen[index] == 0:
            return None
        return spectrum_of_matrix(self.covariance(index))

    def _tensors(self, index: int) -> dict[str, Tensor]:
        # The inverse itself, not only what it follows from: a layer may live on an inverse older than its covariance.
        part = self.slices[index]
        tensors = {"inverse": self.inverse[part]}
        if self._running is not None:
            tensors |= {"covariance": self._running.value[part], "weight": self._running.weight[part]}
        return tensors


def _gradient_shape(layer: Layer) -> tuple[Any, ...]:
    return layer.kind, layer.blocks, tuple(layer.weight.shape)
