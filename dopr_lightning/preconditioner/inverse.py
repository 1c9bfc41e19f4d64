"""Damped inverses in batched calls, and what to keep when one fails."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_inverse(covariance: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    r"""Inverses of :math:`\Sigma + \lambda I` without a host synchronisation.

    Args:
        covariance: (blocks, d, d), of which the lower triangles are read; overwritten.
        damping: (blocks,).

    Returns:
        The inverses, (blocks, d, d), and a mask (blocks,) of those that can be trusted: Cholesky found the matrix
        positive definite and every entry is finite.
    """
    covariance.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    factor, info = torch.linalg.cholesky_ex(covariance)
    good = info == 0  # NaN and infinity are not positive definite either
    # One singular factor would make the whole batched call raise; its inverse is not used.
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.cholesky_inverse(torch.where(good[:, None, None], factor, identity))
    # A sum is finite only if all its terms are, and reads the inverses once where isfinite() writes three masks.
    return inverse, good & inverse.sum((-2, -1)).isfinite()


def keep_last_good(new: Tensor, last: Tensor, good: Tensor) -> None:
    """Overwrite ``last`` with ``new`` where ``good`` (blocks,)."""
    torch.where(good.view(-1, *[1] * (new.dim() - 1)), new, last, out=last)
