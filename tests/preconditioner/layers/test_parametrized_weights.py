"""A weight that is computed is covered through the one parameter of its shape."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner.layers import Layer, layers_of, named_modules, not_covered


def old(function, module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(module)


def only_layer(module: nn.Module, **options: object) -> Layer:
    (layer,) = layers_of("fc", module, **{"conv": "channel", "bias": False, **options})
    return layer


@pytest.mark.parametrize(
    ("wrap", "name", "scale"),
    [
        (parametrizations.weight_norm, "fc.parametrizations.weight.original1", "parametrizations.weight.original0"),
        (lambda m: old(nn.utils.weight_norm, m), "fc.weight_v", "weight_g"),
    ],
    ids=["new", "old"],
)
def test_weight_norm_is_covered_through_its_direction(wrap, name: str, scale: str, damped_solve, precondition) -> None:
    """W = g v / |v| row by row: dL/dv = g / |v| (dL/dW - (dL/dW . v) v / |v|^2)."""
    torch.manual_seed(0)
    module = wrap(nn.Linear(5, 4)).double()
    layer = only_layer(module)
    x, target = torch.randn(30, 5, dtype=torch.double), torch.randn(30, 4, dtype=torch.double)
    with torch.no_grad():
        g, v = module.get_parameter(scale).mul_(1.5), layer.weight.mul_(0.7)
    weight = (g * v / v.norm(dim=1, keepdim=True)).detach()
    (module(x) * target).sum().backward()
    g_scale = module.get_parameter(scale).grad.clone()
    norm, gradient_w = v.detach().norm(dim=1, keepdim=True), target.T @ x
    unit = v.detach() / norm
    gradient_v = g.detach() / norm * (gradient_w - (gradient_w * unit).sum(1, keepdim=True) * unit)
    torch.testing.assert_close(F.linear(x, weight, module.bias), module(x))
    precondition(layer, x)
    torch.testing.assert_close(layer.weight.grad, damped_solve(gradient_v, x))
    torch.testing.assert_close(module.get_parameter(scale).grad, g_scale, rtol=0, atol=0)
    assert layer.name == name
    assert layer.weight is module.get_parameter(name.removeprefix("fc."))
    assert not_covered("fc", module, [layer]).keys() == {f"fc.{scale}", "fc.bias"}


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (parametrizations.spectral_norm, "fc.parametrizations.weight.original"),
        (lambda m: old(nn.utils.spectral_norm, m), "fc.weight_orig"),
        (lambda m: prune.random_unstructured(m, "weight", amount=2), "fc.weight_orig"),
    ],
    ids=["spectral", "old-spectral", "pruned"],
)
def test_others_are_covered_through_their_original(wrap, name: str, damped_solve, precondition) -> None:
    torch.manual_seed(0)
    module = wrap(nn.Linear(5, 4).double())
    state = {key: value.clone() for key, value in module.state_dict().items()}
    layer = only_layer(module, bias=True)
    for key, value in module.state_dict().items():  # a look at a weight is no step of its power iteration
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    x = torch.randn(30, 5, dtype=torch.double)
    module(x).pow(3).sum().backward()
    original = dict(module.named_parameters())[name.removeprefix("fc.")]
    before = torch.cat([original.grad, module.bias.grad[:, None]], 1)
    expected = damped_solve(before, torch.cat([x, torch.ones(30, 1).double()], 1))
    precondition(layer, x)
    torch.testing.assert_close(original.grad, expected[:, :5])
    torch.testing.assert_close(module.bias.grad, expected[:, 5])
    assert layer.parameter_names == [name, "fc.bias"]
    assert not_covered("fc", module, [layer]) == {}


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
        (lambda m: old(nn.utils.weight_norm, m), "weight_v"),
        (lambda m: prune.random_unstructured(m, "weight", amount=2), "weight_orig"),
    ],
    ids=["new", "old", "pruned"],
)
def test_a_weight_that_is_computed_only_later_stays_covered(wrap, name: str, attach, damped_solve) -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 4).double()
    preconditioner, x = attach(module), torch.randn(30, 5, dtype=torch.double)
    for put_on in (lambda m: m, wrap):
        module.zero_grad()
        put_on(module)(x).pow(3).sum().backward()
        weight = dict(module.named_parameters()).get(name, module.weight)
        expected = damped_solve(weight.grad, x)
        preconditioner.step()
        torch.testing.assert_close(weight.grad, expected)


def test_the_parameter_behind_an_orthogonal_weight_is_left_alone() -> None:
    """What an orthogonal matrix is computed from mixes rows and columns: its gradient's rows are no input space's."""
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 2))
    reasons = {row.parameter: row.reason for row in ActivationPreconditioner(model).summary() if not row.covered}
    assert reasons["0.parametrizations.weight.original"].startswith("orthogonal() makes the weight of it")


@pytest.mark.parametrize("kind", ["conv", "embedding", "attention"])
def test_every_layer_type_can_be_parametrized(kind: str) -> None:
    module, weight = {
        "conv": (nn.Conv2d(4, 6, 3, groups=2), "weight"),
        "embedding": (nn.Embedding(5, 3), "weight"),
        "attention": (nn.MultiheadAttention(6, 2), "in_proj_weight"),
    }[kind]
    parametrizations.weight_norm(module, weight)
    names = [layer.name for layer in layers_of("m", module, conv="channel", bias=False)]
    original = f"m.parametrizations.{weight}.original1"
    if kind == "attention":
        assert names == [f"{original}[query]", f"{original}[key]", f"{original}[value]", "m.out_proj.weight"]
    else:
        assert names == [original]


def test_a_computed_output_projection_of_attention_is_refused() -> None:
    module = nn.MultiheadAttention(6, 2)
    parametrizations.weight_norm(module.out_proj)
    layers = layers_of("attn", module, conv="channel", bias=False)
    assert [layer.part for layer in layers] == ["query", "key", "value"]
    reasons = not_covered("attn", module, layers)
    assert "functional linear" in reasons["attn.out_proj.parametrizations.weight.original1"]
    assert "attn.out_proj.parametrizations.weight.original0" in reasons
    assert [name for name, _ in named_modules(module)] == ["", "out_proj.parametrizations.weight.0"]


class LowRank(nn.Module):
    """W = W_0 + B A, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.zeros(4, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def test_parameters_of_the_parametrization_are_none_of_the_layers() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    parametrize.register_parametrization(model[0], "weight", LowRank())
    reasons, names = {}, []
    for name, module in named_modules(model):
        layers = layers_of(name, module, conv="channel", bias=True)
        names += [parameter for layer in layers for parameter in layer.parameter_names]
        reasons |= not_covered(name, module, layers)
    assert names == ["0.parametrizations.weight.original", "0.bias"]
    assert reasons.keys() == {"0.parametrizations.weight.0.a", "0.parametrizations.weight.0.b"}
    assert all("LowRank" in reason for reason in reasons.values())


class Factors(nn.Module):
    """W = A B, with nothing of W's shape or (for square weights) two things."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, torch.eye(weight.shape[1], dtype=weight.dtype)


class Product(Factors):
    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(weight.shape[0], 2), torch.ones(2, weight.shape[1])


@pytest.mark.parametrize(("width", "factors"), [(4, Factors()), (5, Product())], ids=["two", "none"])
def test_no_single_original_of_the_weights_shape_is_refused(width: int, factors: nn.Module) -> None:
    module = nn.Linear(width, 4)
    parametrize.register_parametrization(module, "weight", factors)
    assert layers_of("fc", module, conv="channel", bias=True) == []
    reasons = not_covered("fc", module, [])
    assert reasons.keys() == {f"fc.parametrizations.weight.original{i}" for i in (0, 1)} | {"fc.bias"}
    assert "not from exactly one parameter of its shape" in reasons["fc.parametrizations.weight.original0"]
