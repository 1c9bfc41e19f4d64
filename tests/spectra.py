"""Covariances of known spectra, and what preconditioning with them is."""

from __future__ import annotations

import torch
from torch import Tensor

from dopr_lightning.preconditioner.subspace import random_basis

DIM = 60


def rotation(seed: int = 0, dim: int = DIM) -> Tensor:
    return random_basis(1, dim, dim, seed=seed, dtype=torch.float64)[0]


def covariance(spectrum: Tensor, seed: int = 0) -> Tensor:
    vectors = rotation(seed, len(spectrum))
    return vectors * spectrum @ vectors.T


def power_law(exponent: float, dim: int = DIM) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float64) ** -exponent


def exponential(dim: int = DIM) -> Tensor:
    return 0.8 ** torch.arange(dim, dtype=torch.float64)


def converged(sigma: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (1, d, k) and eigenvalues (1, k), by an eigendecomposition."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors.flip(-1)[None, :, :rank], values.flip(-1)[None, :rank]


def approximate(gradient: Tensor, basis: Tensor, c: Tensor, rest: Tensor) -> Tensor:
    return (gradient - gradient @ basis[0] * c[0] @ basis[0].T) / rest[0]


def exact(gradient: Tensor, sigma: Tensor, damping: Tensor) -> Tensor:
    return gradient @ torch.linalg.inv(sigma + damping * torch.eye(len(sigma), dtype=sigma.dtype))
