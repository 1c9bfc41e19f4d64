"""How a factory draws its weights is seen without values, and muP starts from what the base model has."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dopr_lightning import MupSpec
from dopr_lightning.mup.draws import noted_draws

BASE, WIDE = 64, 512

Draw = Callable[[Tensor], object]


def scaled_randn(weight: Tensor) -> None:
    weight.data = 0.02 * torch.randn_like(weight)


def chained(weight: Tensor) -> None:
    """By parts, a copy, and in place."""
    half = weight.shape[0] // 2
    drawn = torch.rand(weight.shape) - 0.5
    with torch.no_grad():
        weight.copy_(drawn.clone()).div_(10)
        weight[:half].normal_(0, 0.1 / math.sqrt(12))


def functional(weight: Tensor) -> None:
    weight.data = torch.normal(0.0, 0.02, weight.shape, device=weight.device)


def about_means(weight: Tensor) -> None:
    weight.data = torch.normal(torch.zeros(weight.shape), weight[0].numel() ** -0.5)


def masked(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.02)
    with torch.no_grad():
        weight.masked_fill_(torch.zeros_like(weight, dtype=torch.bool), 0)


def put_together(weight: Tensor) -> None:
    half = (weight.shape[0] // 2, *weight.shape[1:])
    weight.data = torch.cat([0.1 * torch.randn(half), 0.1 * torch.randn(half)])


def with_half_of_zeros(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.1)
    with torch.no_grad():
        weight[: weight.shape[0] // 2].zero_()


DRAWS: dict[str, Draw] = {
    "torch": lambda weight: None,
    "kaiming, fan_out": partial(nn.init.kaiming_normal_, mode="fan_out"),
    "xavier": nn.init.xavier_uniform_,
    "xavier normal": partial(nn.init.xavier_normal_, gain=0.5),
    "normal": partial(nn.init.normal_, std=0.02),
    "normal, data": lambda weight: weight.data.normal_(std=0.02),
    "standard": nn.init.normal_,
    "truncated": partial(nn.init.trunc_normal_, std=0.02),
    "truncated at two": partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04),
    "uniform": partial(nn.init.uniform_, a=-0.1, b=0.1),
    "randn": scaled_randn,
    "chained": chained,
    "half": with_half_of_zeros,
    "functional": functional,
    "about means": about_means,
    "masked": masked,
    "put together": put_together,
    "orthogonal": lambda weight: nn.init.orthogonal_(weight, 2**0.5),
}


class MLP(nn.Module):
    def __init__(self, width: int, draw: Draw) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.hidden = nn.Linear(width, width)
        self.up = nn.ConvTranspose1d(width, width, 3)
        self.last = nn.Linear(width, 4)
        for module in self.children():
            assert isinstance(module.weight, Tensor)
            draw(module.weight)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_initial_values_are_the_base_models_scaled_as_mup_has_it(draw: Draw) -> None:
    factory = partial(MLP, draw=draw)
    spec = MupSpec.from_factory(factory, width=BASE)
    torch.manual_seed(0)
    base, wide = factory(width=BASE), spec.initialize(factory(width=WIDE))
    growth = WIDE / BASE
    for layer, expected in {"first": 1, "hidden": growth**-0.5, "up": growth**-0.5, "last": 1 / growth}.items():
        ours, narrow = (
            model.get_parameter(f"{layer}.weight").detach().square().mean().sqrt() for model in (wide, base)
        )
        assert float(ours / narrow) == pytest.approx(expected, rel=0.12)  # as far as a few hundred entries tell it


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 512), (512, 64)])
def test_spreads_are_in_the_ratio_of_those_of_values(draw: Draw, inputs: int, outputs: int) -> None:
    def layers() -> list[nn.Linear]:
        pair = [nn.Linear(64, 64), nn.Linear(inputs, outputs)]
        for layer in pair:
            draw(layer.weight)
        return pair

    with noted_draws() as draws, torch.device("meta"):
        noted = [draws.spread(layer.weight) for layer in layers()]
    torch.manual_seed(0)
    narrow, wide = (float(layer.weight.detach().square().mean().sqrt()) for layer in layers())
    assert None not in noted
    assert noted[1] / noted[0] == pytest.approx(wide / narrow, rel=0.05)  # type: ignore[operator]


@pytest.mark.parametrize("old", [False, True], ids=["parametrized", "hook"])
@pytest.mark.parametrize("redrawn", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_rows_of_a_weight_norm_keep_the_size_that_mup_wants(old: bool, redrawn: bool) -> None:
    """Also where the direction is drawn anew behind it, which says nothing of the weight."""

    def make(width: int) -> nn.Module:
        layers = nn.Linear(8, width), nn.Linear(width, width)
        wrap = nn.utils.weight_norm if old else parametrizations.weight_norm
        model = nn.Sequential(*(wrap(layer) for layer in layers), nn.Linear(width, 3))
        for name, parameter in model.named_parameters():
            if redrawn and name.endswith(("weight_v", "original1")):
                nn.init.normal_(parameter, std=0.01)
        return model

    spec = MupSpec.from_factory(make, width=BASE)
    torch.manual_seed(0)
    base, wide = make(BASE), spec.initialize(make(WIDE))
    for model in (base, wide):
        model(torch.zeros(1, 8))  # the hook computes the weight in the forward
    for layer in (0, 1):  # of a row's entries the sum of squares: that of a hidden layer stays as the width grows
        rows = [model[layer].weight.detach().square().sum(1).mean().sqrt() for model in (wide, base)]
        assert float(rows[0] / rows[1]) == pytest.approx(1, rel=0.05)


def test_what_has_no_storage_is_passed_over() -> None:
    class Graph(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(8, width)
            self.register_buffer("laplacian", torch.eye(4, device="cpu").to_sparse())

    assert MupSpec.from_factory(Graph, width=BASE).shapes["layer.weight"].role == "input"


def test_temporary_values_are_not_held() -> None:
    with noted_draws() as draws:
        for _ in range(3):
            torch.zeros(10) * 2.0
    assert not draws._spreads


def test_a_vector_keeps_the_size_that_it_has_in_the_base_model() -> None:
    class Token(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(8, width)
            nn.init.uniform_(self.layer.bias, -(width**-0.5), width**-0.5)
            self.token = nn.Parameter(width**-0.5 * torch.randn(width))

    factors = MupSpec.from_factory(Token, width=BASE).multiplier_of_initial_values(Token(WIDE))
    expected = pytest.approx(math.sqrt(WIDE / BASE))
    assert (factors["token"], factors["layer.bias"], factors["layer.weight"]) == (expected, expected, 1)


def test_an_embedding_keeps_the_size_that_it_has_in_the_base_model() -> None:
    def make(width: int) -> nn.Module:
        model = nn.Sequential(nn.Embedding(100, width), nn.Linear(width, 3))
        nn.init.normal_(model[0].weight, std=width**-0.5)
        return model

    spec = MupSpec.from_factory(make, width=BASE)
    assert spec.multiplier_of_initial_values(make(WIDE))["0.weight"] == pytest.approx(math.sqrt(WIDE / BASE))


def test_a_bias_of_a_spread_that_stays_is_left_as_it_is() -> None:
    def make(width: int) -> nn.Module:
        layer = nn.Linear(width, width)
        nn.init.normal_(layer.bias, std=0.01)  # within what torch itself would draw
        nn.init.normal_(layer.weight, std=0.02)
        return nn.Sequential(layer, nn.Linear(width, width))

    spec = MupSpec.from_factory(make, width=BASE)
    factors = spec.multiplier_of_initial_values(make(WIDE))
    assert (factors["0.bias"], factors["1.bias"]) == (1, pytest.approx(math.sqrt(WIDE / BASE)))


def test_layers_that_are_copied_in_the_factory_are_followed() -> None:
    def make(width: int) -> nn.Module:
        layer = nn.Linear(width, width)
        nn.init.normal_(layer.weight, std=0.02)
        return nn.Sequential(layer, copy.deepcopy(layer))

    factors = MupSpec.from_factory(make, width=BASE).multiplier_of_initial_values(make(WIDE))
    assert factors["0.weight"] == factors["1.weight"] == pytest.approx((WIDE / BASE) ** -0.5)


def test_a_draw_that_has_mups_share_already_is_refused() -> None:
    def make(width: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 4))
        nn.init.normal_(model[1].weight, std=1 / width)
        return model

    with pytest.raises(ValueError, match=r"1\.weight: its initial values are drawn 0\.5 times as large at 2 times"):
        MupSpec.from_factory(make, width=BASE)


def test_what_the_factory_does_not_draw_is_as_torchs_layers_draw_it() -> None:
    def make(width: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4))
        nn.init.zeros_(model[1].weight)
        nn.init.eye_(model[2].weight)
        return model

    factors = MupSpec.from_factory(make, width=BASE).multiplier_of_initial_values(make(WIDE))
    assert factors["1.weight"] == pytest.approx(1)
    assert factors["2.weight"] == pytest.approx((WIDE / BASE) ** -0.5)


def test_a_sum_with_a_constant_is_no_draw_of_that_spread() -> None:
    """An identity with a little noise, which no factor for the noise may shrink."""

    def make(width: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, width))
        model[1].weight.data = torch.eye(width) + 0.01 * torch.randn(width, width)
        return model

    factors = MupSpec.from_factory(make, width=BASE).multiplier_of_initial_values(make(WIDE))
    assert factors["1.weight"] == pytest.approx(1)


def test_torchs_own_initialisation_is_as_before_afterwards() -> None:
    originals = nn.init._no_grad_trunc_normal_, nn.init.orthogonal_  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), noted_draws():
        raise ZeroDivisionError
    assert (nn.init._no_grad_trunc_normal_, nn.init.orthogonal_) == originals  # type: ignore[attr-defined]
