"""Factors and inverses of damped covariances in batched calls, and what to keep when one fails."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALVED_FROM = 512
BLOCK = 64
"""On a CPU, matrices from the first size on are factorised in halves, down to the second, joined by a triangular solve
and a product: LAPACK's own routine runs at a tenth of a product's speed there, and this takes a quarter less time
(measured with MKL, 1 and 2 threads, d = 512 to 2048; below, more calls cost more than they save)."""


def damped_cholesky(covariance: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    r"""Cholesky factors of :math:`\Sigma + \lambda I`, in place and without a host synchronisation.

    Args:
        covariance: (blocks, d, d), row by row, of which the lower triangles are read; overwritten.
        damping: (blocks,).

    Returns:
        The lower factors, which are ``covariance``, and a mask (blocks,) of those that can be trusted: the matrix was
        positive definite, which one with NaN or infinity is not.
    """
    covariance.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    dim = covariance.shape[-1]
    halved = covariance.device.type == "cpu" and dim >= HALVED_FROM
    return covariance, _factorise(covariance, BLOCK if halved else dim)


def _factorise(matrix: Tensor, block: int) -> Tensor:
    """Overwrite lower triangles (blocks, d, d) with Cholesky factors; returns which could be, (blocks,)."""
    dim = matrix.shape[-1]
    if dim <= block:
        info = torch.empty(matrix.shape[0], dtype=torch.int32, device=matrix.device)
        columns = matrix.mT  # LAPACK's order, in which lower is upper: no copy to another one
        torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
        return info == 0
    half = -(-dim // (2 * block)) * block
    first, below, second = matrix[:, :half, :half], matrix[:, half:, :half], matrix[:, half:, half:]
    good = _factorise(first, block)
    columns = below.mT
    torch.linalg.solve_triangular(first, columns, upper=False, out=columns)
    second.baddbmm_(below, below.mT, alpha=-1)
    return good & _factorise(second, block)


def inverse_from_cholesky(factor: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses, (blocks, d, d), of what :func:`damped_cholesky` factorised, and which of the ``good`` are finite.

    The diagonals of the other factors are overwritten.
    """
    # One singular factor would make the whole batched call raise; its inverse is not used.
    factor.diagonal(dim1=-2, dim2=-1).masked_fill_(~good[:, None], 1)
    inverse = torch.cholesky_inverse(factor.mT, upper=True)
    # A sum is finite only if all its terms are, and reads the inverses once where isfinite() writes three masks.
    return inverse.mT, good & (inverse.sum((-2, -1)).abs() < math.inf)


def known_good(good: Tensor) -> bool:
    """Whether all blocks are good, as far as the host can tell without waiting for a device: on a CPU."""
    return good.device.type == "cpu" and bool(good.all())


def keep_last_good(new: Tensor, last: Tensor, good: Tensor) -> None:
    """Overwrite ``last`` with ``new`` where ``good`` (blocks,)."""
    if known_good(good):  # a copy reads half as much
        last.copy_(new)
        return
    torch.where(good.view(-1, *[1] * (new.dim() - 1)), new, last, out=last)
