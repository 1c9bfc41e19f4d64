"""What a MupSpec reads off a factory, what it makes of initial values, and what it refuses."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mup
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dopr_lightning import MupSpec
from dopr_lightning.optim import parameter_roles
from dopr_lightning.policies.networks import VisionMLP, VisionUnet1d

Factory = Callable[..., nn.Module]

NORMS = {"weight": "vector", "bias": "vector"}


def layers(**modules: Callable[[int], nn.Module]) -> Factory:
    """A factory of models with these layers, each made from the width."""
    return lambda width: nn.ModuleDict({name: make(width) for name, make in modules.items()})


def roles(factory: Factory, **base: Any) -> dict[str, str]:
    spec = MupSpec.from_factory(factory, **(base or {"width": 8}))
    return {name: shape.role for name, shape in spec.shapes.items()}


class Held(nn.Module):
    """A module of its own with one bare parameter."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(sizes))


class Attention(nn.Module):
    """Holds the factor of its logits, as diffusers, timm and transformers do."""

    def __init__(self, width: int, power: float) -> None:
        super().__init__()
        self.scale = width**power
        self.qkv = nn.Linear(width, 3 * width)


class LowRank(nn.Module):
    """A parametrization with matrices of its own: W + BA."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, width, bias=False), nn.Linear(width, 2, bias=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up.weight @ self.down.weight


def low_rank(width: int) -> nn.Module:
    layer = nn.Linear(width, width)
    nn.utils.parametrize.register_parametrization(layer, "weight", LowRank(width))
    return layer


class Adapted(nn.Module):
    """A Linear and its low-rank correction."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)


KINDS: dict[str, tuple[Callable[[int], nn.Module], dict[str, str]]] = {
    "linear": (lambda w: nn.Linear(w, w), {"weight": "hidden", "bias": "vector"}),
    "input": (lambda w: nn.Linear(5, w), {"weight": "input", "bias": "vector"}),
    "readout": (lambda w: nn.Linear(w, 5), {"weight": "readout", "bias": "fixed"}),
    "aside": (lambda w: nn.Linear(5, 3), {"weight": "fixed", "bias": "fixed"}),
    "conv1d": (lambda w: nn.Conv1d(w, w, 3), {"weight": "hidden", "bias": "vector"}),
    "conv2d input": (lambda w: nn.Conv2d(3, w, 3), {"weight": "input", "bias": "vector"}),
    "conv2d readout": (lambda w: nn.Conv2d(w, 3, 3), {"weight": "readout", "bias": "fixed"}),
    "grouped": (lambda w: nn.Conv1d(w, w, 3, groups=2), {"weight": "hidden", "bias": "vector"}),
    "depthwise": (lambda w: nn.Conv1d(w, w, 3, groups=w), {"weight": "input", "bias": "vector"}),
    "transposed": (lambda w: nn.ConvTranspose1d(w, w, 3), {"weight": "hidden", "bias": "vector"}),
    "transposed input": (lambda w: nn.ConvTranspose2d(3, w, 3), {"weight": "input", "bias": "vector"}),
    "transposed readout": (lambda w: nn.ConvTranspose2d(w, 3, 3), {"weight": "readout", "bias": "fixed"}),
    "transposed depthwise": (
        lambda w: nn.ConvTranspose1d(w, w, 3, groups=w, bias=False),
        {"weight": "input"},
    ),
    "embedding": (lambda w: nn.Embedding(11, w), {"weight": "embedding"}),
    "bag": (lambda w: nn.EmbeddingBag(11, w), {"weight": "embedding"}),
    "layer norm": (nn.LayerNorm, NORMS),
    "group norm": (lambda w: nn.GroupNorm(2, w), NORMS),
    "self-attention": (
        lambda w: nn.MultiheadAttention(w, w // 4, add_bias_kv=True),
        {
            "in_proj_weight": "hidden",
            "in_proj_bias": "vector",
            "bias_k": "embedding",
            "bias_v": "embedding",
            "out_proj.weight": "hidden",
            "out_proj.bias": "vector",
        },
    ),
    "cross-attention": (
        lambda w: nn.MultiheadAttention(w, w // 4, kdim=3, vdim=w, bias=False),
        {
            "q_proj_weight": "hidden",
            "k_proj_weight": "input",
            "v_proj_weight": "hidden",
            "out_proj.weight": "hidden",
        },
    ),
    "low-rank adapter": (
        Adapted,
        {"linear.weight": "hidden", "linear.bias": "vector", "down.weight": "readout", "up.weight": "input"},
    ),
    "low-rank parametrization": (
        low_rank,
        {
            "bias": "vector",
            "parametrizations.weight.original": "hidden",
            "parametrizations.weight.0.up.weight": "input",
            "parametrizations.weight.0.down.weight": "readout",
        },
    ),
    "lstm": (
        lambda w: nn.LSTM(5, w),
        {"weight_ih_l0": "input", "weight_hh_l0": "hidden", "bias_ih_l0": "vector", "bias_hh_l0": "vector"},
    ),
    "gru cell": (
        lambda w: nn.GRUCell(w, w),
        {"weight_ih": "hidden", "weight_hh": "hidden", "bias_ih": "vector", "bias_hh": "vector"},
    ),
    "attention that is muP's": (lambda w: Attention(w, -1), {"qkv.weight": "hidden", "qkv.bias": "vector"}),
    "weight_norm": (
        lambda w: parametrizations.weight_norm(nn.Linear(w, w)),
        {
            "bias": "vector",
            "parametrizations.weight.original0": "input",
            "parametrizations.weight.original1": "hidden",
        },
    ),
    "weight_norm of an input": (
        lambda w: parametrizations.weight_norm(nn.Conv1d(3, w, 1)),
        {"bias": "vector", "parametrizations.weight.original0": "input", "parametrizations.weight.original1": "input"},
    ),
    "spectral_norm": (
        lambda w: parametrizations.spectral_norm(nn.Linear(w, w)),
        {"bias": "vector", "parametrizations.weight.original": "hidden"},
    ),
    "square": (lambda w: Held(w, w), {"table": "hidden"}),
    "gain": (lambda w: Held(w), {"table": "vector"}),
    "temperature": (lambda w: nn.ParameterDict({"t": nn.Parameter(torch.ones(()))}), {"t": "fixed"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_roles_of_every_kind_of_layer(kind: str) -> None:
    make, expected = KINDS[kind]
    found = roles(layers(layer=make, other=lambda w: nn.Linear(w, w, bias=False)))
    assert found == {f"layer.{name}": role for name, role in expected.items()} | {"other.weight": "hidden"}


@pytest.mark.parametrize("kind", ["linear", "weight_norm", "self-attention"])
def test_roles_where_the_layer_is_the_whole_model(kind: str) -> None:
    make, expected = KINDS[kind]
    assert roles(lambda width: make(width)) == expected


def grown(make: Callable[[int], nn.Module], width: int) -> dict[str, tuple[float, float]]:
    """Of outputs and inputs, beyond width 8."""
    spec = MupSpec.from_factory(lambda width: make(width), width=8)
    return {name: (g.fan_out_growth, g.fan_in_growth) for name, g in spec.growth(make(width)).items()}


def test_growth_goes_by_outputs_and_inputs() -> None:
    both, out, inputs, neither = (4, 4), (4, 1), (1, 4), (1, 1)
    found = {
        kind: next(iter(grown(make, 32).values()))
        for kind, (make, names) in KINDS.items()
        if {*names.values()} != {"fixed"}
    }
    for kind in ("linear", "conv1d", "grouped", "transposed", "square"):
        assert found[kind] == both, kind
    for kind in ("input", "conv2d input", "depthwise", "transposed input", "transposed depthwise", "embedding", "gain"):
        assert found[kind] == out, kind
    for kind in ("readout", "conv2d readout", "transposed readout"):
        assert found[kind] == inputs, kind
    assert grown(KINDS["readout"][0], 32)["bias"] == neither
    attention = grown(KINDS["self-attention"][0], 32)
    assert attention["in_proj_weight"] == both
    assert attention["bias_k"] == out


@pytest.mark.parametrize(
    ("sizes", "role", "expected"),
    [
        ((3, "w"), "readout", (1, 4)),
        (("w", 3), "readout", (1, 4)),
        ((3, "w"), "input", (4, 1)),
        (("w", 3), "input", (4, 1)),
        (("w", 3), "embedding", (4, 1)),
        ((1, 7, "w"), "embedding", (4, 1)),
        (("w", 1, 1), "embedding", (4, 1)),
        (("w",), "readout", (1, 4)),  # of one value
    ],
)
def test_a_bare_parameter_is_what_it_is_told_to_be(
    sizes: tuple[Any, ...], role: str, expected: tuple[float, float]
) -> None:
    def make(width: int) -> nn.Module:
        return Held(*(width if size == "w" else size for size in sizes))

    spec = MupSpec.from_factory(make, width=8, roles={"table": role})
    growth = spec.growth(make(32))["table"]
    assert spec.roles(make(32)) == {"table": role}
    assert (growth.fan_out_growth, growth.fan_in_growth) == expected
    # Drawn with a spread that stays, a readout must fall like 1/fan_in.
    assert spec.multiplier_of_initial_values(make(32))["table"] == (0.25 if role == "readout" else 1)


SIZES = (5, 2, 2, 4, True)  # observation, action, observations, horizon; it denoises
CAMERA = {"cameras": ["front"], "crop": 16}


def vision_mlp(width: int, encoder_width: int) -> nn.Module:
    return VisionMLP(*SIZES, **CAMERA, width=width, depth=1, encoder_width=encoder_width)


def vision_unet(channels: list[int], condition_dim: int, encoder_width: int) -> nn.Module:
    own = {"channels": channels, "condition_dim": condition_dim, "kernel_size": 3, "groups": 4}
    return VisionUnet1d(*SIZES, **CAMERA, **own, encoder_width=encoder_width)


@pytest.mark.parametrize(
    ("factory", "base", "inputs", "projection"),
    [
        (vision_mlp, {"width": 16, "encoder_width": 16}, {"input.weight"}, "hidden"),
        (
            vision_unet,
            {"channels": [16, 32], "condition_dim": 16, "encoder_width": 16},
            {"observation.weight", "time.0.weight", "input.block1.conv1.0.weight", "input.block1.skip.weight"},
            "condition",
        ),
    ],
)
def test_what_grows_in_networks_with_cameras(
    factory: Factory, base: dict[str, Any], inputs: set[str], projection: str
) -> None:
    """Only colours, states, actions and time do not: all else is hidden, and grows in outputs and inputs."""
    spec = MupSpec.from_factory(factory, **base)
    matrices = {name: shape for name, shape in spec.shapes.items() if len(shape.base) > 1}
    by_role: dict[str, set[str]] = {}
    for name, shape in matrices.items():
        by_role.setdefault(shape.role, set()).add(name)
        grows = {"input": (True, False), "readout": (False, True)}.get(shape.role, (True, True))
        assert shape.scales == grows + (False,) * (len(shape.base) - 2), name
    assert by_role.pop("input") == {*inputs, "cameras.front.resnet.conv1.weight"}
    assert by_role.pop("readout") == {"readout.weight"}
    assert by_role.keys() == {"hidden"}
    vectors = {name: shape.role for name, shape in spec.shapes.items() if len(shape.base) == 1}
    assert {name for name, role in vectors.items() if role != "vector"} == {"readout.bias"}

    with torch.device("meta"):
        wide = factory(**{key: [8 * v for v in size] if key == "channels" else 8 * size for key, size in base.items()})
    growth = spec.growth(wide)
    assert {(growth[name].fan_out_growth, growth[name].fan_in_growth) for name in by_role["hidden"]} == {(8, 8)}
    assert parameter_roles(wide, known=spec.roles(wide))["projections.front.weight"] == projection


class Pyramid(nn.Module):
    def __init__(self, channels: Any, condition: int = 6, kernel: int = 3) -> None:
        super().__init__()
        self.condition = nn.Linear(5, condition)
        self.film = nn.Linear(condition, 2 * channels[1])
        self.down = nn.Conv1d(channels[0], channels[1], kernel)
        self.up = nn.ConvTranspose1d(channels[1], channels[0], kernel)


def test_several_keys_and_lists_of_sizes() -> None:
    spec = MupSpec.from_factory(Pyramid, channels=[4, 8], condition=6)
    growth = spec.growth(Pyramid([16, 64], condition=12))
    seen = {name.removesuffix(".weight"): (g.fan_out_growth, g.fan_in_growth) for name, g in growth.items()}
    assert (seen["condition"], seen["film"]) == ((2, 1), (8, 2))
    assert (seen["down"], seen["up"]) == ((8, 4), (4, 8))
    assert (growth["down.weight"].rows, growth["down.weight"].cols) == (64, 16 * 3)
    assert (growth["up.weight"].rows, growth["up.weight"].cols) == (64, 16 * 3)

    one = MupSpec.from_factory(Pyramid, channels=(4, 8))
    assert one.roles(Pyramid([4, 8]))["film.weight"] == "input"  # the condition is fixed now
    assert one == MupSpec.from_factory(Pyramid, channels=[4, 8])


def test_sizes_keep_their_kind() -> None:
    """A factory may add to a tuple, which a list would not go with."""
    spec = MupSpec.from_factory(lambda sizes: nn.Linear(*((3,) + sizes)), sizes=(8,))  # noqa: RUF005
    assert spec.shapes["weight"].role == "input"


def test_models_of_any_size_need_no_memory() -> None:
    def factory(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(9, width), nn.Linear(width, width), nn.Linear(width, 2))

    spec = MupSpec.from_factory(factory, width=10**6)
    assert spec.shapes["1.weight"].base == (10**6, 10**6)
    with torch.device("meta"):
        assert spec.growth(factory(4 * 10**6))["1.weight"].fan_in_growth == 4


def test_the_random_state_is_left_alone() -> None:
    def factory(width: int) -> nn.Module:
        torch.manual_seed(3)
        torch.randn(7, device="cpu")
        return nn.Linear(width, width)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    MupSpec.from_factory(factory, width=4)
    assert torch.equal(torch.get_rng_state(), before)


# Initial values ----------------------------------------------------------------------------------------------------


def deviations(make: Callable[[int], nn.Module], base: int, *widths: int) -> list[dict[str, float]]:
    torch.manual_seed(0)
    spec = MupSpec.from_factory(lambda width: make(width), width=base)
    models = [spec.initialize(make(width)) for width in widths]
    return [{name: p.detach().std().item() for name, p in model.named_parameters()} for model in models]


EXPONENTS: dict[str, tuple[Callable[[int], nn.Module], dict[str, float]]] = {
    "hidden": (lambda w: nn.Linear(w, 2 * w), {"weight": -0.5, "bias": 0}),
    "input": (lambda w: nn.Linear(50, w), {"weight": 0, "bias": 0}),
    "readout": (lambda w: nn.Linear(w, 50), {"weight": -1, "bias": 0}),
    "conv": (lambda w: nn.Conv1d(w, w, 3), {"weight": -0.5, "bias": 0}),
    "conv readout": (lambda w: nn.Conv2d(w, 50, 3), {"weight": -1, "bias": 0}),
    "embedding": (lambda w: nn.Embedding(50, w), {"weight": 0}),
    "transposed": (lambda w: nn.ConvTranspose1d(w, w, 3), {"weight": -0.5, "bias": 0}),
    "transposed input": (lambda w: nn.ConvTranspose1d(20, w, 3), {"weight": 0, "bias": 0}),
    "transposed readout": (lambda w: nn.ConvTranspose1d(w, 50, 3), {"weight": -1, "bias": 0}),
    "cross-attention": (
        lambda w: nn.MultiheadAttention(w, w // 16, kdim=50, add_bias_kv=True),
        {
            "q_proj_weight": -0.5,
            "k_proj_weight": 0,
            "v_proj_weight": -0.5,
            "out_proj.weight": -0.5,
            "bias_k": 0,
            "bias_v": 0,
        },
    ),
    "lstm": (
        lambda w: nn.LSTM(50, w, proj_size=w // 2),
        {
            "weight_ih_l0": 0,
            "weight_hh_l0": -0.5,
            "weight_hr_l0": -0.5,
            "bias_ih_l0": 0,
            "bias_hh_l0": 0,
        },
    ),
    "rnn cell": (lambda w: nn.RNNCell(50, w), {"weight_ih": 0, "weight_hh": -0.5, "bias_ih": 0, "bias_hh": 0}),
    "weight_norm": (
        lambda w: parametrizations.weight_norm(nn.Linear(w, w)),
        {"bias": 0, "parametrizations.weight.original1": -0.5},
    ),
}


@pytest.mark.parametrize("kind", EXPONENTS)
def test_initial_values_follow_the_width_as_the_role_asks(kind: str) -> None:
    make, expected = EXPONENTS[kind]
    narrow, wide = deviations(make, 64, 64, 1024)
    slopes = {name: torch.tensor(wide[name] / narrow[name]).log2().item() / 4 for name in expected}
    assert slopes == pytest.approx(expected, abs=0.07)


def test_transposed_convolutions_of_unequal_scaling() -> None:
    """torch draws them by their outputs, which say nothing of the inputs."""
    torch.manual_seed(0)
    spec = MupSpec.from_factory(Pyramid, channels=[64, 64])
    narrow = Pyramid([64, 64])
    sizes = {}
    for channels in ([64, 1024], [1024, 64]):
        model = spec.initialize(Pyramid(channels))
        sizes[channels[1]] = model.up.weight.std().item() / narrow.up.weight.std().item()
        bias = model.up.bias.std().item() / narrow.up.bias.std().item()
        assert bias == pytest.approx(1, rel=0.3)
    assert sizes == pytest.approx({1024: 0.25, 64: 1}, rel=0.05)  # inputs^-1/2


NORMALISED: dict[str, tuple[Callable[[int], nn.Module], str, int]] = {
    "hidden": (lambda w: nn.Linear(w, w), "weight", 0),
    "input": (lambda w: nn.Linear(3, w), "weight", 0),
    "recurrent": (lambda w: nn.LSTM(3, w), "weight_hh_l0", 0),
    "input of a recurrent layer": (lambda w: nn.LSTM(3, w), "weight_ih_l0", 0),
    "attention": (lambda w: nn.MultiheadAttention(w, w // 4), "in_proj_weight", 0),
    "transposed convolution": (lambda w: nn.ConvTranspose1d(w, w, 3), "weight", 1),
    "input by a transposed convolution": (lambda w: nn.ConvTranspose1d(3, w, 3), "weight", 1),
}


@pytest.mark.parametrize("kind", NORMALISED)
def test_a_normalised_weight_starts_as_the_same_without(kind: str) -> None:
    """Its size is in its magnitude, which says nothing of how torch drew the weight."""
    make, attribute, dim = NORMALISED[kind]

    def start(normalised: bool) -> Tensor:
        def factory(width: int) -> nn.Module:
            layer = make(width)
            return parametrizations.weight_norm(layer, attribute, dim) if normalised else layer

        torch.manual_seed(0)
        model = factory(32)
        return getattr(MupSpec.from_factory(factory, width=8).initialize(model), attribute)

    torch.testing.assert_close(start(normalised=True), start(normalised=False))


def test_at_the_base_width_nothing_changes() -> None:
    model = Pyramid([4, 8])
    before = copy.deepcopy(model.state_dict())
    MupSpec.from_factory(Pyramid, channels=[4, 8], condition=6).initialize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_zeros_stay_zeros_and_norms_ones() -> None:
    def factory(width: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 3))
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        return model

    model = MupSpec.from_factory(factory, width=4).initialize(factory(64))
    assert not model[2].weight.any()
    assert not model[2].bias.any()
    assert torch.equal(model[1].weight, torch.ones(64))


def test_readouts_may_start_at_zero() -> None:
    spec = MupSpec.from_factory(everything, width=8)
    torch.manual_seed(0)
    model = everything(32)
    zeroed = spec.initialize(copy.deepcopy(model), zero_readouts=True)
    assert spec.initialize(model)["readout"].weight.all()
    for name, value in model.named_parameters():
        expected = torch.zeros_like(value) if name == "readout.weight" else value
        assert torch.equal(zeroed.get_parameter(name), expected), name


class Bottleneck(nn.Module):
    """Narrow in the middle, and at its end a declared readout, which is not the last to be registered."""

    def __init__(self, width: int, says: bool) -> None:
        super().__init__()
        self.readout = nn.Linear(width, 3)
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, width)
        if says:
            self.parameter_roles = lambda: {"readout.weight": "readout"}


@pytest.mark.parametrize(("says", "zero"), [(True, "readout.weight"), (False, "down.weight")])
def test_only_the_last_readout_or_those_declared_start_at_zero(says: bool, zero: str) -> None:
    """The others are bottlenecks: between two zeros nothing ever learns."""
    spec = MupSpec.from_factory(partial(Bottleneck, says=says), width=8)
    model = Bottleneck(16, says)
    model.readout = torch.compile(model.readout)
    spec.initialize(model, zero_readouts=True)
    plain = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
    assert [name for name, p in plain.items() if not p.any()] == [zero]


def test_a_frozen_readout_does_not_start_at_zero() -> None:
    """Where it would stay, and nothing before it would ever learn; nor does a bottleneck in its place."""
    spec = MupSpec.from_factory(everything, width=8)
    torch.manual_seed(0)
    model = everything(32)
    model["readout"].requires_grad_(False)
    zeroed = spec.initialize(copy.deepcopy(model), zero_readouts=True)
    for name, value in spec.initialize(model).named_parameters():
        assert torch.equal(zeroed.get_parameter(name), value), name


def test_biases_that_were_set_stay_as_they_are() -> None:
    def factory(width: int) -> nn.Module:
        model = nn.ModuleDict(
            {
                "gate": nn.LSTM(4, width),
                "level": nn.Linear(width, width),
                "drawn": nn.Linear(width, width),
                "prior": nn.Linear(width, 1),
            }
        )
        nn.init.constant_(model["level"].bias, 0.01)
        nn.init.constant_(model["prior"].bias, -4.6)
        with torch.no_grad():
            model["gate"].bias_ih_l0[width : 2 * width] = 1  # the forget gate
        return model

    torch.manual_seed(0)
    model = factory(64)
    before = copy.deepcopy(model.state_dict())
    MupSpec.from_factory(factory, width=16).initialize(model)
    ratio = {name: model.get_parameter(f"{name}") / before[name] for name in before if "bias" in name}
    assert (ratio["level.bias"] == 1).all()
    assert (ratio["prior.bias"] == 1).all()
    assert (ratio["drawn.bias"] == 2).all()
    assert (ratio["gate.bias_hh_l0"] == 2).all()
    gates = ratio["gate.bias_ih_l0"].unflatten(0, (4, 64))
    assert (gates[1] == 1).all()
    assert (gates[[0, 2, 3]] == 2).all()


def test_a_factory_may_compile_parts() -> None:
    def factory(width: int) -> nn.Module:
        return nn.Sequential(torch.compile(nn.Linear(3, width)), nn.Linear(width, 2))

    spec = MupSpec.from_factory(factory, width=8)
    assert list(spec.shapes) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    plain = nn.Sequential(nn.Linear(3, 32), nn.Linear(32, 2))
    assert list(spec.multiplier_of_initial_values(factory(32)).values()) == [1, 1, 0.5, 2]
    assert list(spec.multiplier_of_initial_values(plain).values()) == [1, 1, 0.5, 2]


def test_a_bias_follows_its_weight_where_that_is_shared() -> None:
    class Tied(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(width, width), nn.Linear(width, width)
            self.other.weight = self.one.weight

    spec = MupSpec.from_factory(Tied, width=8)
    assert spec.multiplier_of_initial_values(Tied(32)) == {"one.weight": 1, "one.bias": 2, "other.bias": 2}


def test_a_second_initialisation_is_refused(tmp_path: Path) -> None:
    def factory(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))

    spec = MupSpec.from_factory(factory, width=4)
    model = spec.initialize(factory(16))
    inner = nn.ModuleDict({"network": factory(16)})
    spec.initialize(inner)
    after = copy.deepcopy(model.state_dict())
    for again in (model, copy.deepcopy(model), nn.ModuleDict({"network": model}), inner, inner["network"]):
        with pytest.raises(ValueError, match="was initialised before, and a second time would rescale it again"):
            spec.initialize(again)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_there_is_nothing_to_initialise_on_the_meta_device() -> None:
    spec = MupSpec.from_factory(partial(nn.Linear, 3), out_features=4)
    model = nn.Linear(3, 16, device="meta")
    with pytest.raises(ValueError, match="weight, bias: on the meta device there is nothing to rescale yet"):
        spec.initialize(model)
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert spec.initialize(model) is model


# A spec on disk ----------------------------------------------------------------------------------------------------


def everything(width: int, depth: int = 1) -> nn.Module:
    made: dict[str, nn.Module] = {"embedding": nn.Embedding(5, width), "up": nn.ConvTranspose1d(width, width, 2)}
    made |= {f"hidden{i}": nn.Linear(width, width) for i in range(depth)}
    made |= {"attention": nn.MultiheadAttention(width, width // 4, kdim=3), "readout": nn.Linear(width, 2)}
    return nn.ModuleDict(made)


def test_a_spec_is_plain_data(tmp_path: Path) -> None:
    spec = MupSpec.from_factory(everything, width=8)
    state = spec.state_dict()
    assert json.loads(json.dumps(state)) == state
    torch.save(state, tmp_path / "spec.pt")
    for loaded in (json.loads(json.dumps(state)), torch.load(tmp_path / "spec.pt", weights_only=True)):
        again = MupSpec.from_state_dict(loaded)
        assert again == spec
        assert again.growth(everything(32)) == spec.growth(everything(32))
        assert again.multiplier_of_initial_values(everything(32)) == spec.multiplier_of_initial_values(everything(32))
    assert MupSpec.from_state_dict(state).base == {"width": 8}


# What muP has no rule for ------------------------------------------------------------------------------------------


class Half(nn.Module):
    """Reads features of the width beside two that are not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.film = nn.Linear(width + 2, width)


class Shared(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, width)
        self.logits = nn.Linear(width, 5, bias=False)
        self.logits.weight = self.tokens.weight


class SometimesSkips(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width)
        self.skip = nn.Identity() if width == 8 else nn.Linear(8, width)


REFUSED: dict[str, tuple[Factory, dict[str, Any], str]] = {
    "mixed fan-in": (
        Half,
        {"width": 8},
        r"film\.weight: dimension 1 is 10 at the base width and 18 at 2 times that.*project the fixed part to the wid",
    ),
    "rounded": (
        lambda width: nn.Linear(width, 8 * width // 3),
        {"width": 4},
        r"weight: dimension 0 is 10 .* and 21 at 2 times that.*rounded: choose a base width that divides",
    ),
    "three": (lambda width: Held(width, width, width), {"width": 8}, r"table: dimensions 0, 1, 2 .*split it into"),
    "a stack": (lambda width: Held(3, width, width), {"width": 8}, r"table: dimensions 1, 2 of its shape \(3, 8, 8\)"),
    "bilinear": (lambda width: nn.Bilinear(5, width, width), {"width": 8}, r"weight: dimensions 0, 2 .*split it into"),
    "MuReadout": (
        layers(head=lambda w: mup.MuReadout(w, 3)),
        {"width": 8},
        r"head is mup's MuReadout.*use nn\.Linear",
    ),
    "tied": (
        Shared,
        {"width": 8},
        r"tokens\.weight is shared by layers that muP scales differently \(embedding, readout\); give each its own",
    ),
    "bare": (
        lambda width: Held(1, 7, width),
        {"width": 8},
        r'table, of shape \(1, 7, 8\): is it an input.*Held does not say; tell with roles=\{"table": "embedding"\}',
    ),
    "bare matrix": (lambda width: Held(width, 7), {"width": 8}, r"Held does not say"),
    "weight_norm": (
        layers(head=lambda w: parametrizations.weight_norm(nn.Linear(w, 3))),
        {"width": 8},
        r"head\.parametrizations\.weight\.original1: .* sets the size of this readout's weight.*leave the readout",
    ),
    "former weight_norm": (
        layers(head=lambda w: torch.nn.utils.weight_norm(nn.Linear(w, 3))),
        {"width": 8},
        r"head\.weight_v: .* sets the size of this readout's weight",
    ),
    "weight_norm of a readout by inputs": (
        layers(head=lambda w: parametrizations.weight_norm(nn.Linear(w, 3), dim=1)),
        {"width": 8},
        r"sets the size of this readout's weight.*leave the readout",
    ),
    "weight_norm by inputs": (
        layers(fc=lambda w: parametrizations.weight_norm(nn.Linear(w, w), dim=1)),
        {"width": 8},
        r"fc: weight_norm of its weight has dim=1, .* not one per output.*use weight_norm with dim=0",
    ),
    "weight_norm as a whole": (
        layers(fc=lambda w: parametrizations.weight_norm(nn.Conv1d(w, w, 3), dim=None)),
        {"width": 8},
        r"fc: weight_norm of its weight has dim=None, .*use weight_norm with dim=0",
    ),
    "weight_norm of an input by inputs": (
        layers(fc=lambda w: parametrizations.weight_norm(nn.Linear(3, w), dim=1)),
        {"width": 8},
        r"fc: weight_norm of its weight has dim=1, .*use weight_norm with dim=0",
    ),
    "weight_norm by rows that are inputs": (
        layers(up=lambda w: parametrizations.weight_norm(nn.ConvTranspose1d(w, w, 3))),
        {"width": 8},
        r"up: weight_norm of its weight has dim=0, .*use weight_norm with dim=1",
    ),
    "weight_norm of tokens": (
        layers(tokens=lambda w: parametrizations.weight_norm(nn.Embedding(5, w))),
        {"width": 8},
        r"tokens: weight_norm of its weight has dim=0, .*use weight_norm with dim=1",
    ),
    "weight_norm of a recurrent layer by inputs": (
        layers(cell=lambda w: parametrizations.weight_norm(nn.LSTM(w, w), "weight_hh_l0", dim=1)),
        {"width": 8},
        r"cell: weight_norm of its weight_hh_l0 has dim=1, .*use weight_norm with dim=0",
    ),
    "former weight_norm by inputs": (
        layers(fc=lambda w: torch.nn.utils.weight_norm(nn.Linear(w, w), dim=1)),
        {"width": 8},
        r"fc: weight_norm of its weight has dim=1, .*use weight_norm with dim=0",
    ),
    "former weight_norm as a whole": (
        layers(fc=lambda w: torch.nn.utils.weight_norm(nn.Linear(w, w), dim=None)),
        {"width": 8},
        r"fc: weight_norm of its weight has dim=None, .*use weight_norm with dim=0",
    ),
    "spectral_norm": (
        layers(head=lambda w: parametrizations.spectral_norm(nn.Linear(w, 3))),
        {"width": 8},
        r"sets the size of this readout's weight",
    ),
    "spectral_norm of an input": (
        layers(first=lambda w: parametrizations.spectral_norm(nn.Linear(3, w))),
        {"width": 8},
        r"first\.parametrizations\.weight\.original: .* sets the size of this input's weight",
    ),
    "growing heads": (
        layers(attention=lambda w: nn.MultiheadAttention(w, 2)),
        {"width": 8},
        r"attention: the heads of nn\.MultiheadAttention grow.*1/head_dim; let the number of heads grow",
    ),
    "growing heads of another library": (
        layers(attention=lambda w: Attention(w, -0.5)),
        {"width": 8},
        r"attention: its scale falls like width\^-1/2.*1/head_dim\. Let the number of heads grow",
    ),
    "growing groups": (
        layers(norm=lambda w: nn.GroupNorm(w // 4, w)),
        {"width": 8},
        r"norm: the number of groups of this GroupNorm grows with the width \(2 to 4\).*keep the number fixed",
    ),
    "a bounded embedding": (
        layers(tokens=lambda w: nn.Embedding(5, w, max_norm=1.0)),
        {"width": 8},
        r"tokens: max_norm=1\.0 bounds the norm of this Embedding's rows.*like width\^-1/2.*leave max_norm out",
    ),
    "a bounded bag": (
        layers(tokens=lambda w: nn.EmbeddingBag(5, w, max_norm=2.0)),
        {"width": 8},
        r"tokens: max_norm=2\.0 bounds the norm of this EmbeddingBag's rows",
    ),
    "another architecture": (
        SometimesSkips,
        {"width": 8},
        r"another architecture at 2 times the base width: skip\.bias, skip\.weight differ; choose a base width at",
    ),
    "nothing": (lambda width: nn.Linear(3, 4), {"width": 8}, r"no parameter grows with width"),
    "no key": (lambda: nn.Linear(3, 4), {}, r"name the keywords that scale.*from_factory\(factory, width=64\)"),
    "fraction": (lambda width: nn.Linear(3, 4), {"width": 8.0}, r"width=8\.0 cannot scale.*positive whole number"),
    "zero": (lambda width: nn.Linear(3, 4), {"width": 0}, r"width=0 cannot scale"),
    "flag": (lambda width: nn.Linear(3, 4), {"width": True}, r"width=True cannot scale"),
    "moved": (
        lambda width: nn.Linear(3, width).to("cpu"),
        {"width": 8},
        r"runs on the meta device, .* \(Cannot copy out of meta.*\); move to a device \(\.to.* outside of it",
    ),
    "looked at": (
        lambda width: nn.Linear(3, width if torch.ones(1).item() else 1),
        {"width": 8},
        r"asks for values \(Tensor\.item",
    ),
    "to numpy": (lambda width: nn.Linear(len(torch.ones(3).numpy()), width), {"width": 8}, "asks for values .*numpy"),
    "lazy": (lambda width: nn.LazyLinear(width), {"width": 8}, "weight, bias: of a lazy layer, .*give its inputs"),
    "text": (lambda width: nn.Linear(3, width), {"width": "8"}, r"width='8' cannot scale"),
    "no sizes": (lambda width: nn.Linear(3, 4), {"width": []}, r"width=\[\] cannot scale"),
    "a bad size": (lambda width: nn.Linear(3, 4), {"width": [8, -1]}, r"width=-1 cannot scale"),
}


def test_groups_of_few_channels_are_pointed_out() -> None:
    def factory(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.GroupNorm(4, width))

    with pytest.warns(UserWarning, match=r"1 is a GroupNorm of 2 channels per group at the base width.*base of 16 or"):
        MupSpec.from_factory(factory, width=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MupSpec.from_factory(factory, width=16)


def test_group_norms_of_few_channels_share_one_warning_unless_they_stay_as_they_are() -> None:
    def factory(width: int, growing: bool = True) -> nn.Module:
        norms = [nn.GroupNorm(4, width if growing else 8) for _ in range(9)]
        return nn.Sequential(nn.Linear(3, width), *norms)

    with pytest.warns(UserWarning, match=r"^1 is a GroupNorm of 2 .* \(and so are 8 more\)") as caught:
        MupSpec.from_factory(factory, width=8)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MupSpec.from_factory(partial(factory, growing=False), width=8)


def test_an_embedding_that_does_not_grow_may_be_bounded() -> None:
    """There its rows' norm means the same at every width."""
    found = roles(lambda width: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, width)))
    assert found == {"0.weight": "fixed", "1.weight": "input", "1.bias": "vector"}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_with_the_way_out(case: str) -> None:
    factory, base, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        MupSpec.from_factory(factory, **base)


def test_a_factory_returns_the_model() -> None:
    with pytest.raises(TypeError, match=r"returns the model, and this one returned NoneType"):
        MupSpec.from_factory(lambda width: None, width=8)


def test_a_model_in_place_of_its_factory() -> None:
    with pytest.raises(TypeError, match="builds models, of several widths, and this Linear is one; pass its class"):
        MupSpec.from_factory(nn.Linear(3, 4), width=8)


def test_numpys_numbers_are_numbers() -> None:
    spec = MupSpec.from_factory(lambda width: nn.Linear(3, width), width=np.int64(8))
    assert spec == MupSpec.from_factory(lambda width: nn.Linear(3, width), width=8)
    assert type(spec.state_dict()["base"]["width"]) is int


def test_a_factorys_own_error_is_its_own() -> None:
    def factory(width: int) -> nn.Module:
        raise RuntimeError("no such camera")

    with pytest.raises(RuntimeError, match=r"^no such camera$"):
        MupSpec.from_factory(factory, width=8)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"table": "banana"},
            r"roles call table, of shape \(8, 3\), 'banana'; they can tell input, readout, embedding",
        ),
        ({"table": "hidden"}, r"'hidden'; they can tell"),
        ({"tables": "input"}, r"roles name tables, which ModuleDict does not have"),
        (
            {"gain.table": "input"},
            r"roles call gain\.table, of shape \(8,\), 'input'; .* of a matrix with one .* vector",
        ),
        ({"square.table": "readout"}, r"of a matrix with one dimension that scales"),
    ],
)
def test_roles_that_cannot_be(told: dict[str, str], message: str) -> None:
    factory = layers(gain=lambda w: Held(w), square=lambda w: Held(w, w))
    if "table" in told:
        factory = lambda width: Held(width, 3)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        MupSpec.from_factory(factory, width=8, roles=told)


def extended(width: int) -> nn.Module:
    model = everything(width)
    model["extra"] = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: everything(4), r"embedding\.weight has shape \(5, 4\), narrower than the base model's \(5, 8\)"),
        (
            lambda: nn.Linear(8, 8),
            r"of another model: Linear has no embedding\.weight, up\.weight, up\.bias and \d+ more; make one from the",
        ),
        (
            lambda: nn.ModuleDict({"policy": everything(8, depth=0)}),
            r"of another model: ModuleDict has no policy\.hidden0\.weight, policy\.hidden0\.bias; make",
        ),
        (lambda: everything(8, depth=2), r"does not know hidden1\.weight, hidden1\.bias of ModuleDict.*its depth"),
        (lambda: nn.ModuleDict({"policy": extended(8)}), r"does not know policy\.extra\.weight, policy\.extra\.bias"),
        (lambda: nn.ModuleDict({"policy": everything(8), "v": nn.Linear(2, 2)}), r"does not know v\.weight, v\.bias"),
        (
            lambda: nn.ModuleDict(dict(everything(8).items()) | {"readout": nn.Linear(8, 3)}),
            r"of another model: readout\.weight has shape \(3, 8\), the spec \(2, width\); make one",
        ),
        (
            lambda: nn.ModuleDict(dict(everything(8).items()) | {"readout": nn.Conv1d(8, 2, 1)}),
            r"of another model: readout\.weight has shape \(2, 8, 1\), the spec \(2, width\)",
        ),
    ],
    ids=["narrower", "another", "shallower", "deeper", "larger", "beside", "other sizes", "other dimensions"],
)
@pytest.mark.parametrize("use", ["initialize", "growth", "roles", "multiplier_of_initial_values"])
def test_models_of_another_family_are_refused_and_left_alone(
    model: Callable[[], nn.Module], message: str, use: str
) -> None:
    spec, made = MupSpec.from_factory(everything, width=8), model()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match=message):
        getattr(spec, use)(made)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_what_is_frozen_need_not_be_known() -> None:
    """A target network, and a pretrained encoder."""
    spec = MupSpec.from_factory(everything, width=8)
    for order in (("target", "policy"), ("policy", "target")):
        model = nn.ModuleDict({name: everything(16) for name in order} | {"encoder": nn.Linear(2, 2)})
        model["target"].requires_grad_(False)
        model["encoder"].requires_grad_(False)
        assert {name.partition(".")[0] for name in spec.growth(model)} == {"policy"}
    model["target"].requires_grad_(True)
    model["encoder"].requires_grad_(True)
    with pytest.raises(ValueError, match=r"does not know target\.embedding\.weight"):
        spec.growth(model)


def test_a_parameter_may_be_empty() -> None:
    """As one is that only says on which device the model is."""

    def factory(width: int) -> nn.Module:
        model = nn.Linear(width, 3)
        model.mark = nn.Parameter(torch.empty(0))
        return model

    spec = MupSpec.from_factory(factory, width=8)
    model = spec.initialize(factory(16))
    assert spec.growth(model)["mark"].row_growth == spec.growth(model)["mark"].col_growth == 1


def test_a_submodule_may_be_called_module() -> None:
    class Wrapper(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.module = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    spec = MupSpec.from_factory(Wrapper, width=8)
    assert spec.growth(Wrapper(16))["module.weight"].fan_in_growth == 2
