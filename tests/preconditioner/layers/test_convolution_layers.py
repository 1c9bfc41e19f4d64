"""M of every convolution against the Linear layer that it is, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from explicit import patches
from torch import nn

from dopr_lightning.preconditioner.layers import layers_of

CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv1d(4, 6, 1),
    nn.Conv1d(4, 6, 5, stride=2, padding=2, dilation=2),
    nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"),
    nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"),  # 1 on the left, 2 on the right
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv1d(4, 4, 3, groups=4),
    nn.Conv1d(4, 8, 3, padding=1, groups=4),
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 6, (3, 1), padding=(1, 0), padding_mode="replicate"),
    nn.Conv2d(4, 6, 2, padding="valid"),
    nn.Conv3d(4, 6, 2, padding=1),
    nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
    nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular"),
]
SIZES = {1: [9], 2: [7, 6], 3: [4, 5, 3]}


def example(module: nn.Module, conv: str, bias: bool = False) -> tuple:
    torch.manual_seed(0)
    module = module.double()
    module.zero_grad()
    (layer,) = layers_of("conv", module, conv=conv, bias=bias)
    return module, layer, torch.randn(3, 4, *SIZES[len(module.kernel_size)], dtype=torch.double)


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_patch_is_the_unfolded_linear_layer(module, precondition, damped_solve, backward) -> None:
    module, layer, x = example(module, "patch")
    backward(module(x))
    before = module.weight.grad.clone()
    precondition(layer, x)
    rows = patches(module, x).chunk(module.groups, dim=1)
    for g, grad, actual in zip(rows, before.chunk(module.groups), module.weight.grad.chunk(module.groups), strict=True):
        torch.testing.assert_close(actual.flatten(1), damped_solve(grad.flatten(1), g))


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_channel_treats_every_kernel_tap_as_a_linear_map_of_the_channels(
    module, precondition, damped_solve, backward
) -> None:
    module, layer, x = example(module, "channel")
    backward(module(x))
    before = module.weight.grad.clone()
    precondition(layer, x)
    rows = x.movedim(1, -1).reshape(-1, 4).chunk(module.groups, dim=1)
    for g, grad, actual in zip(rows, before.chunk(module.groups), module.weight.grad.chunk(module.groups), strict=True):
        for tap in range(math.prod(module.kernel_size)):
            torch.testing.assert_close(actual.flatten(2)[..., tap], damped_solve(grad.flatten(2)[..., tap], g))


def test_patch_with_bias_is_a_linear_layer_on_torchs_unfold(precondition, backward) -> None:
    module, layer, x = example(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), "patch", True)
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT
    linear = nn.Linear(columns.shape[-1], 6).double()
    linear.weight.data, linear.bias.data = module.weight.detach().flatten(1), module.bias.detach()
    (reference,) = layers_of("fc", linear, conv="channel", bias=True)
    y = module(x)
    backward(y)
    backward(linear(columns).mT.reshape(y.shape))
    precondition(layer, x)
    precondition(reference, columns)
    torch.testing.assert_close(module.weight.grad.flatten(1), linear.weight.grad)
    torch.testing.assert_close(module.bias.grad, linear.bias.grad)


@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("conv", ["channel", "patch"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("max_dim", [None, 2, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_multiple_of_the_gradients_matrix_is_that_multiple_of_the_gradient(
    module, conv: str, bias: bool, max_dim: int | None, in_place: bool, backward
) -> None:
    """Whether the matrix is a view of it or a copy; the bias' shares add up."""
    module, _, x = example(module, conv)
    (layer,) = layers_of("conv", module, conv=conv, bias=bias, max_dim=max_dim)
    backward(module(x))
    before = [p.grad.clone() for p in module.parameters()]
    matrix = layer.gradient()
    layer.write(matrix.mul_(3) if in_place else matrix * 3)
    factors = [3, 3 if bias else 1]
    for p, old, factor in zip(module.parameters(), before, factors, strict=True):
        torch.testing.assert_close(p.grad, factor * old)


def test_in_channels_last_nothing_is_copied(precondition, backward) -> None:
    module, layer, x = example(nn.Conv2d(4, 6, 3, padding=1), "channel")
    backward(module(x))
    precondition(layer, x)
    expected = module.weight.grad
    module, layer, x = example(module.to(memory_format=torch.channels_last), "channel")
    x = x.to(memory_format=torch.channels_last)
    backward(module(x))
    assert layer.gradient().data_ptr() == module.weight.grad.data_ptr()
    assert layer.rows(x).data_ptr() == x.data_ptr()
    precondition(layer, x)
    torch.testing.assert_close(module.weight.grad, expected)


def test_without_batch_dimension(precondition, damped_solve, backward) -> None:
    module, layer, _ = example(nn.Conv1d(4, 6, 3), "patch")
    x = torch.randn(4, 9, dtype=torch.double)
    backward(module(x))
    expected = damped_solve(module.weight.grad.flatten(1), patches(module, x[None]))
    precondition(layer, x)
    torch.testing.assert_close(module.weight.grad.flatten(1), expected)


@pytest.mark.parametrize(
    "module", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3)], ids=str
)
def test_a_batch_may_be_empty(module: nn.Module) -> None:
    (layer,) = layers_of("conv", module, conv="channel", bias=False)
    positions = (5,) * (module.weight.dim() - 2)
    assert layer.rows(torch.zeros(0, 4, *positions)).shape == (layer.blocks, 0, layer.dim)


def test_rows_come_in_the_order_of_the_flattened_positions() -> None:
    """So that a mask of the positions can be flattened."""
    module, layer, x = example(nn.Conv2d(4, 6, 1, groups=2), "channel")
    expected = x.movedim(1, -1).flatten(0, 2).unflatten(-1, (2, 2)).transpose(0, 1)
    for conv in ("channel", "patch"):
        (layer,) = layers_of("conv", module, conv=conv, bias=False)
        torch.testing.assert_close(layer.rows(x), expected)


@pytest.mark.parametrize("conv", ["channel", "patch"])
def test_bias_absorbs_an_affine_map_of_the_channels(conv: str) -> None:
    """Undamped, the update of the layer's *function* does not depend on the channels' coordinates (Prop. 4.2)."""
    torch.manual_seed(0)
    x = torch.randn(40, 3, 7, dtype=torch.double)
    mix, shift = torch.randn(3, 3, dtype=torch.double), torch.randn(3, 1, dtype=torch.double)
    weight0, bias0 = torch.randn(5, 3, 2, dtype=torch.double), torch.randn(5, dtype=torch.double)
    changes = []
    for transform in (False, True):
        module, weight, bias, z = nn.Conv1d(3, 5, 2).double(), weight0, bias0, x
        if transform:
            z = mix @ x + shift
            weight = torch.einsum("oik,ij->ojk", weight, torch.linalg.inv(mix))
            bias = bias - torch.einsum("ojk,j->o", weight, shift[:, 0])
        module.weight.data, module.bias.data = weight.clone(), bias.clone()
        (layer,) = layers_of("conv", module, conv=conv, bias=True)
        y = module(z)
        y.pow(3).sum().backward()
        rows = layer.rows(z)
        layer.write(layer.gradient() @ torch.linalg.inv(rows.mT @ rows / rows.shape[1]))
        with torch.no_grad():
            for p in module.parameters():
                p -= 1e-3 * p.grad
            changes.append(module(z) - y)
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-6, atol=1e-9)
    assert changes[0].abs().mean() > 1e-6


def test_only_convolutions_with_the_same_patches_pool_their_rows() -> None:
    first, second = nn.Conv1d(4, 6, 3), nn.Conv1d(4, 6, 3, stride=2)
    second.weight = first.weight
    for conv, same in [("channel", True), ("patch", False)]:
        a, b = (layers_of("conv", module, conv=conv, bias=False)[0] for module in (first, second))
        assert a.key == b.key
        assert (a.signature == b.signature) is same


TRANSPOSED = [
    nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1),
    nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, groups=2),
    nn.ConvTranspose1d(4, 4, 3, groups=4, dilation=2),
    nn.ConvTranspose2d(4, 6, (3, 2), stride=2, output_padding=1),
    nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=1, groups=2),
    nn.ConvTranspose3d(4, 6, 2, stride=2, padding=1),
    nn.ConvTranspose3d(4, 6, (1, 2, 3), groups=2),
]


@pytest.mark.parametrize("module", TRANSPOSED, ids=str)
@pytest.mark.parametrize("conv", ["channel", "patch"])
def test_transposed_is_linear_at_each_input_position(module, conv: str, precondition, damped_solve, backward) -> None:
    module, layer, x = example(module, conv, bias=True)
    backward(module(x))
    before, bias = module.weight.grad.clone(), module.bias.grad.clone()
    precondition(layer, x)
    rows = x.movedim(1, -1).reshape(-1, 4).chunk(module.groups, dim=1)
    for g, grad, actual in zip(rows, before.chunk(module.groups), module.weight.grad.chunk(module.groups), strict=True):
        torch.testing.assert_close(actual.flatten(1).T, damped_solve(grad.flatten(1).T, g))
    torch.testing.assert_close(module.bias.grad, bias, rtol=0, atol=0)
    assert layer.parameter_names == ["conv.weight"]


def test_transposed_is_a_linear_layer_and_torchs_fold(precondition, backward) -> None:
    module, layer, x = example(
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), "channel"
    )
    linear = nn.Linear(4, 6 * 6, bias=False).double()
    linear.weight.data = module.weight.detach().flatten(1).T.clone()
    (reference,) = layers_of("fc", linear, conv="channel", bias=False)
    y = module(x)
    positions = x.flatten(2).mT
    folded = F.fold(
        linear(positions).mT, y.shape[2:], module.kernel_size, module.dilation, module.padding, module.stride
    )
    torch.testing.assert_close(folded + module.bias[:, None, None], y)
    backward(y)
    backward(folded)
    precondition(layer, x)
    precondition(reference, positions)
    torch.testing.assert_close(module.weight.grad.flatten(1).T, linear.weight.grad)
