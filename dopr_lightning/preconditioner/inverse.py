"""Factors and inverses of damped covariances in batched calls, and what to keep when one fails."""

from __future__ import annotations

import torch
from torch import Tensor


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
    info = torch.empty(covariance.shape[0], dtype=torch.int32, device=covariance.device)
    columns = covariance.mT  # LAPACK's order, in which lower is upper: no copy to another one
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
    return covariance, info == 0


def inverse_from_cholesky(factor: Tensor, good: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses, (blocks, d, d), of what :func:`damped_cholesky` factorised, and which of the ``good`` are finite."""
    # One singular factor would make the whole batched call raise; its inverse is not used.
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.cholesky_inverse(torch.where(good[:, None, None], factor, identity).mT, upper=True)
    # A sum is finite only if all its terms are, and reads the inverses once where isfinite() writes three masks.
    return inverse.mT, good & inverse.sum((-2, -1)).isfinite()


def keep_last_good(new: Tensor, last: Tensor, good: Tensor) -> None:
    """Overwrite ``last`` with ``new`` where ``good`` (blocks,)."""
    if good.device.type == "cpu" and bool(good.all()):  # no synchronisation here, and a copy reads half as much
        last.copy_(new)
        return
    torch.where(good.view(-1, *[1] * (new.dim() - 1)), new, last, out=last)
