r"""Exact solver for few rows: with fewer rows than half the dimension, the rows are smaller than their covariance.

.. math:: G (\tfrac{1}{n} Z^\top Z + \lambda I)^{-1}
          = \tfrac{1}{\lambda} \left(G - (G V^\top) V\right), \quad
          V = L^{-1} Z / \sqrt{n}, \quad L L^\top = \tfrac{1}{n} Z Z^\top + \lambda I

by the Woodbury identity: 3 n^2 d_in + n^3 / 3 FLOPs to factorise and 4 n d_out d_in to apply, in place of d_in^3 and
2 d_out d_in^2, and n d_in numbers in place of d_in^2. Exact, but only while one refresh's rows are all there is: not
for an average over refreshes, and not where rows are spread over ranks, which would have to send each other theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dopr_lightning.preconditioner.covariance import usable
from dopr_lightning.preconditioner.exact import ExactStack
from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.spectrum import Spectrum, spectrum_of_eigenvalues
from dopr_lightning.preconditioner.stack import Failure, Stack, StackOptions, subtract_low_rank


class WoodburyStack(Stack):
    """Rows of one refresh, and the factors V that follow from them, per layer (blocks, n, d).

    The rows are kept until the refresh, so a stack that turns out to see too many becomes an :class:`ExactStack`
    (:meth:`to_exact`), for good.
    """

    solver = "woodbury"

    def __init__(self, layers: Sequence[Layer], options: StackOptions) -> None:
        super().__init__(layers, options)
        self._rows_of: list[list[Tensor]] = [[] for _ in layers]
        self._new: dict[int, tuple[Tensor, Tensor]] = {}
        # Before the first refresh: no factor, and a scale of 1, which leaves the gradient as it is.
        self._factors: list[Tensor | None] = [None] * len(layers)

    @property
    def sums(self) -> Tensor:
        return self._nothing

    @property
    def too_many_rows(self) -> bool:
        """Whether some layer has collected half as many rows as its covariance has dimensions, or more."""
        return any(2 * sum(part.shape[1] for part in rows) >= self.dim for rows in self._rows_of)

    def to_exact(self) -> ExactStack:
        """A stack with covariances for the same layers, with the open window and the inverses of this one."""
        inverse = torch.eye(self.dim, dtype=self.dtype, device=self.device).repeat(self.blocks, 1, 1)
        for factor, part in zip(self._factors, self.slices, strict=True):
            if factor is not None:
                inverse[part] -= factor.mT @ factor
                inverse[part] *= self._scale[part, None, None]
        exact = ExactStack(self.layers, self.options)
        exact.adopt(self, inverse)
        exact.begin()
        self.close()
        for layer, rows, part in zip(self.layers, self._rows_of, self.slices, strict=True):
            exact.add_rows(layer, rows, self.counts[part])
        return exact

    def apply(self, *, fixed: bool = False) -> None:
        for index, (factor, part) in enumerate(zip(self._factors, self.slices, strict=True)):
            layer = self._dense(index)
            if factor is not None and layer.has_gradient:
                scale = self._scale[part, None, None]
                layer.write(subtract_low_rank(layer.gradient().to(self.dtype), factor.mT, factor * scale, scale))

    def accept(self, outcome: Sequence[Sequence[float]], step: int) -> list[Failure]:
        failed = super().accept(outcome, step)
        for index, (factor, scale) in self._new.items():
            if self.records[index].refreshed_at == step:
                part = self.slices[index]
                self._renew(index, factor, scale, torch.tensor(outcome[2][part], dtype=torch.bool, device="cpu"))
        self._new.clear()
        return failed

    def _renew(self, index: int, factor: Tensor, scale: Tensor, renewed: Tensor) -> None:
        """Take over the new factor and scale of a layer's blocks where ``renewed`` (blocks,), which is on the host."""
        part = self.slices[index]
        if not renewed.all():
            last = self._factors[index]
            last = factor[:, :0] if last is None else last
            rows = max(factor.shape[1], last.shape[1])  # rows of 0 change no product
            factor, last = (pad(some, (0, 0, 0, rows - some.shape[1])) for some in (factor, last))
            renewed = renewed.to(self.device)
            factor = torch.where(renewed[:, None, None], factor, last)
            scale = torch.where(renewed, scale, self._scale[part])
        self._factors[index] = factor
        self._scale[part] = scale

    def spectrum(self, index: int) -> Spectrum | None:
        factor = self._factors[index]
        if factor is None or self.records[index].rows_seen == 0:
            return None
        # V V^T has the eigenvalues s / (s + lambda).
        shrunk = torch.linalg.eigvalsh(factor @ factor.mT).clamp(0, 1)
        eigenvalues = shrunk / ((1 - shrunk) * self._scale[self.slices[index], None])
        return spectrum_of_eigenvalues(pad(eigenvalues, (self.dim - eigenvalues.shape[1], 0)))

    def _allocate(self) -> None:
        self._nothing = torch.zeros(0, dtype=self.dtype, device=self.device)
        self._scale = torch.ones(self.blocks, dtype=self.dtype, device=self.device)

    def _clear(self) -> None:
        for rows in self._rows_of:
            rows.clear()

    def _add(self, layers: Sequence[Layer], part: slice, x: Tensor, mask: Tensor | None) -> int | Tensor:
        rows, count = self._rows(layers, x, mask)
        storage = rows.untyped_storage()
        if storage.data_ptr() == x.untyped_storage().data_ptr() or storage.nbytes() > rows.nbytes:
            rows = rows.clone()  # the input's owner may fill it anew before the refresh; a few rows must not keep all
        for layer, some in zip(layers, rows.split([layer.blocks for layer in layers]), strict=True):
            self._rows_of[self.index_of[layer]].append(some)
        return count

    def refresh(self, share: slice) -> Tensor:
        outcome = torch.zeros(3, self.blocks, dtype=torch.float64, device=self.device)
        outcome[0] = self.counts
        for index, (rows, part) in enumerate(zip(self._rows_of, self.slices, strict=True)):
            if rows:
                outcome[1:, part] = self._factorise(index, torch.cat(rows, dim=1), self.counts[part])
        self._clear()
        return outcome

    def _factorise(self, index: int, rows: Tensor, counts: Tensor) -> Tensor:
        """Trace and success per block, (2, blocks); the factor waits for :meth:`accept`."""
        rows = rows / counts.clamp(min=1).to(rows.dtype).sqrt()[:, None, None]
        trace = rows.square().sum((1, 2))
        damping = self.damping_of(self.layers[index], trace)
        gram = rows @ rows.mT
        gram.diagonal(dim1=1, dim2=2).add_(damping[:, None])
        factor, info = torch.linalg.cholesky_ex(gram)
        good = usable(trace, damping, self.dtype) & (info == 0)
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        factor = torch.where(good[:, None, None], factor, identity)
        self._new[index] = torch.linalg.solve_triangular(factor, rows, upper=False), 1 / damping
        return torch.stack([trace.double(), good])

    def _prepare_load(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        self.allocate()
        for layer, saved in zip(self.layers, tensors, strict=True):
            shape = saved["factor"].shape if "factor" in saved else (layer.blocks, 0, self.dim)
            if (shape[0], shape[2]) != (layer.blocks, self.dim):
                raise ValueError(
                    f"{layer.name}: the preconditioner's saved factor is of shape {tuple(shape)}, the model's has "
                    f"({layer.blocks}, rows, {self.dim}); were conv, bias or max_dim different?"
                )
            if self.options.ema:
                raise ValueError(f"{layer.name}: the preconditioner's state has no averages; was ema 0 then?")
        self._factors = [
            torch.empty_like(saved["factor"], device=self.device) if "factor" in saved else None for saved in tensors
        ]

    def _tensors(self, index: int) -> dict[str, Tensor]:
        factor = self._factors[index]
        if factor is None:
            return {}
        return {"factor": factor, "scale": self._scale[self.slices[index]]}
