"""A Linear layer's rows, mask, homogeneous coordinate, and its gradient without a copy."""

import pytest
import torch
from torch import Tensor, nn

from dopr_lightning.preconditioner.layers import layers_of


@pytest.mark.parametrize("shape", [(7,), (20, 7), (3, 4, 5, 7)])
def test_every_leading_position_is_a_row(shape, precondition, damped_solve, backward) -> None:
    module, x = nn.Linear(7, 3).double(), torch.randn(*shape, dtype=torch.double)
    (layer,) = layers_of("fc", module, conv="channel", bias=False)
    backward(module(x))
    expected, bias = damped_solve(module.weight.grad.clone(), x.reshape(-1, 7)), module.bias.grad.clone()
    precondition(layer, x)
    torch.testing.assert_close(module.weight.grad, expected)
    torch.testing.assert_close(module.bias.grad, bias, rtol=0, atol=0)


def test_bias_is_the_weight_of_a_one(precondition, damped_solve, backward) -> None:
    module, x = nn.Linear(4, 3).double(), torch.randn(5, 10, 4, dtype=torch.double)
    (layer,) = layers_of("fc", module, conv="channel", bias=True)
    backward(module(x))
    before = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
    expected = damped_solve(before, torch.cat([x.reshape(-1, 4), torch.ones(50, 1).double()], 1))
    precondition(layer, x)
    torch.testing.assert_close(module.weight.grad, expected[:, :4])
    torch.testing.assert_close(module.bias.grad, expected[:, 4])
    assert layer.parameter_names == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("trained", [False, None])
def test_a_bias_that_is_not_trained_adds_no_coordinate(trained: bool | None) -> None:
    module = nn.Linear(4, 3, bias=trained is not None)
    if trained is not None:
        module.bias.requires_grad_(trained)
    (layer,) = layers_of("fc", module, conv="channel", bias=True)
    assert (layer.homogeneous, layer.dim, layer.parameter_names) == (False, 4, ["fc.weight"])


def test_gradient_is_the_parameters_own_memory_and_is_not_copied_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(4, 3)
    (layer,) = layers_of("fc", module, conv="channel", bias=False)
    module(torch.randn(5, 4)).sum().backward()
    copies = []
    copy = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda *args: (copies.append(args), copy(*args))[1])
    matrix = layer.gradient()
    matrix.zero_()
    assert not module.weight.grad.any()
    layer.write(matrix)
    assert not copies
    layer.write(torch.ones(1, 3, 4))
    assert len(copies) == 1
    assert bool((module.weight.grad == 1).all())


def test_weight_is_looked_up_anew() -> None:
    module = nn.Linear(4, 3)
    (layer,) = layers_of("fc", module, conv="channel", bias=True)
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    assert layer.weight is module.weight
    assert layer.bias is module.bias
    assert not layer.has_gradient
    module(torch.randn(5, 4)).sum().backward()
    assert layer.has_gradient


def test_input_is_found_however_it_is_passed() -> None:
    (layer,) = layers_of("fc", nn.Linear(4, 3), conv="channel", bias=False)
    x = torch.randn(2, 4)
    assert layer.input((x,), {}) is x
    assert layer.input((), {"scale": 2.0, "input": x}) is x
    assert layer.input((), {"x": x}) is x


def test_modules_that_share_a_weight_have_one_key() -> None:
    first, second, other = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    second.weight = first.weight
    layers = [layers_of("fc", module, conv="channel", bias=False)[0] for module in (first, second, other)]
    assert layers[0].key == layers[1].key != layers[2].key
    assert layers[0].signature == layers[1].signature
    # Each has its own bias: with homogeneous coordinates, one layer cannot speak for both.
    with_bias = [layers_of("fc", module, conv="channel", bias=True)[0] for module in (first, second)]
    assert with_bias[0].key == with_bias[1].key
    assert with_bias[0].signature != with_bias[1].signature
