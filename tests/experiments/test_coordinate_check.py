"""The coordinate check: what it measures, that it passes under muP, and that no wrong multiplier passes it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from toy_task import CONFIG

from dopr_lightning.errors import UserError
from dopr_lightning.experiments.coordinate_check import main
from dopr_lightning.experiments.coordinates import (
    EXCEPTIONS,
    LEVELLING,
    OUTPUT,
    TOLERANCE,
    CoordinateCheck,
    Row,
    _row,
    _unless_unmoved,
    coordinate_check,
    fit_slope,
)
from dopr_lightning.mup import MupSpec
from dopr_lightning.optim import make_optimizer, parameter_roles
from dopr_lightning.policies.flow import flow_matching_loss
from dopr_lightning.policies.networks import (
    ActionTransformer,
    ConditionalUnet1d,
    ResidualMLP,
    VisionMLP,
    image_encoder,
)
from dopr_lightning.preconditioner import ActivationPreconditioner

WIDTHS = [16, 32, 64, 128, 256]
OBSERVATION, ACTION, OBSERVE, HORIZON = 5, 2, 2, 4
SIZES = (OBSERVATION, ACTION, OBSERVE, HORIZON, True)
CROP = 8

Factory = Callable[..., nn.Module]


def mlp(width: int) -> nn.Module:
    return ResidualMLP(*SIZES, width=width, depth=2)


def unet(width: int) -> nn.Module:
    return ConditionalUnet1d(*SIZES, channels=(width, width), condition_dim=width, kernel_size=3, groups=4)


def transformer(width: int) -> nn.Module:
    return ActionTransformer(*SIZES, width=width, depth=1, heads=2)


def positioned(width: int) -> nn.Module:
    """The transformer with learnt positions beside its fixed ones."""
    network = transformer(width)
    network.position = nn.Embedding(HORIZON, width)
    places = torch.arange(HORIZON, device="cpu")
    network.input.register_forward_hook(lambda module, args, tokens: tokens + network.position(places))
    return network


def vision(width: int) -> nn.Module:
    sizes = {"encoder_width": width, "crop": CROP, "width": width, "depth": 1}
    return VisionMLP(OBSERVATION, ACTION, 1, HORIZON, False, cameras=["front"], **sizes)


def loss_of(rows: int) -> Callable[[nn.Module], Tensor]:
    """Flow matching on a batch of a smooth task; few rows, since the limit is that of layers wider than the batch."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    observation, noise = draw(rows, OBSERVE, OBSERVATION), draw(rows, HORIZON, ACTION)
    action = (observation.flatten(1) @ draw(OBSERVE * OBSERVATION, HORIZON * ACTION) / 3).tanh()
    time = torch.rand(rows, generator=generator)
    return lambda network: flow_matching_loss(
        network, action.unflatten(1, (HORIZON, ACTION)), observation, x0=noise, t=time
    )


def loss_of_images(rows: int) -> Callable[[Any], Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    state, images, target = draw(rows, 1, OBSERVATION), draw(rows, 1, 3, CROP, CROP), draw(rows, HORIZON, ACTION)
    seen = {"state": state, "images": {"front": images.sigmoid()}}
    return lambda network: mse_loss(network(None, None, network.encode(seen)), target)


@cache
def spec_of(factory: Factory) -> MupSpec:
    return MupSpec.from_factory(factory, width=WIDTHS[0])


@cache
def roles_of(factory: Factory) -> dict[str, str]:
    model = factory(WIDTHS[0])
    return dict(parameter_roles(model, known=spec_of(factory).roles(model)))


def check(
    factory: Factory,
    base: str,
    *,
    mup: bool = True,
    wrong: tuple[str, float] | None = None,
    change: Callable[[nn.Module, Optimizer, int], None] | None = None,
    seeds: int = 1,
    rows: int = 8,
    widths: list[int] = WIDTHS,
    loss: Callable[[Any], Tensor] | None = None,
    **options: Any,
) -> CoordinateCheck:
    """With the real preconditioner. ``wrong`` multiplies the rate of one role by a power of the width; ``change``
    spoils a model and its optimizer, which were right."""

    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model = factory(width)
        spec = spec_of(factory) if mup else None
        if spec:
            spec.initialize(model)
        spoilt = {wrong[0]: (width / WIDTHS[0]) ** wrong[1]} if wrong else None
        optimizer = make_optimizer(model, base, lr=3e-3, mup=spec, lr_by_role=spoilt, **options)
        if change:
            change(model, optimizer, width)
        return model, optimizer

    dopr = {"damping": 0.01}
    return coordinate_check(
        build, loss or loss_of(rows), widths, seeds=range(seeds), dopr=dopr, least=EXCEPTIONS.get(base)
    )


def slopes(found: CoordinateCheck, quantity: str) -> dict[str, float]:
    return {row.layer: row.slope for row in found.rows if row.quantity == quantity}


NETWORKS = [(mlp, 1, 8), (unet, 1, 4), (transformer, 2, 8)]
BASES = [(*network, base) for network in NETWORKS for base in ("adamw", "muon", "signum", "adamuon")]


@pytest.mark.parametrize(
    ("factory", "seeds", "rows", "base"),
    [*BASES, (mlp, 1, 8, "lion"), (transformer, 2, 8, "lion"), (mlp, 1, 8, "soap")],
)
def test_mup_passes_and_the_standard_parametrisation_does_not(
    factory: Factory, seeds: int, rows: int, base: str
) -> None:
    right = check(factory, base, seeds=seeds, rows=rows)
    assert right.passed, right.failures()
    assert right.worst() is None
    # The exceptions are few, and bounded.
    levelling = [row for row in right.rows if row.levels_off]
    assert len(levelling) <= len(right.rows) // 50
    assert all(abs(row.slope) <= LEVELLING for row in levelling)

    # As AdaMuon has it under muP: what is wrong is to be the rates.
    options = {"scale": "spectral"} if base == "adamuon" else {}
    wrong = check(factory, base, rows=rows, widths=WIDTHS[:4], mup=False, **options)
    assert not wrong.passed
    # Not by a hair: hidden rates are wrong by width^1/2 (Muon's kind) or width.
    assert np.median([abs(row.slope) for row in wrong.rows if row.quantity == "spectral"]) > 0.4


NOT_HIDDEN = ("input", "readout", "vector")
"""What Muon and AdaMuon leave to AdamW."""


@pytest.mark.parametrize("power", [-0.5, 0.5, 1.0])
@pytest.mark.parametrize("role", ["input", "hidden", "readout", "vector"])
def test_every_wrong_rate_of_adamw_is_found_and_named(role: str, power: float) -> None:
    """1 is what Adam's hidden weights and readouts have without muP."""
    found_and_named(mlp, "adamw", role, power, WIDTHS)


@pytest.mark.parametrize("power", [-0.5, 0.5])
@pytest.mark.parametrize(
    ("factory", "base", "role"),
    [
        *((positioned, "adamw", role) for role in ("hidden", "condition", "embedding")),
        *((mlp, base, role) for base in ("muon", "signum", "adamuon") for role in NOT_HIDDEN),
    ],
)
def test_wrong_rates_of_other_bases_and_roles_are_found_and_named(
    factory: Factory, base: str, role: str, power: float
) -> None:
    found_and_named(factory, base, role, power, WIDTHS[:4])


def found_and_named(factory: Factory, base: str, role: str, power: float, widths: list[int]) -> None:
    worst = check(factory, base, wrong=(role, power), widths=widths).worst()
    assert worst is not None
    name = worst.layer if worst.quantity == "entries" else f"{worst.layer}.weight"
    assert roles_of(factory)[name] == role
    assert worst.quantity == ("entries" if role == "vector" else "spectral")
    assert worst.slope == pytest.approx(power, abs=0.2)
    assert f"its learning rate is too {'large' if power > 0 else 'small'} with width" in worst.diagnosis


@pytest.mark.parametrize("power", [-0.5, 0.5])
@pytest.mark.parametrize(("factory", "base"), [(mlp, "muon"), (mlp, "signum"), (mlp, "adamuon"), (unet, "adamw")])
def test_wrong_rates_of_hidden_weights_are_found(factory: Factory, base: str, power: float) -> None:
    """For Muon with AdamW's RMS and AdaMuon, +1/2 is the rate without muP."""
    found = check(factory, base, rows=4, widths=WIDTHS[:4], wrong=("hidden", power))
    wrong = [row for row in found.failures() if row.quantity == "spectral"]
    hidden, conditions = ({n for n, r in roles_of(factory).items() if r == role} for role in ("hidden", "condition"))
    assert {f"{row.layer}.weight" for row in wrong} <= hidden | conditions  # FiLM's errors come from what is wrong
    assert len(wrong) > 0.9 * len(hidden)
    assert np.median([row.slope for row in wrong]) == pytest.approx(power, abs=0.15)


def wrong_values(name: str, power: float) -> Callable[[nn.Module, Optimizer, int], None]:
    def change(model: nn.Module, optimizer: Optimizer, width: int) -> None:
        with torch.no_grad():
            model.get_parameter(name).mul_((width / WIDTHS[0]) ** power)

    return change


@pytest.mark.parametrize("name", ["input.weight", "blocks.0.fc1.weight", "readout.weight"])
def test_initial_values_that_are_too_large_are_found(name: str) -> None:
    """A readout drawn like the others, fan_in^-1/2, is wrong by width^1/2."""
    worst = check(mlp, "adamw", change=wrong_values(name, 0.5)).worst()
    assert worst is not None
    assert f"{worst.layer}.weight" == name
    assert worst.quantity == "initial"
    assert "its initial values are too large with width" in worst.diagnosis


def test_initial_values_may_be_small_only_where_outputs_do_not_grow() -> None:
    def zero(model: nn.Module, optimizer: Optimizer, width: int) -> None:
        nn.init.zeros_(model.get_parameter("readout.weight"))

    found = check(mlp, "adamw", change=zero)
    assert found.passed, found.failures()
    (row,) = (row for row in found.rows if (row.layer, row.quantity) == ("readout", "initial"))
    assert row.note == "0 at every width"

    found = check(mlp, "adamw", change=wrong_values("blocks.1.fc2.weight", -0.5))
    assert "blocks.1.fc2" in {row.layer for row in found.failures() if row.quantity in ("activation", "change")}


def test_activations_alone_would_miss_what_spectral_norms_show() -> None:
    """Muon with AdamW's RMS, right but for its hidden rates, which do not fall with the width.

    Sizes of activations stay; the hidden updates are wrong by width^1/2.
    """
    found = check(mlp, "muon", wrong=("hidden", 0.5))
    assert all(row.passed for row in found.rows if row.quantity == "activation")
    for quantity in ("spectral", "update"):
        for layer, slope in slopes(found, quantity).items():
            assert slope == pytest.approx(0.5 if "fc" in layer else 0.0, abs=0.15), (quantity, layer)
    worst = found.worst()
    assert worst is not None
    assert worst.quantity == "spectral"


def test_adamuon_needs_its_spectral_scale_where_one_direction_dominates() -> None:
    """In the paper's scale a matrix whose inputs have a mean grows like width^1/2 too fast: a transformer's modulation,
    were it not AdamW's."""
    worst = check(transformer, "adamuon", scale="rms", roles={"modulation.weight": "hidden"}).worst()
    assert worst is not None
    assert (worst.layer, worst.quantity) == ("modulation", "spectral")
    assert worst.slope == pytest.approx(0.5, abs=0.1)


class Logits(nn.Module):
    """A transformer whose output is its attention's logits, so that a check sees them; its prediction lies aside."""

    def __init__(self, width: int, logits: list[Tensor]) -> None:
        super().__init__()
        self.network = transformer(width)
        self.logits = logits

    def forward(self, *args: Tensor) -> Tensor:
        self.logits.clear()
        self.prediction = self.network(*args)
        return self.logits[-1]


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_an_attention_scale_that_is_not_mups_shows_in_the_logits(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """d^-1/2 in place of 1/d: queries and keys that have learnt to agree have a product like d.

    At first they have not, attention is almost uniform, and nothing else in the network tells the two scales apart:
    hence a higher rate and more steps.
    """
    attend, logits = torch.nn.functional.scaled_dot_product_attention, list[Tensor]()
    power = 0.0

    def watched(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        scale *= (q.shape[-1] / 8) ** power
        logits.append(scale * q @ k.mT)
        return attend(q, k, v, scale=scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)

    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model = Logits(width, logits)
        spec_of(transformer).initialize(model)
        return model, make_optimizer(model, base, lr=0.03, mup=spec_of(transformer))

    def loss(model: Any) -> Tensor:
        def velocity(*args: Tensor) -> Tensor:
            model(*args)
            return model.prediction

        return loss_of(8)(velocity)  # type: ignore[arg-type]

    def exponent() -> float:
        found = coordinate_check(build, loss, [16, 64, 256], steps=8, seeds=[0, 1], dopr={"damping": 0.01})
        return slopes(found, "change")[OUTPUT]

    # Narrow layers' queries and keys also agree by chance, which falls like d^-1/2: hence the lower bound.
    assert -0.3 < exponent() < TOLERANCE
    power = 0.5
    assert exponent() > 2 * TOLERANCE


def shares_of_eps(factory: Factory, base: str, width: int, **options: Any) -> dict[str, float]:
    """eps over the size of what it is added to, in the last of a few preconditioned steps."""
    torch.manual_seed(0)
    model = spec_of(factory).initialize(factory(width))
    optimizer = make_optimizer(model, base, lr=3e-3, mup=spec_of(factory), **options)
    preconditioner, loss = ActivationPreconditioner(model), loss_of(8)
    for _ in range(4):
        optimizer.zero_grad()
        loss(model).backward()
        preconditioner.step()
        optimizer.step()

    def size(update: Tensor, of_matrix: bool) -> float:
        return float(update.norm() if of_matrix else update.square().mean().sqrt())

    return {
        name: group["eps"] / size(parameter.grad, "ns_steps" in group)  # Muon's is for the whole matrix
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


@pytest.mark.parametrize("base", ["adamw", "muon"])
@pytest.mark.parametrize("factory", [mlp, transformer])
def test_eps_is_far_below_preconditioned_gradients_at_every_width(factory: Factory, base: str) -> None:
    """Which no coordinate check tells: an eps that is too large at every width slows all of them alike."""
    for width in WIDTHS:
        shares = shares_of_eps(factory, base, width)
        worst = max(shares, key=shares.__getitem__)
        assert shares[worst] < 0.01, (worst, width)


def test_an_eps_that_is_too_large_would_be_seen() -> None:
    assert max(shares_of_eps(transformer, "adamw", WIDTHS[0], eps=1e-6).values()) > 0.01


@pytest.fixture
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder small enough to be as wide as groups of four channels need at the base, and eight times that."""
    monkeypatch.setattr(image_encoder, "GROUPS", image_encoder.GROUPS[:2])
    monkeypatch.setattr(image_encoder, "STRIDES", image_encoder.STRIDES[:2])


@pytest.mark.usefixtures("two_stages")
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_a_network_with_a_camera_passes(base: str) -> None:
    """But for few layers, and not by much: of GroupNorms over one or four pixels two seeds say little."""
    found = check(vision, base, widths=WIDTHS[:4], seeds=2, loss=loss_of_images(4))
    failures = found.failures()
    assert len(failures) <= len(found.rows) // 50, failures
    assert all(row.excess < 0.1 for row in failures), failures
    assert sum(row.levels_off for row in found.rows) <= len(found.rows) // 20
    seen = {row.layer for row in found.rows if row.quantity == "spectral" and min(row.values) > 0}
    for layer in ("conv1", "stages.0.0.conv1", "stages.1.0.downsample.0", "stages.1.1.conv2"):
        assert f"cameras.front.resnet.{layer}" in seen
    assert "projections.front" in seen


@pytest.mark.usefixtures("two_stages")
def test_a_first_convolution_drawn_by_its_outputs_is_found() -> None:
    """As torchvision's ResNet draws it: its weights would shrink with the width."""
    conv1 = "cameras.front.resnet.conv1"
    found = check(
        vision, "adamw", widths=WIDTHS[:4], loss=loss_of_images(4), change=wrong_values(f"{conv1}.weight", -0.5)
    )
    (row,) = (row for row in found.rows if (row.layer, row.quantity) == (conv1, "activation"))
    assert not row.passed
    assert row.slope == pytest.approx(-0.5, abs=0.15)


class Everything(nn.Module):
    """Layers of every kind, and parameters without a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, width)
        self.position = nn.Parameter(torch.randn(3, width))
        self.linear = nn.Linear(width, 2 * width)
        self.up = nn.ConvTranspose1d(2 * width, width, 2, stride=2)
        self.conv = nn.Conv1d(width, 5, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(width, 2 * width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.linear(self.embedding(tokens) + self.position) + (self.position @ self.mix)
        return self.conv(self.up(x.transpose(1, 2)).tanh())


def test_quantities_are_what_they_are_called() -> None:
    """One step of SGD, where dW = -lr G, against each layer's own algebra."""
    tokens = torch.tensor([[0, 1, 2], [3, 3, 1]])
    widths, lr = [2, 4, 8], 0.1

    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model = Everything(width).double()
        return model, torch.optim.SGD(model.parameters(), lr=lr)

    def loss(model: nn.Module) -> Tensor:
        return model(tokens).square().mean()

    state = torch.get_rng_state()
    found = coordinate_check(build, loss, widths, steps=1, seeds=[7])
    assert torch.equal(torch.get_rng_state(), state)
    rows = {(row.layer, row.quantity): row for row in found.rows}
    for index, width in enumerate(widths):
        torch.manual_seed(7)
        model, optimizer = build(width)
        assert isinstance(model, Everything)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        output = model(tokens).detach()
        loss(model).backward()
        optimizer.step()
        with torch.no_grad():
            steps = {name: p - before[name] for name, p in model.named_parameters()}
            embedded = model.embedding(tokens) + model.position
            inner = (model.linear(embedded) + model.position @ model.mix).transpose(1, 2)
            raised = model.up(inner)
            after = model(tokens)

        def value(layer: str, quantity: Any, index: int = index) -> float:
            return rows[layer, quantity].values[index]

        def rms(x: Tensor) -> float:
            return float(x.square().mean().sqrt())

        def norm(x: Tensor) -> float:
            return float(torch.linalg.svdvals(x)[0])

        kernel = steps["conv.weight"]
        padded = torch.nn.functional.pad(raised.tanh(), (1, 1))
        patches = torch.stack([padded[:, :, k : k + 6] for k in range(3)], dim=2)  # (B, C_in, taps, T)
        expected = {
            ("embedding", "update"): rms(steps["embedding.weight"][tokens]),
            ("embedding", "spectral"): norm(steps["embedding.weight"]) / math.sqrt(width / 4),
            ("position", "entries"): rms(steps["position"]),
            ("linear", "update"): rms(embedded @ steps["linear.weight"].T),
            ("linear", "spectral"): norm(steps["linear.weight"]) / math.sqrt(2),
            ("linear", "initial"): norm(before["linear.weight"]) / math.sqrt(2),
            ("linear.bias", "entries"): rms(steps["linear.bias"]),
            ("up", "update"): rms(torch.einsum("nit,iok->notk", inner, steps["up.weight"])),
            ("up", "spectral"): norm(steps["up.weight"].transpose(0, 1).flatten(1)) / math.sqrt(width / (4 * width)),
            ("conv", "update"): rms(torch.einsum("bikt,oik->bot", patches, kernel)),
            ("conv", "spectral"): norm(kernel.flatten(1)) / math.sqrt(5 / (3 * width)),
            ("mix", "spectral"): norm(steps["mix"]) / math.sqrt(1 / 2),
            ("conv", "change"): rms(after - output),
            ("conv", "activation"): rms(after),
            (OUTPUT, "change"): rms(after - output),
            (OUTPUT, "activation"): rms(after),
        }
        for (layer, quantity), wanted in expected.items():
            assert value(layer, quantity) == pytest.approx(wanted, rel=1e-9), (layer, quantity, width)
    # A table has steps of its entries, a matrix of which both sides grow has norms; nothing is judged by both.
    assert ("position", "spectral") not in rows
    assert ("mix", "entries") not in rows
    # Outputs of fixed size may fall; those that grow may not, nor may changes.
    assert rows["conv", "activation"].low == rows["linear", "initial"].low == -math.inf
    assert rows["linear", "activation"].low == rows["conv", "change"].low == -0.15


class InPlace(nn.Module):
    """Works in place on what layers give and on what they get, or does the same with copies."""

    def __init__(self, width: int, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.input, self.first, self.second = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, width)
        self.readout = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        raised = self.first(x)
        y = self.second(raised.relu_() if self.in_place else raised.relu())
        # In training autograd would refuse it: the layer's input is needed.
        x = x.add_(y) if self.in_place and not torch.is_grad_enabled() else x + y
        y = self.readout(x)
        return y.tanh_() if self.in_place else y.tanh()


def test_work_in_place_is_not_taken_for_what_layers_get_and_give() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def found(in_place: bool) -> tuple[Row, ...]:
        def build(width: int) -> tuple[nn.Module, Optimizer]:
            model = InPlace(width, in_place)
            return model, torch.optim.SGD(model.parameters(), lr=0.1)

        return coordinate_check(build, lambda model: model(x).square().mean(), [2, 4, 8], seeds=[0]).rows

    assert found(True) == found(False)


class ByKeyword(nn.Module):
    """Calls a layer by position, or by keyword."""

    def __init__(self, width: int, keyword: bool) -> None:
        super().__init__()
        self.keyword = keyword
        self.input, self.readout = nn.Linear(3, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return self.readout(input=x) if self.keyword else self.readout(x)


def test_layers_may_be_called_by_keyword() -> None:
    def found(keyword: bool) -> tuple[Row, ...]:
        def build(width: int) -> tuple[nn.Module, Optimizer]:
            model = ByKeyword(width, keyword)
            return model, torch.optim.SGD(model.parameters(), lr=0.1)

        return coordinate_check(
            build, lambda model: mse_loss(model(torch.ones(4, 3)), torch.ones(4, 1)), [2, 4, 8]
        ).rows

    assert found(True) == found(False)


class Branches(nn.Module):
    """A layer beside which is one that is dead, ReLU's inputs being far below 0, and one that the loss does not use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.readout = nn.Linear(3, width), nn.Linear(width, 1)
        self.bottleneck, self.unused = nn.Linear(width, 2), nn.Linear(width, 2)
        nn.init.constant_(self.bottleneck.bias, -100.0)
        self.back = nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return self.readout(x + self.back(self.bottleneck(x).relu()))


def branches(weight_decay: float) -> Callable[[int], tuple[nn.Module, Optimizer]]:
    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model = Branches(width)
        return model, torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=weight_decay)

    return build


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_what_no_gradient_moves_is_not_taken_for_right(weight_decay: float) -> None:
    """Nor is what has none at all taken for wrong."""
    x = torch.ones(4, 3)
    found = coordinate_check(branches(weight_decay), lambda model: (model(x) - 1).square().mean(), [2, 4, 8])
    still = [row for row in found.rows if "no gradient moved it in 4 steps" in row.note]
    assert {(row.layer, row.quantity) for row in still} == {
        ("bottleneck", "spectral"),
        ("bottleneck.bias", "entries"),
        ("back", "spectral"),
    }
    assert not any(row.passed or row.levels_off for row in still)
    assert all(row in found.failures() for row in still)
    assert "bottleneck: ||dW||: no gradient moved it" in " ".join(row.diagnosis for row in still)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["passed"] is False
    unused = [row for row in found.rows if row.layer.startswith("unused") and row.quantity != "initial"]
    assert [row.passed for row in unused] == [True, True]


def test_what_lies_behind_zeros_takes_more_steps() -> None:
    x = torch.ones(4, 3)

    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model, optimizer = linear_build(0.1)(width)
        nn.init.zeros_(model.get_parameter("1.weight"))
        return model, optimizer

    def still(steps: int) -> set[str]:
        found = coordinate_check(build, lambda model: (model(x) - 1).square().mean(), [2, 4, 8], steps=steps)
        return {row.layer for row in found.rows if f"in {steps} step" in row.note and "behind zeros" in row.note}

    assert still(1) == {"0", "0.bias"}
    assert still(2) == set()


class Attention(nn.Module):
    """With projections of its own for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input, self.readout = nn.Linear(3, width), nn.Linear(width, 2)
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        scores = self.queries(x) @ self.keys(x).mT / x.shape[-1]
        return self.readout(x + scores.softmax(-1) @ self.values(x))


def test_gradients_of_rounding_are_not_judged() -> None:
    """A bias of keys adds one number to all logits of a query: softmax takes no notice, and Adam all the more."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, y = draw(4, 8, 3), draw(4, 8, 2)
    spec = MupSpec.from_factory(Attention, width=16)

    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model = spec.initialize(Attention(width))
        return model, make_optimizer(model, "adamw", lr=3e-3, mup=spec)

    found = coordinate_check(build, lambda model: mse_loss(model(x), y), [32, 64, 128, 256], seeds=[0, 1])
    assert found.passed, found.failures()
    assert [row.layer for row in found.rows if "rounding" in row.note] == ["keys.bias"]


def test_small_gradients_are_judged_where_they_are_no_rounding() -> None:
    known = row([1, 2, 4, 8, 16])

    def judged(*own: float) -> Row:
        return _unless_unmoved(known, [[{"layer": size, "one": 1.0, "more": 2.0}] for size in own], 4)

    assert judged(1e-8, 1e-8, 1e-8, 1e-8, 1e-8).passed
    assert judged(1e-8, 1e-8, 0.0, 1e-8, 1e-8).passed  # a rounding's rounding
    for own in ((1e-5,) * 5, (1e-5, 1e-8, 1e-8, 1e-8, 1e-8), (1e-8, 1e-8, 1e-8, 1e-8, math.nan)):
        assert judged(*own) is known


def test_exponents_of_power_laws() -> None:
    widths = [64, 128, 512, 1024]
    for slope in (-1.0, -0.15, 0.0, 0.5):
        assert fit_slope(widths, [3 * w**slope for w in widths]) == pytest.approx(slope, abs=1e-12)
    # Independent of the base: normal equations by hand.
    values = [1.0, 3.0, 2.0, 5.0]
    x, y = np.log(widths), np.log(values)
    assert fit_slope(widths, values) == pytest.approx(np.cov(x, y)[0, 1] / np.var(x, ddof=1))


def row(values: list[float], low: float = -0.15, widths: tuple[int, ...] = (1, 2, 4, 8, 16)) -> Row:
    return _row("layer", "update", widths, [[value] for value in values], low, 0.15)


@pytest.mark.parametrize(
    ("values", "low", "passed", "note"),
    [
        ([w**0.14 for w in (1, 2, 4, 8, 16)], -0.15, True, ""),
        ([w**0.16 for w in (1, 2, 4, 8, 16)], -0.15, False, ""),
        ([w**-0.16 for w in (1, 2, 4, 8, 16)], -0.15, False, ""),
        ([w**-0.5 for w in (1, 2, 4, 8, 16)], -math.inf, True, ""),
        ([0.0] * 5, -0.15, True, "0 at every width"),
        ([1.0, 0.0, 1.0, 1.0, 1.0], -0.15, False, "0 at width 2, and not at others"),
        ([1.0, 1.0, 1.0, math.nan, math.nan], -0.15, False, "diverged at width 8; lower the learning rate"),
        ([1.0, 1.0, 1.0, math.inf, 1.0], -0.15, False, "diverged at width 8; lower the learning rate"),
        # Levelling off: flat from width 4 on, and within the bound over all.
        ([2.0, 1.4, 1.0, 1.0, 1.0], -0.15, True, ""),
        ([4.0, 2.0, 1.0, 1.0, 1.0], -0.15, False, ""),
        # Bent, but the other way: it is flat at first only.
        ([1.0, 1.0, 1.0, 1.4, 2.0], -0.15, False, ""),
    ],
)
def test_verdicts(values: list[float], low: float, passed: bool, note: str) -> None:
    found = row(values, low)
    assert (found.passed, found.note) == (passed, note)
    assert (found.excess > 0) != passed


def test_a_wrong_multiplier_has_no_curve_to_hide_in() -> None:
    """Whatever curve levels off, width^+-1/2 on top of it fails."""
    widths = np.array([1, 2, 4, 8, 16])
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(3000):
        values = np.exp(rng.normal(0, 0.35, 5))
        if not row(list(values)).passed:
            continue
        kept += 1
        for power in (-0.5, 0.5):
            assert not row(list(values * widths**power)).passed
    assert kept > 300


def test_seeds_are_averaged_by_their_logarithm_and_causes_come_before_effects() -> None:
    assert _row("a", "update", [1, 2, 4], [[1.0, 4.0]] * 3, -1, 1).values == pytest.approx((2.0, 2.0, 2.0))
    effect, cause = row([1, 2, 4, 8, 16]), _row("b", "spectral", [1, 2, 4], [[1.0], [2.0], [4.0]], -0.15, 0.15)
    worse = _row("c", "spectral", [1, 2, 4], [[1.0], [3.0], [9.0]], -0.15, 0.15)
    found = CoordinateCheck((1, 2, 4), 1, (0,), (effect, cause, worse))
    assert found.failures() == [worse, cause, effect]
    assert json.loads(json.dumps(found.to_dict()))["worst"] == worse.diagnosis


@pytest.mark.parametrize(
    ("widths", "options", "message"),
    [
        ([16, 32], {}, "three different positive widths"),
        ([16, 16, 32], {}, "three different positive widths"),
        ([0, 16, 32], {}, "three different positive widths"),
        ([16, 32, 64], {"steps": 0}, "at least one step and one seed"),
        ([16, 32, 64], {"seeds": []}, "at least one step and one seed"),
        ([16, 32, 64], {"least": {"outputs": -1}}, "least names outputs; quantities are initial, spectral, .*"),
    ],
)
def test_too_little_to_go_by(widths: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coordinate_check(lambda width: (nn.Linear(1, 1), None), lambda model: None, widths, **options)  # type: ignore


def linear_build(lr: float) -> Callable[[int], tuple[nn.Module, Optimizer]]:
    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
        return model, torch.optim.SGD(model.parameters(), lr=lr)

    return build


def test_what_cannot_be_judged_is_said() -> None:
    x = torch.ones(4, 3)

    def loss(model: nn.Module) -> Tensor:
        return mse_loss(model(x), torch.ones(4, 1))

    with pytest.raises(ValueError, match="moved no parameter"):
        coordinate_check(linear_build(0.0), loss, [2, 4, 8], seeds=[0])

    def deeper(width: int) -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(width)), nn.Linear(3, 1))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="different layers"):
        coordinate_check(deeper, loss, [2, 4, 8], seeds=[0])

    found = coordinate_check(linear_build(1e30), loss, [2, 4, 8], seeds=[0], steps=3)
    assert [row.diagnosis for row in found.failures() if row.quantity == "spectral"] == [
        f"{layer}: ||dW||: diverged at width 2; lower the learning rate" for layer in "01"
    ]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["passed"] is False


def test_empty_parameters_have_no_rows() -> None:
    x = torch.ones(4, 3)

    def build(width: int) -> tuple[nn.Module, Optimizer]:
        model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
        model.mark = nn.Parameter(torch.empty(0))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    found = coordinate_check(build, lambda model: model(x).square().mean(), [2, 4, 8], seeds=[0])
    assert {row.layer for row in found.rows} == {"0", "0.bias", "1", "1.bias", OUTPUT}


def test_every_module_trains_in_its_own_mode() -> None:
    """A norm whose averages are to stay, beside one that goes on averaging."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    models = []

    def build(width: int) -> tuple[nn.Module, Optimizer]:
        norms = nn.BatchNorm1d(width).eval(), nn.BatchNorm1d(width)
        models.append(nn.Sequential(nn.Linear(3, width), *norms, nn.Linear(width, 1)))
        return models[-1], torch.optim.SGD(models[-1].parameters(), lr=0.1)

    coordinate_check(build, lambda model: model(x).square().mean(), [2, 4, 8], seeds=[0], steps=3)
    assert [[int(norm.num_batches_tracked) for norm in model[1:3]] for model in models] == [[0, 3]] * 3


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_models_may_be_in_half_precision(half: torch.dtype) -> None:
    x, y = torch.ones(4, 3), torch.ones(4, 1)

    def found(dtype: torch.dtype) -> CoordinateCheck:
        def build(width: int) -> tuple[nn.Module, Optimizer]:
            model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1)).to(dtype)
            return model, torch.optim.SGD(model.parameters(), lr=0.01)

        return coordinate_check(build, lambda model: mse_loss(model(x.to(dtype)), y.to(dtype)), [4, 16, 64], seeds=[0])

    for quantity in ("spectral", "entries"):
        assert slopes(found(half), quantity) == pytest.approx(slopes(found(torch.float32), quantity), abs=0.15)


def test_some_may_fall_further() -> None:
    x = torch.ones(4, 3)
    found = coordinate_check(
        linear_build(0.1), lambda model: model(x).square().mean(), [2, 4, 8], seeds=[0], least={"update": -9.0}
    )
    bounds = {row.quantity: (row.low, row.high) for row in found.rows if row.layer == "0"}
    assert bounds["update"] == (-9.0, 0.15)
    assert bounds["spectral"] == bounds["change"] == (-0.15, 0.15)


def command(output: Path, *more: str) -> list[str]:
    widths = "--widths=32,64,128,256" if not any("widths" in flag for flag in more) else ""
    return ["--config", CONFIG, "--output", str(output), *([widths] if widths else []), "--seeds", "0", *more]


@pytest.fixture(autouse=True)
def _quiet_cli() -> None:
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
class TestCommand:
    def test_end_to_end(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        output = tmp_path / "out"
        arms = ("--optimizers", "adamw,dopr-adamw+update_every=2")
        assert main(command(output, *arms, "--standard")) == 0
        said = capsys.readouterr().out
        assert "dopr-adamw+update_every=2, mup: exponents over widths 32 to 256" in " ".join(said.split())
        assert "network.readout: initial ||W|| grows like width^0." in said  # the standard parametrisation's
        assert said.rstrip().endswith("dopr-adamw+update_every=2: passed")
        results = json.loads((output / "results.json").read_text())
        assert results["passed"] is True
        assert results["network"] == {str(width): {"width": width} for width in (32, 64, 128, 256)}
        assert [(c["optimizer"], c["parametrization"], c["passed"]) for c in results["checks"]] == [
            ("adamw", "mup", True),
            ("adamw", "standard", False),
            ("dopr-adamw+update_every=2", "mup", True),
            ("dopr-adamw+update_every=2", "standard", False),
        ]
        plain, _, dopr, _ = ({(r["layer"], r["quantity"]): r["slope"] for r in c["rows"]} for c in results["checks"])
        assert plain.keys() == dopr.keys()
        assert plain != dopr  # the preconditioner was there
        assert ("network.blocks.0.fc1", "spectral") in plain
        with Image.open(output / "coord_check.png") as picture:
            assert picture.format == "PNG"
            assert picture.width > 500

    def test_what_fails_is_said_and_is_the_exit_status(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(command(tmp_path / "strict", "--optimizers=adamw", "--tolerance=1e-4")) == 1
        assert "adamw: FAILED: network." in capsys.readouterr().out
        assert json.loads((tmp_path / "strict" / "results.json").read_text())["passed"] is False
        assert main(command(tmp_path / "hot", "--optimizers=adamw", "--model.optimizer.lr=1e30")) == 1
        assert "diverged at width 32; lower the learning rate" in capsys.readouterr().out
        assert (tmp_path / "hot" / "coord_check.png").exists()

    def test_diffusion_is_checked_too(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        # Widths are tried on the meta device, and its schedule looks at numbers as it is made.
        diffusion = "--model.algorithm=dopr_lightning.policies.algorithms.Diffusion"
        assert main(command(tmp_path / "out", "--optimizers=dopr-adamw", diffusion)) == 0
        assert capsys.readouterr().out.rstrip().endswith("dopr-adamw: passed")

    def test_a_base_may_have_bounds_of_its_own(self, tmp_path: Path) -> None:
        main(command(tmp_path / "out", "--optimizers=soap,adamw", "--steps=2"))
        soap, adamw = (
            {row["low"] for row in found["rows"] if row["quantity"] == "spectral"}
            for found in json.loads((tmp_path / "out" / "results.json").read_text())["checks"]
        )
        assert (soap, adamw) == ({EXCEPTIONS["soap"]["spectral"]}, {-TOLERANCE})

    def test_widths_by_default_surround_the_configured_one(self, tmp_path: Path) -> None:
        arguments = ["--config", CONFIG, "--output", str(tmp_path), "--seeds=0", "--steps=1", "--optimizers=adamw"]
        main(arguments)
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["settings"]["widths"] == [2, 4, 8, 16, 32]
        # The same again replaces it; another check does not.
        main(arguments)
        assert json.loads((tmp_path / "results.json").read_text()) == results
        with pytest.raises(UserError, match=r"another check.*choose another --output"):
            main([*arguments, "--windows=4"])
        assert json.loads((tmp_path / "results.json").read_text()) == results

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--widths=16,32",), "an exponent needs three or more"),
            (("--widths=16,32,x",), "give numbers separated by commas"),
            (("--widths=0,32,64",), "each at least 1"),
            (("--steps=0",), "--steps and --windows must be at least 1"),
            (("--windows=0",), "--steps and --windows must be at least 1"),
            (("--windows=1000",), "batch_size=1000 is more than the 55 training windows"),
            (("--seeds=-1",), "a seed is a number"),
            (("--tolerance=0",), "--tolerance must be positive"),
            (("--damping=nan",), "--damping must be positive"),
            (("--optimizers=adam",), "unknown optimizer 'adam'"),
            (("--optimizers=dopr-adamw+solver=none",), "solver"),
            (("--data.batch_size=3",), "use --windows"),
            (("--model.mup.base={'width': 4}",), "use --widths"),
            (("--config=dopr.yaml",), "the configuration brings DoPr"),
            (("--model.network.width=12", "--widths="), "give numbers separated by commas"),
            (("--no-such-option=1",), "no-such-option"),
        ],
    )
    def test_mistakes_are_named(self, more: tuple[str, ...], message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            main(command(tmp_path / "out", *more))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("network", "widths", "message"),
        [
            ("ActionTransformer", "8,10,16", "--widths 10: .*not a multiple of heads 4"),
            ("ConditionalUnet1d", "8,12,16", "--widths 12: .*must be positive multiples of groups 8"),
            ("ConditionalUnet1d", "32,64,72", "--widths 72: condition_dim would be 100 x 72 / 128"),
        ],
    )
    def test_widths_that_a_network_cannot_have(self, network: str, widths: str, message: str, tmp_path: Path) -> None:
        chosen = [f"--model.network=dopr_lightning.policies.networks.{network}", f"--widths={widths}"]
        if network == "ConditionalUnet1d":
            chosen.append("--model.network.condition_dim=100" if "100" in message else "--model.network.groups=8")
        with pytest.raises(UserError, match=message):
            main(["--config", CONFIG, "--output", str(tmp_path / "out"), *chosen])
        assert not (tmp_path / "out").exists()
