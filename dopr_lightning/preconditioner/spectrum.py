"""How anisotropic is a covariance?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """What one layer's covariance looks like.

    Attributes:
        condition_number: Largest eigenvalue over the smallest, the worst block's; infinite where rank-deficient.
        effective_rank: exp of the entropy of the normalised eigenvalues (Roy & Vetterli, 2007), mean over blocks.

    Blocks that are 0 say nothing and are left out; NaN if all are.
    """

    condition_number: float
    effective_rank: float


def spectrum_of_eigenvalues(eigenvalues: Tensor) -> Spectrum:
    """Of eigenvalues (blocks, d), ascending."""
    eigenvalues = eigenvalues.double()
    eigenvalues = eigenvalues[eigenvalues[:, -1] != 0]
    if not len(eigenvalues):
        return Spectrum(math.nan, math.nan)
    # Below the rounding error of the fp32 sums an eigenvalue is zero.
    largest = eigenvalues[:, -1:]
    floor = largest * eigenvalues.shape[1] * torch.finfo(torch.float32).eps
    eigenvalues = torch.where(eigenvalues > floor, eigenvalues, 0.0)
    condition = (largest[:, 0] / eigenvalues[:, 0]).max()
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    return Spectrum(float(condition), float(torch.special.entr(share).sum(-1).exp().mean()))
