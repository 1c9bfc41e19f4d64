r"""Symmetric matrices at half their size: panels of columns of the lower triangle, which a GEMM can write directly.

A triangular vector would be half the square exactly, but no GEMM adds into it, and scattering the product costs more
than it saves. Panels :math:`A_{i \ge s,\, s \le j < s + w}` are plain matrices: the Gram product computes little more
than its lower half (what a ``syrk`` does, which torch lacks), is kept once, and is sent over the network as it lies.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PANELS = 4
NARROWEST = 128
"""More or narrower panels waste throughput (measured, CPU: these take 60 to 80 % of the whole square's time)."""


def panels(dim: int) -> list[tuple[int, int]]:
    """First column and width of each panel; a panel that starts at column s has the d - s rows from there on."""
    width = max(NARROWEST, -(-dim // PANELS))
    return [(start, min(width, dim - start)) for start in range(0, dim, width)]


def packed_size(dim: int) -> int:
    """Numbers in one packed covariance: about d^2 (1/2 + 1/(2p)) in p panels."""
    return sum((dim - start) * width for start, width in panels(dim))


class PackedSymmetric:
    """``count`` symmetric matrices of size ``dim``.

    Args:
        count: Number of matrices.
        dim: Their size d.
        dtype: Of the entries.
        device: Where they live.

    Attributes:
        flat: The entries, (count, size) and contiguous; about d^2 (1/2 + 1/(2 panels)) each, zero at first.
    """

    def __init__(self, count: int, dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dim = dim
        self.flat = torch.zeros(count, packed_size(dim), dtype=dtype, device=device)

    @cached_property
    def _panels(self) -> list[tuple[int, int, Tensor]]:
        """First column, width, and entries, (count, d - start, width); views of :attr:`flat`."""
        sizes = [(self.dim - start) * width for start, width in panels(self.dim)]
        parts = zip(panels(self.dim), self.flat.split(sizes, dim=1), strict=True)
        return [(start, width, part.unflatten(1, (self.dim - start, width))) for (start, width), part in parts]

    def __getstate__(self) -> dict[str, Any]:
        # Plain pickle would give the views entries of their own.
        return {name: value for name, value in vars(self).items() if name != "_panels"}

    def add_gram(self, blocks: slice, rows: Tensor) -> None:
        r"""Add :math:`Z^\top Z` of ``rows`` (blocks, n, d) to the matrices ``blocks``."""
        transposed = rows.transpose(1, 2)
        for start, width, panel in self._panels:
            panel[blocks].baddbmm_(transposed[:, start:], rows[..., start : start + width])

    def trace(self) -> Tensor:
        """Traces, (count,)."""
        first, *others = (panel.diagonal(dim1=1, dim2=2).sum(-1) for _, _, panel in self._panels)
        return sum(others, first)

    def lower(self, blocks: slice, scale: Tensor) -> Tensor:
        """The matrices ``blocks`` as squares, (blocks, d, d), times ``scale``, one per matrix there is, (count,).

        Only the lower triangles are written; above is anything, which Cholesky and eigvalsh do not read.
        """
        scale = scale[blocks].to(self.flat.dtype)[:, None, None]
        square = self.flat.new_empty(scale.shape[0], self.dim, self.dim)
        for start, width, panel in self._panels:
            torch.mul(panel[blocks], scale, out=square[:, start:, start : start + width])
        return square

    def store(self, blocks: slice, square: Tensor) -> None:
        """Overwrite the matrices ``blocks`` with symmetric ones, (blocks, d, d)."""
        for start, width, panel in self._panels:
            panel[blocks] = square[:, start:, start : start + width]
