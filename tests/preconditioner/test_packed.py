"""Symmetric matrices kept as panels of their lower triangle: the same numbers at about half the memory."""

import pytest
import torch
from torch import Tensor

from dopr_lightning.preconditioner.packed import NARROWEST, PANELS, PackedSymmetric

DIMS = [1, 5, NARROWEST, NARROWEST + 1, 3 * NARROWEST - 1, PANELS * NARROWEST + 7]
"""One panel, panels that come out even, a last one that is narrower, panels wider than the narrowest."""

ONES = torch.ones(3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def packed(count: int, dim: int) -> PackedSymmetric:
    return PackedSymmetric(count, dim, dtype=torch.double, device=torch.device("cpu"))


@pytest.mark.parametrize("dim", DIMS)
def test_the_lower_triangle_and_the_trace_are_those_of_the_summed_gram_products(dim: int) -> None:
    matrices, first, second = packed(2, dim), draw(2, 4, dim), draw(1, 9, dim, seed=1)
    matrices.add_gram(slice(0, 2), first)
    matrices.add_gram(slice(1, 2), second)
    expected = first.mT @ first
    expected[1] += second[0].T @ second[0]
    torch.testing.assert_close(matrices.lower(slice(0, 2), ONES).tril(), expected.tril())
    torch.testing.assert_close(matrices.lower(slice(1, 2), ONES).tril(), expected[1:].tril())
    torch.testing.assert_close(matrices.trace(), expected.diagonal(dim1=1, dim2=2).sum(-1))


@pytest.mark.parametrize("dim", DIMS)
def test_the_flat_buffer_is_all_there_is(dim: int) -> None:
    """So it can be sent, scaled and averaged without looking into it."""
    matrices = packed(2, dim)
    matrices.add_gram(slice(0, 2), draw(2, 4, dim))
    other = packed(2, dim)
    other.flat.copy_(3 * matrices.flat)
    torch.testing.assert_close(other.lower(slice(0, 2), ONES).tril(), 3 * matrices.lower(slice(0, 2), ONES).tril())
    assert matrices.flat.is_contiguous()
    matrices.add_gram(slice(0, 2), draw(2, 4, dim))  # goes on in the same buffer
    torch.testing.assert_close(matrices.flat, 2 / 3 * other.flat)


@pytest.mark.parametrize("dim", [d for d in DIMS if d > NARROWEST])
def test_little_more_than_half_of_the_square_is_kept(dim: int) -> None:
    panels = min(PANELS, -(-dim // NARROWEST))
    kept = packed(1, dim).flat.shape[1]
    assert dim * (dim + 1) // 2 <= kept < dim**2
    assert kept <= dim**2 * (1 + 1 / panels) / 2 + dim * NARROWEST / 2


def test_reading_the_matrices_leaves_them_as_they_are() -> None:
    matrices = packed(1, 70)
    matrices.add_gram(slice(0, 1), draw(1, 4, 70))
    before = matrices.flat.clone()
    matrices.lower(slice(0, 1), ONES).fill_(1e9)  # as damped_inverse overwrites it
    assert torch.equal(matrices.flat, before)


@pytest.mark.parametrize("dim", DIMS)
def test_stored_matrices_replace_those_of_their_blocks(dim: int) -> None:
    matrices, rows = packed(3, dim), draw(3, 4, dim)
    matrices.add_gram(slice(0, 3), rows)
    stored = draw(2, 2 * dim, dim, seed=1)
    matrices.store(slice(1, 3), stored.mT @ stored)
    expected = torch.cat([rows[:1].mT @ rows[:1], stored.mT @ stored])
    torch.testing.assert_close(matrices.lower(slice(0, 3), ONES).tril(), expected.tril())
