"""M through a layer's own rows, gradient and write, or the whole way; and M from explicit rows, for comparison."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner.layers import DenseLayer

GAMMA = 0.03


@pytest.fixture
def precondition() -> Callable[[DenseLayer, Tensor], None]:
    """What the preconditioner does with one layer and one input, after backward; pieces with a damping of their own."""

    def run(layer: DenseLayer, x: Tensor) -> None:
        rows = layer.rows(x)
        sigma = rows.mT @ rows / rows.shape[1]
        damping = GAMMA * sigma.diagonal(dim1=1, dim2=2).sum(-1)
        assert sigma.shape == (layer.blocks, layer.dim, layer.dim)
        inverse = torch.linalg.inv(sigma + damping[:, None, None] * torch.eye(layer.dim, dtype=sigma.dtype))
        layer.write(layer.gradient() @ inverse)

    return run


@pytest.fixture
def attach() -> Callable[..., ActivationPreconditioner]:
    """A preconditioner with the damping of the other fixtures."""
    return partial(ActivationPreconditioner, damping=GAMMA)


@pytest.fixture
def damped_solve() -> Callable[[Tensor, Tensor], Tensor]:
    """G (Sigma + gamma tr(Sigma) I)^-1 by a solve against explicit rows (n, d)."""

    def solve(gradient: Tensor, rows: Tensor) -> Tensor:
        sigma = torch.einsum("ni,nj->ij", rows, rows) / len(rows)
        damped = sigma + GAMMA * sigma.trace() * torch.eye(len(sigma), dtype=sigma.dtype)
        return torch.linalg.solve(damped.T, gradient.T).T

    return solve


@pytest.fixture
def backward() -> Callable[[Tensor], None]:
    """Backward from a random linear function of an output."""

    def run(y: Tensor, seed: int = 1) -> None:
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
        (y * weights).sum().backward()

    return run
