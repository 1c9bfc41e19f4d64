"""How a factory draws its weights is seen without values, and muP starts from what the base model has."""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

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


def test_the_same_spread_is_noted_as_values_have() -> None:
    with noted_draws() as draws, torch.device("meta"):
        weights = {name: nn.Linear(40, 30).weight for name in DRAWS}
        for name, draw in DRAWS.items():
            draw(weights[name])
    assert {name: draws.spread(weight) is not None for name, weight in weights.items()} == dict.fromkeys(DRAWS, True)


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
        nn.init.orthogonal_(model[2].weight)
        return model

    factors = MupSpec.from_factory(make, width=BASE).multiplier_of_initial_values(make(WIDE))
    assert factors["1.weight"] == pytest.approx(1)
    assert factors["2.weight"] == pytest.approx((WIDE / BASE) ** -0.5)


def test_torchs_own_initialisation_is_as_before_afterwards() -> None:
    original = nn.init._no_grad_trunc_normal_  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), noted_draws():
        raise ZeroDivisionError
    assert nn.init._no_grad_trunc_normal_ is original  # type: ignore[attr-defined]
