"""What one would write first: per layer a forward hook that forms Z^T Z, a Cholesky factor, two triangular solves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dopr_lightning.preconditioner.coverage import find_coverage
from dopr_lightning.preconditioner.layers import DenseLayer


class PlainCholesky:
    """The exact update at every step, layer by layer, without any of the package's economies.

    It has the layers' own rearrangements in common with the package, so that convolutions mean the same in both. It
    counts every forward, knows no ranks, no averages, no mask and no failure.

    Args:
        model: Its dense layers are covered.
        damping: Relative to the trace.
    """

    def __init__(self, model: nn.Module, damping: float = 0.01) -> None:
        self.damping = damping
        covered = find_coverage(model)
        self._layers = [layer for layer in covered.layers if isinstance(layer, DenseLayer)]
        self._grams: dict[DenseLayer, Tensor] = {}
        self._rows: dict[DenseLayer, int] = {}
        for layer in self._layers:
            for module in layer.modules:
                module.register_forward_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: DenseLayer) -> Any:
        @torch.no_grad()
        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with torch.autocast(layer.weight.device.type, enabled=False):
                rows = layer.rows(layer.input(args, kwargs)).float()
                gram = rows.mT @ rows
            self._grams[layer] = self._grams[layer] + gram if layer in self._grams else gram
            self._rows[layer] = self._rows.get(layer, 0) + rows.shape[1]

        return add

    @torch.no_grad()
    def step(self) -> None:
        """Replace G by G (Sigma + lambda I)^-1."""
        for layer, gram in self._grams.items():
            covariance = gram / self._rows[layer]
            diagonal = covariance.diagonal(dim1=1, dim2=2)
            diagonal += self.damping * diagonal.sum(1, keepdim=True)
            factor = torch.linalg.cholesky(covariance)
            layer.write(torch.cholesky_solve(layer.gradient().float().mT, factor).mT)
        self._grams.clear()
        self._rows.clear()
