"""Cholesky factors in halves: numpy's factors, whatever the size, and the same verdict on what has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dopr_lightning.preconditioner.inverse import BLOCK, HALVED_FROM, damped_cholesky, inverse_from_cholesky

SIZES = [1, 64, HALVED_FROM - 1, HALVED_FROM, HALVED_FROM + 1, HALVED_FROM + 5 * BLOCK + 7]


def covariances(blocks: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(blocks, 2 * dim, dim, dtype=torch.double, generator=generator)
    return rows.mT @ rows / (2 * dim)


@pytest.mark.parametrize("dim", SIZES)
def test_factors_are_those_of_numpy(dim: int) -> None:
    sigma, damping = covariances(3, dim), torch.tensor([0.1, 0.2, 0.3], dtype=torch.double)
    damped = sigma + damping[:, None, None] * torch.eye(dim, dtype=torch.double)
    expected = np.linalg.cholesky(damped.numpy())

    upper = torch.full_like(sigma, torch.nan).triu(1)  # never read
    factor, good = damped_cholesky(torch.where(torch.ones_like(sigma).tril() > 0, sigma, upper), damping)

    assert good.all()
    np.testing.assert_allclose(factor.tril().numpy(), expected, rtol=1e-9, atol=1e-12)
    inverse, good = inverse_from_cholesky(factor, good)
    assert good.all()
    np.testing.assert_allclose((inverse @ damped).numpy(), np.broadcast_to(np.eye(dim), (3, dim, dim)), atol=1e-9)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("dim", SIZES)
def test_one_indefinite_matrix_is_told_and_leaves_the_others_alone(dim: int, place: str) -> None:
    sigma = covariances(3, dim)
    at = 0 if place == "first" else dim - 1
    sigma[1, at, at] = -1.0
    expected = np.linalg.cholesky(sigma[::2].numpy())

    factor, good = damped_cholesky(sigma, torch.zeros(3, dtype=torch.double))

    assert good.tolist() == [True, False, True]
    np.testing.assert_allclose(factor[::2].tril().numpy(), expected, rtol=1e-9, atol=1e-12)
    inverse, good = inverse_from_cholesky(factor, good)
    assert good.tolist() == [True, False, True]
    assert inverse[::2].isfinite().all()
