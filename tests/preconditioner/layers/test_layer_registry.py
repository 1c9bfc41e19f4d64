"""Which layers a module has, by its type; which types can be added; why parameters are left out."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from dopr_lightning.preconditioner.layers import (
    DenseLayer,
    Layer,
    MatrixLayer,
    layer_types,
    layers_of,
    named_modules,
    not_covered,
    register_layer,
)
from dopr_lightning.preconditioner.layers.linear import Linear


def cover(model: nn.Module, **options: object) -> tuple[list[Layer], dict[str, str]]:
    """All layers of a model, and the reasons of the rest."""
    layers, reasons = [], {}
    for name, module in named_modules(model):
        found = layers_of(name, module, **{"conv": "channel", "bias": False, **options})
        layers += found
        reasons |= not_covered(name, module, found)
    return layers, reasons


def zoo() -> nn.Module:
    lazy = nn.LazyLinear(3)
    half = nn.Linear(3, 3).half()
    return nn.Sequential(
        nn.Linear(3, 4, bias=False),
        nn.ModuleDict({"conv": nn.Conv3d(3, 4, 2), "up": nn.ConvTranspose2d(3, 4, 2)}),
        nn.TransformerEncoderLayer(6, 2, 8),
        nn.TransformerDecoderLayer(6, 2, 8),
        nn.MultiheadAttention(6, 2, kdim=3, add_bias_kv=True),
        parametrizations.weight_norm(nn.Conv1d(2, 3, 2)),
        parametrizations.spectral_norm(nn.Linear(3, 4)),
        parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        nn.Embedding(3, 4),
        lazy,
        half,
        nn.GRUCell(2, 3),
    )


@pytest.mark.parametrize("bias", [False, True])
def test_every_parameter_is_covered_or_has_a_reason_and_not_both(bias: bool) -> None:
    model = zoo()
    layers, reasons = cover(model, bias=bias)
    covered = {name for layer in layers for name in layer.parameter_names}
    assert covered | reasons.keys() == {name for name, _ in model.named_parameters()}
    assert not covered & reasons.keys()
    assert len({layer.name for layer in layers}) == len({layer.key for layer in layers}) == len(layers)


def test_attentions_output_is_covered_once_and_not_as_a_linear_layer() -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8)
    layers, _ = cover(model)
    (output,) = [layer for layer in layers if layer.weight is model.self_attn.out_proj.weight]
    assert output.functional
    assert "self_attn.out_proj" not in dict(named_modules(model))
    # On its own, the same class is a Linear layer like others.
    alone = type(model.self_attn.out_proj)(3, 4)
    assert [type(layer) for layer in layers_of("fc", alone, conv="channel", bias=False)] == [Linear]


def test_walk_sees_all_other_modules() -> None:
    model = zoo()
    names = {name for name, _ in named_modules(model)}
    left_out = {name for name, _ in model.named_modules()} - names
    assert left_out == {
        "2.self_attn.out_proj",
        "3.self_attn.out_proj",
        "3.multihead_attn.out_proj",
        "4.out_proj",
        *(f"{i}.parametrizations{end}" for i in (5, 6) for end in ("", ".weight")),
        "7.parametrizations",
        "7.parametrizations.weight_hh_l0",
    }


def test_names_do_not_depend_on_wrappers() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.MultiheadAttention(4, 2)))
    names = [layer.name for layer in cover(plain)[0]]
    plain[1] = checkpoint_wrapper(plain[1])
    wrapped = torch.compile(nn.Sequential(plain[0], torch.compile(plain[1])))
    layers, reasons = cover(wrapped)
    assert [layer.name for layer in layers] == names
    assert reasons.keys() == {"0.bias", "1.0.in_proj_bias", "1.0.out_proj.bias"}


@pytest.mark.parametrize(
    ("module", "parameter", "reason"),
    [
        (nn.LazyLinear(3), "m.weight", "run a forward"),
        (nn.LazyConv2d(3, 2), "m.weight", "run a forward"),
        (nn.Linear(3, 4).half(), "m.weight", "M leaves the range of float16; use 16-mixed or bf16"),
        (nn.MultiheadAttention(4, 2).half(), "m.out_proj.weight", "range of float16"),
        (nn.MultiheadAttention(4, 2).half(), "m.in_proj_weight", "range of float16"),
        (nn.Linear(3, 4, dtype=torch.complex64), "m.weight", "torch.complex64"),
        (nn.LayerNorm(3), "m.weight", "LayerNorm is not a layer type with an activation covariance"),
        (nn.Linear(3, 4), "m.bias", "bias=False"),
    ],
    ids=str,
)
def test_says_why_not(module: nn.Module, parameter: str, reason: str) -> None:
    layers, reasons = cover(nn.ModuleDict({"m": module}))
    assert reason in reasons[parameter]
    assert all(parameter not in layer.parameter_names for layer in layers)


def test_a_parameter_of_a_module_with_layers_is_not_called_a_layer() -> None:
    module = nn.Sequential(nn.Linear(3, 4))
    module.position = nn.Parameter(torch.zeros(4))
    assert cover(module)[1]["position"] == "it is a parameter of Sequential itself, not of a layer in it"


def test_a_weight_in_another_layout_is_refused() -> None:
    module = nn.Linear(3, 4)
    module.weight = nn.Parameter(torch.randn(12))
    layers, reasons = cover(module)
    assert not layers
    assert "not (4, 3)" in reasons["weight"]


class Adapted(nn.Linear):
    """A Linear layer with a low-rank adapter, as LoRA libraries derive it."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


def test_subclasses_are_covered_as_their_base_is(precondition, damped_solve, backward) -> None:
    module, x = Adapted().double(), torch.randn(9, 5, dtype=torch.double)
    (layer,) = layers_of("fc", module, conv="channel", bias=False)
    backward(module(x))
    expected = damped_solve(module.weight.grad.clone(), x)
    precondition(layer, x)
    torch.testing.assert_close(module.weight.grad, expected)
    reasons = not_covered("fc", module, [layer])
    assert "multiplies none" in reasons["fc.lora_a"]


class TransposedLinear(nn.Module):
    """GPT-2's Conv1D: y = x W + b."""

    def __init__(self, nx: int, nf: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class TransposedLayer(MatrixLayer):
    kind = "transposed"

    def __init__(self, name: str, module: TransposedLinear, *, conv: str, bias: bool) -> None:
        shape = tuple(module.weight.shape)
        super().__init__(name, module, shape=shape, bias="bias" if bias else None)
        self.dim = shape[0] + self.homogeneous

    def vectors(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, x.shape[-1])

    def to_matrix(self, gradient: Tensor) -> Tensor:
        return gradient.T[None]

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0].T


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """register_layer, undone after the test."""
    from dopr_lightning.preconditioner.layers import registry

    monkeypatch.setattr(registry, "_LAYER_TYPES", dict(registry._LAYER_TYPES))
    return register_layer


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (1, 5, 6)], ids=str)
def test_rows_of_another_shape_than_a_layer_type_says_are_refused(shape: tuple[int, ...]) -> None:
    class Mistaken(TransposedLayer):
        def vectors(self, x: Tensor) -> Tensor:
            return x.reshape(shape)

    layer = Mistaken("fc", TransposedLinear(5, 4), conv="channel", bias=True)
    with pytest.raises(ValueError, match=r"fc\.weight: Mistaken\.vectors made rows of .*\(1, any, 5\); mend vectors"):
        layer.rows(torch.randn(6, 5))


@pytest.mark.parametrize("max_dim", [None, 3])
def test_one_class_adds_a_layer_type(max_dim: int | None, registered, precondition, backward) -> None:
    assert registered(TransposedLinear)(TransposedLayer) is TransposedLayer
    module, linear = TransposedLinear(5, 4).double(), nn.Linear(5, 4).double()
    linear.weight.data, linear.bias.data = module.weight.detach().T.clone(), module.bias.detach().clone()
    x = torch.randn(6, 7, 5, dtype=torch.double)
    for m in (module, linear):
        (layer,) = layers_of("fc", m, conv="channel", bias=True, max_dim=max_dim)
        backward(m(x))
        precondition(layer, x)
    torch.testing.assert_close(module.weight.grad.T, linear.weight.grad)
    torch.testing.assert_close(module.bias.grad, linear.bias.grad)


def test_a_derived_type_can_be_treated_in_another_way(registered) -> None:
    class Special(Linear):
        kind = "special"

    registered(Adapted)(Special)
    assert layer_types(Adapted()) == (Special,)
    assert layer_types(nn.Linear(2, 3)) == (Linear,)


def test_a_second_weight_of_a_type_is_another_part(registered) -> None:
    class Down(Linear):
        kind = "adapter"
        part = "down"

        def __init__(self, name: str, module: Adapted, *, conv: str, bias: bool) -> None:
            MatrixLayer.__init__(self, name, module, weight="lora_a", shape=(2, 5))
            self.features = self.dim = 5

    registered(Adapted)(Linear)
    registered(Adapted)(Down)
    layers = layers_of("fc", Adapted(), conv="channel", bias=False)
    assert [layer.name for layer in layers] == ["fc.weight", "fc.lora_a"]
    assert not_covered("fc", layers[0].modules[0], layers).keys() == {"fc.lora_b", "fc.bias"}


class Incomplete(DenseLayer):
    kind = "incomplete"


class Nameless(TransposedLayer):
    kind = None


@pytest.mark.parametrize(
    ("module_type", "layer_type", "error", "message"),
    [
        (nn.Linear(2, 3), TransposedLayer, TypeError, "takes a type of modules"),
        (Tensor, TransposedLayer, TypeError, "takes a type of modules"),
        (F.linear, TransposedLayer, TypeError, "takes a type of modules"),
        (nn.Module, TransposedLayer, ValueError, "every module"),
        (TransposedLinear, nn.Linear, TypeError, "derived from MatrixLayer or DiagonalLayer"),
        (TransposedLinear, lambda name: None, TypeError, "derived from MatrixLayer or DiagonalLayer"),
        (TransposedLinear, Incomplete, TypeError, "Incomplete lacks gradient, rows, write"),
        (TransposedLinear, Nameless, TypeError, "Nameless lacks kind"),
        (nn.Linear, TransposedLayer, ValueError, "Linear is covered by Linear already"),
    ],
)
def test_nonsense_is_refused(module_type, layer_type, error: type[Exception], message: str, registered) -> None:
    with pytest.raises(error, match=message):
        registered(module_type)(layer_type)
