"""Diagonal solver: for one-hot rows the covariance is the vector of the tokens' frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dopr_lightning.preconditioner.covariance import RunningMean, mean_over_rows, usable
from dopr_lightning.preconditioner.inverse import keep_last_good
from dopr_lightning.preconditioner.layers import DiagonalLayer, Layer
from dopr_lightning.preconditioner.spectrum import Spectrum, spectrum_of_eigenvalues
from dopr_lightning.preconditioner.stack import Stack


class DiagonalStack(Stack):
    """Frequencies and their damped inverses, (blocks, d)."""

    solver = "diagonal"

    @property
    def sums(self) -> Tensor:
        return self._sums

    def _allocate(self) -> None:
        self._sums = torch.zeros(self.blocks, self.dim, dtype=self.dtype, device=self.device)
        self._running = RunningMean(self._sums, self.options.ema) if self.options.ema else None
        self.inverse = torch.ones_like(self._sums)

    def _clear(self) -> None:
        self._sums.zero_()

    def _add(self, layers: Sequence[Layer], part: slice, x: Tensor, mask: Tensor | None) -> Tensor:
        (layer,) = layers
        assert isinstance(layer, DiagonalLayer)
        tokens, is_row = layer.tokens(x)
        keep = None if mask is None else self._keep(layer, x, mask, len(tokens))
        if keep is not None:
            is_row = is_row & keep
        self._sums[part.start].index_add_(0, tokens, is_row.to(self.dtype))
        return is_row.sum()

    def refresh(self, share: slice) -> Tensor:
        mean_over_rows(self._sums, self.counts)
        traces = self._sums.sum(-1)
        valid = usable(traces, self.damping(traces), self.dtype)
        if self._running is not None:
            self._running.update(self._sums, valid)
            self._sums.copy_(self._running.value)
        inverse = (self._sums + self.damping(self._sums.sum(-1))[:, None]).reciprocal()
        good = valid & inverse.isfinite().all(-1)
        keep_last_good(inverse, self.inverse, good)
        return torch.stack([self.counts.double(), traces, good])

    def apply(self, *, fixed: bool = False) -> None:
        for layer, part in zip(self.layers, self.slices, strict=True):
            assert isinstance(layer, DiagonalLayer)
            if layer.has_gradient:
                layer.scale(self.inverse[part.start])

    def spectrum(self, index: int) -> Spectrum | None:
        if not self._current[index]:
            return None
        return spectrum_of_eigenvalues(self._sums[self.slices[index]].sort(-1)[0])

    def _tensors(self, index: int) -> dict[str, Tensor]:
        part = self.slices[index]
        tensors = {"inverse": self.inverse[part]}
        if self._running is not None:
            tensors |= {"covariance": self._running.value[part], "weight": self._running.weight[part]}
        return tensors
