"""A layer in diagonal pieces against one Linear layer per piece."""

import pytest
import torch
from torch import nn

from dopr_lightning.preconditioner.layers import BlockDiagonal, layers_of


@pytest.mark.parametrize(
    ("width", "max_dim", "sizes"),
    [
        (12, 6, [6, 6]),
        (12, 7, [6, 6]),  # as few pieces as possible, and those equal
        (12, 5, [4, 4, 4]),
        (11, 6, [6, 5]),
        (10, 4, [4, 4, 2]),
        (9, 1, [1] * 9),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_is_one_linear_layer_per_piece(
    width: int, max_dim: int, sizes: list[int], bias: bool, damped_solve, precondition, backward
) -> None:
    """With the homogeneous coordinate as the last one of the last piece."""
    module = nn.Linear(width - bias, 3).double()
    x = torch.randn(4, 5, width - bias, dtype=torch.double)
    (layer,) = layers_of("fc", module, conv="channel", bias=bias, max_dim=max_dim)
    assert isinstance(layer, BlockDiagonal)
    assert (layer.blocks, layer.dim) == (len(sizes), max(sizes))
    backward(module(x))
    before, rows = module.weight.grad.clone(), x.reshape(20, -1)
    if bias:
        before = torch.cat([before, module.bias.grad[:, None]], 1)
        rows = torch.cat([rows, torch.ones(20, 1).double()], 1)
    precondition(layer, x)
    pieces = [damped_solve(g, z) for g, z in zip(before.split(sizes, 1), rows.split(sizes, 1), strict=True)]
    expected = torch.cat(pieces, 1)
    torch.testing.assert_close(module.weight.grad, expected[:, : width - bias])
    if bias:
        torch.testing.assert_close(module.bias.grad, expected[:, -1])


def test_each_group_of_a_convolution_is_split(damped_solve, precondition, backward) -> None:
    module, x = nn.Conv1d(10, 4, 1, groups=2).double(), torch.randn(3, 10, 8, dtype=torch.double)
    (layer,) = layers_of("conv", module, conv="channel", bias=False, max_dim=3)
    assert (layer.blocks, layer.dim) == (4, 3)
    backward(module(x))
    before = module.weight.grad[..., 0].clone()
    precondition(layer, x)
    rows = x.transpose(1, 2).reshape(-1, 10)
    for group in range(2):
        for start, stop in [(0, 3), (3, 5)]:
            expected = damped_solve(before[2 * group : 2 * group + 2, start:stop], rows[:, 5 * group :][:, start:stop])
            torch.testing.assert_close(module.weight.grad[2 * group : 2 * group + 2, start:stop, 0], expected)


def test_padding_is_never_seen_outside(backward) -> None:
    module = nn.Linear(7, 3).double()
    (layer,) = layers_of("fc", module, conv="channel", bias=False, max_dim=4)
    backward(module(torch.randn(5, 7, dtype=torch.double)))
    before = module.weight.grad.clone()
    matrix = layer.gradient()
    assert not matrix[1, :, 3].any()
    assert not layer.rows(torch.randn(5, 7).double())[1, :, 3].any()
    matrix[1, :, 3] = torch.nan
    layer.write(2 * matrix)
    torch.testing.assert_close(module.weight.grad, 2 * before)


def test_only_covariances_that_are_too_large_are_split() -> None:
    for module in (nn.Linear(6, 9), nn.Embedding(100, 3)):
        (layer,) = layers_of("m", module, conv="channel", bias=False, max_dim=6)
        assert not isinstance(layer, BlockDiagonal)


def test_passes_its_layers_identity_on() -> None:
    module = nn.MultiheadAttention(6, 2)
    plain = layers_of("attn", module, conv="channel", bias=True)
    split = layers_of("attn", module, conv="channel", bias=True, max_dim=4)
    args = tuple(torch.randn(3, 2, 6) for _ in range(3))
    for whole, pieces in zip(plain, split, strict=True):
        for attribute in ("name", "kind", "key", "functional", "homogeneous", "modules", "parameter_names", "weight"):
            assert getattr(pieces, attribute) is getattr(whole, attribute) or getattr(pieces, attribute) == getattr(
                whole, attribute
            )
        assert pieces.signature != whole.signature
        if not whole.functional:
            assert pieces.input(args, {}) is whole.input(args, {})
    assert not split[0].has_gradient
    module(*args)[0].sum().backward()
    assert split[0].has_gradient
