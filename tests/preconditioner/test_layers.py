"""M of every layer type against an explicit im2col / one-hot computation in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopr_lightning import ActivationPreconditioner

GAMMA = 0.03


def precondition(module: nn.Module, x: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The weight's gradient before and after the preconditioner."""
    ap = ActivationPreconditioner(module, damping=GAMMA, **options)
    torch.manual_seed(1)
    y = module(x)
    (y * torch.randn_like(y)).sum().backward()
    before = module.weight.grad.clone()
    ap.step()
    return before, module.weight.grad


def damped_solve(gradient: Tensor, rows: Tensor) -> Tensor:
    """G (Sigma + gamma tr(Sigma) I)^-1 by a solve against explicit rows (n, d)."""
    sigma = sum((torch.outer(z, z) for z in rows), torch.zeros(rows.shape[1], rows.shape[1]).double()) / len(rows)
    damped = sigma + GAMMA * sigma.trace() * torch.eye(len(sigma), dtype=sigma.dtype)
    return torch.linalg.solve(damped.T, gradient.T).T


@pytest.mark.parametrize("shape", [(7,), (20, 7), (3, 4, 5, 7)])
def test_linear_counts_every_leading_position(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.double)
    before, after = precondition(nn.Linear(7, 3).double(), x)
    torch.testing.assert_close(after, damped_solve(before, x.reshape(-1, 7)))


def test_linear_bias_is_the_weight_of_a_one() -> None:
    module, x = nn.Linear(4, 3).double(), torch.randn(50, 4, dtype=torch.double)
    ap = ActivationPreconditioner(module, damping=GAMMA, bias=True)
    module(x).square().sum().backward()
    before = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
    ap.step()
    expected = damped_solve(before, torch.cat([x, torch.ones(50, 1).double()], 1))
    torch.testing.assert_close(module.weight.grad, expected[:, :4])
    torch.testing.assert_close(module.bias.grad, expected[:, 4])


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=2),
    nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv1d(4, 4, 3, groups=4),
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
]


def patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Patches (n, C_in * K) read out of the convolution itself: one identity kernel per (channel, tap)."""
    c, k = module.in_channels, math.prod(module.kernel_size)
    probe = type(module)(
        c, c * k, module.kernel_size, module.stride, module.padding, module.dilation, 1, False, module.padding_mode
    )
    probe.weight.data = torch.eye(c * k).reshape(c * k, c, *module.kernel_size)
    return probe.double()(x).detach().flatten(2).transpose(1, 2).reshape(-1, c * k)


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_convolution_patch(module: nn.Conv1d | nn.Conv2d) -> None:
    module = module.double()
    module.zero_grad()
    x = torch.randn(5, 4, *[9] * len(module.kernel_size), dtype=torch.double)
    before, after = precondition(module, x, conv="patch")
    rows = patches(module, x).chunk(module.groups, dim=1)
    for g, grad, actual in zip(rows, before.chunk(module.groups), after.chunk(module.groups), strict=True):
        torch.testing.assert_close(actual.flatten(1), damped_solve(grad.flatten(1), g))


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_convolution_channel(module: nn.Conv1d | nn.Conv2d) -> None:
    module = module.double()
    module.zero_grad()
    x = torch.randn(5, 4, *[9] * len(module.kernel_size), dtype=torch.double)
    before, after = precondition(module, x, conv="channel")
    rows = x.movedim(1, -1).reshape(-1, 4).chunk(module.groups, dim=1)
    for g, grad, actual in zip(rows, before.chunk(module.groups), after.chunk(module.groups), strict=True):
        for tap in range(math.prod(module.kernel_size)):  # every kernel tap is a linear map of the channels
            torch.testing.assert_close(actual.flatten(2)[..., tap], damped_solve(grad.flatten(2)[..., tap], g))


def test_convolution_without_batch_dimension() -> None:
    module = nn.Conv1d(4, 6, 3).double()
    x = torch.randn(4, 9, dtype=torch.double)
    before, after = precondition(module, x, conv="patch")
    torch.testing.assert_close(after.flatten(1), damped_solve(before.flatten(1), patches(module, x[None])))


@pytest.mark.parametrize("conv", ["channel", "patch"])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_is_linear_at_each_input_position(conv: str, groups: int) -> None:
    module = nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=groups).double()
    x = torch.randn(5, 4, 8, dtype=torch.double)
    before, after = precondition(module, x, conv=conv)
    rows = x.transpose(1, 2).reshape(-1, 4).chunk(groups, dim=1)
    for g, grad, actual in zip(rows, before.chunk(groups), after.chunk(groups), strict=True):
        torch.testing.assert_close(actual.flatten(1).T, damped_solve(grad.flatten(1).T, g))


def test_embedding_is_a_linear_layer_of_one_hot_rows() -> None:
    module, tokens = nn.Embedding(6, 3).double(), torch.tensor([[0, 1, 1], [4, 4, 4]])
    before, after = precondition(module, tokens)
    one_hot = F.one_hot(tokens.flatten(), 6).double()
    torch.testing.assert_close(after, damped_solve(before.T, one_hot).T)


@pytest.mark.parametrize("conv", ["channel", "patch"])
def test_convolution_bias_absorbs_an_affine_map_of_the_channels(conv: str) -> None:
    """Undamped, the update of the layer's *function* does not depend on the channels' coordinates (Prop. 4.2)."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, 7, dtype=torch.double)
    mix, shift = torch.randn(3, 3, dtype=torch.double), torch.randn(3, 1, dtype=torch.double)
    changes = []
    for transform in (False, True):
        layer = nn.Conv1d(3, 5, 2).double()
        torch.manual_seed(1)
        weight, bias = torch.randn(5, 3, 2, dtype=torch.double), torch.randn(5, dtype=torch.double)
        z = x
        if transform:
            z = mix @ x + shift
            weight = torch.einsum("oik,ij->ojk", weight, torch.linalg.inv(mix))
            bias = bias - torch.einsum("ojk,j->o", weight, shift[:, 0])
        layer.weight.data, layer.bias.data = weight, bias
        ap = ActivationPreconditioner(layer, damping=1e-12, conv=conv, bias=True)
        y = layer(z)
        y.pow(3).sum().backward()
        ap.step()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 1e-3 * p.grad
            changes.append(layer(z) - y)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-6, atol=1e-9)
    assert changes[0].abs().mean() > 1e-6
