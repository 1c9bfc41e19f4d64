"""Inputs that are counted together equal those that are counted one by one; here on the CPU, where nothing is held."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner import joining
from dopr_lightning.preconditioner.layers import ConvCovariance, Layer, registry
from dopr_lightning.preconditioner.layers.linear import Linear, LinearMap
from dopr_lightning.preconditioner.stack import Stack

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"solver": "exact", "ema": 0.5},
    "woodbury": {"solver": "exact", "max_rows": 6},
    "lowrank": {"solver": "lowrank", "max_error": 1e-3},
    "patches": {"solver": "exact", "conv": "patch", "ema": 0.5},
    "pieces": {"solver": "exact", "max_dim": 9, "ema": 0.5},
    "biases": {"solver": "exact", "bias": True, "ema": 0.5},
    "few rows": {"solver": "lowrank", "max_rows": 7},
}


class Net(nn.Module):
    """Layers of several kinds that see inputs of one shape, and of several; one of them is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(7, 16)
        self.convolutions = nn.ModuleList([nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 1)])
        self.grouped = nn.ModuleList([nn.Conv1d(16, 16, 3, padding=1, groups=2) for _ in range(2)])
        self.up = nn.ConvTranspose1d(16, 16, 2, stride=2)
        self.down = nn.Conv1d(16, 16, 3, stride=2, padding=1)
        self.hidden = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.pooled = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens).mT
        for conv in (*self.convolutions, *self.grouped, self.up, self.down):
            h = torch.tanh(conv(h)) + (h if conv is not self.up and conv is not self.down else 0)
        h = h.mT
        for layer in (*self.hidden, self.hidden[1]):
            h = h + torch.tanh(layer(h))
        h = (h + self.attention(h, h, h, need_weights=False)[0]).mean(1)
        for layer in self.pooled:
            h = torch.tanh(layer(h))
        return h


def tokens(seed: int) -> Tensor:
    return torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of :meth:`Stack.add` serves."""
    served: list[int] = []
    add = Stack.add

    def count(self: Stack, layers: Sequence[Layer], x: Tensor, mask: Tensor | None) -> None:
        served.append(len(layers))
        add(self, layers, x, mask)

    monkeypatch.setattr(Stack, "add", count)
    return served


def pair(**options: Any) -> list[tuple[Net, ActivationPreconditioner]]:
    models = [Net().double() for _ in range(2)]
    return [(model, ActivationPreconditioner(model, **{"update_every": 3} | options)) for model in models]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(
    runs: Sequence[tuple[Net, ActivationPreconditioner]], monkeypatch: pytest.MonkeyPatch, backward: Any
) -> None:
    """Seven steps, the first model's inputs held and the second's not."""
    for step in range(7):
        found = []
        for devices, (model, ap) in zip((("cpu",), ()), runs, strict=True):
            monkeypatch.setattr(joining, "DEVICES", devices)
            model.zero_grad()
            backward(model, ap, step)
            ap.step()
            found.append(gradients(model))
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-13)
    rows = [{row.parameter: row.rows for row in ap.summary()} for _, ap in runs]
    assert rows[0] == rows[1]


def plainly(model: Net, ap: ActivationPreconditioner, step: int) -> None:
    model(tokens(step)).square().sum().backward()


@pytest.mark.parametrize("name", OPTIONS)
def test_held_inputs_give_the_same_gradients(name: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    compare(pair(**OPTIONS[name]), monkeypatch, plainly)
    assert max(calls) == 3  # the layer that is used twice ends one run and begins another


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_and_accumulation(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.net, self.last = net, nn.Linear(16, 16).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.net.tokens(x)
            for layer in self.net.hidden:
                h = checkpoint(layer, h, use_reentrant=reentrant)
            return self.last(h)

    torch.manual_seed(0)
    first = Checkpointed(Net().double())
    torch.manual_seed(0)
    models = [first, Checkpointed(Net().double())]
    runs: Any = [(m, ActivationPreconditioner(m, solver="exact", update_every=2, ema=0.5)) for m in models]

    def backward(model: nn.Module, ap: ActivationPreconditioner, step: int) -> None:
        for part in range(2):
            model(tokens(2 * step + part)).square().sum().backward()

    compare(runs, monkeypatch, backward)


def test_masked_calls_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(model: Net, ap: ActivationPreconditioner, step: int) -> None:
        x = tokens(step)
        with ap.mask(x > 1) if step % 2 == 0 else nullcontext():
            model(x).square().sum().backward()

    compare(pair(solver="exact", update_every=1, ema=0.5), monkeypatch, backward)


def test_no_more_is_held_than_is_said_and_nothing_after_the_backward(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "MOST", 8 * 700)
    runs = pair(solver="exact", ema=0.5)
    ap = runs[0][1]
    most = 0
    hold = joining.Joining.hold

    def watch(self: joining.Joining, layer: Layer, x: Tensor) -> bool:
        nonlocal most
        taken = hold(self, layer, x)
        most = max(most, sum(one.x.untyped_storage().nbytes() for one in self._held))
        return taken

    def backward(model: Net, ap: ActivationPreconditioner, step: int) -> None:
        plainly(model, ap, step)
        assert not ap._joining._held

    monkeypatch.setattr(joining.Joining, "hold", watch)
    compare(runs, monkeypatch, backward)
    assert 8 * 320 < most <= 8 * 700
    assert max(calls) == 2
    assert ap._joining._bytes == 0


def test_large_inputs_are_counted_at_once(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "LARGEST", 10)
    compare(pair(solver="exact", ema=0.5), monkeypatch, plainly)
    assert max(calls) == 1


def test_a_backward_that_fails_leaves_nothing_that_the_next_one_would_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(gradient: Tensor) -> Tensor:
        raise ValueError("no gradient")

    def backward(model: Net, ap: ActivationPreconditioner, step: int) -> None:
        if step == 3:
            handle = model.tokens.weight.register_hook(fail)
            with pytest.raises(ValueError, match="no gradient"):
                plainly(model, ap, step)
            handle.remove()
            model.zero_grad()
            ap.discard()
        plainly(model, ap, step)

    compare(pair(solver="exact", ema=0.5), monkeypatch, backward)


def test_what_was_removed_holds_no_input_and_no_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoPr keeps it for its summary, also after a backward that failed."""
    monkeypatch.setattr(joining, "DEVICES", ("cpu",))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ap = ActivationPreconditioner(model)
    h = model[0](torch.randn(3, 4))
    h.register_hook(lambda gradient: gradient[:, 0])
    with pytest.raises(RuntimeError, match="has changed the size"):
        model[1](h).sum().backward()
    assert ap._joining._held
    ap._replay._recordings[()] = None
    ap.remove()
    assert not ap._joining._held
    assert not ap._replay._recordings
    assert len(ap.summary()) == 4


def test_an_input_that_is_overwritten_before_the_end_is_an_error_that_names_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joining, "DEVICES", ("cpu",))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ActivationPreconditioner(model)
    x = torch.randn(3, 4)
    h = model[0](x)

    def overwrite(gradient: Tensor) -> None:
        h.detach().mul_(2)

    h.register_hook(overwrite)
    with pytest.raises(RuntimeError, match=r"^1\.weight: its input was overwritten before the backward"):
        model[1](h).sum().backward()


def test_data_and_buffers_are_counted_at_once_for_a_recomputation_may_fill_them_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("features", torch.zeros(32, 8))
            self.time = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.hidden = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

        def segment(self, h: Tensor, index: int) -> Tensor:
            self.features.copy_(torch.sin(torch.arange(8.0) * (index + 1)).expand(32, 8))
            return torch.tanh(self.hidden[index](h) + self.time[index](self.features))

        def forward(self, h: Tensor) -> Tensor:
            for index in range(3):
                h = checkpoint(self.segment, h, index, use_reentrant=False)
            return h

    def backward(model: nn.Module, ap: ActivationPreconditioner, step: int) -> None:
        model(torch.randn(32, 8, generator=torch.Generator().manual_seed(step)).double()).square().mean().backward()

    runs: Any = [
        (m, ActivationPreconditioner(m, solver="exact", ema=0.5)) for m in (Timed().double(), Timed().double())
    ]
    compare(runs, monkeypatch, backward)


@pytest.mark.parametrize("view", [False, True])
def test_parameters_are_counted_at_once_for_their_memory_may_be_freed(
    view: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 does so; here they are overwritten."""

    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(torch.randn(6, 8))
            self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            latents = self.latents.expand(2, 6, 8) if view else self.latents
            return self.query(latents) @ self.key(x).mT

    monkeypatch.setattr(joining, "DEVICES", ("cpu",))
    model = Latent()
    ap = ActivationPreconditioner(model)

    def overwrite(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.mul_(0)

    model.latents.register_post_accumulate_grad_hook(overwrite)
    model(torch.randn(2, 6, 8)).sum().backward()
    ap.step()


def test_a_small_view_keeps_no_large_activation_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x))[:, -1])

    monkeypatch.setattr(joining, "DEVICES", ("cpu",))
    monkeypatch.setattr(joining, "LARGEST", 4 * 8 * 100)
    model, kept = Last(), []
    ap = ActivationPreconditioner(model)
    model.body.weight.register_hook(lambda gradient: kept.append(len(ap._joining._held)))
    model(torch.randn(2, 100, 8)).sum().backward()
    model(torch.randn(2, 40, 8)).sum().backward()
    assert kept == [0, 1]


class Scaled(nn.Linear):
    """A linear map of its input times a number of its own, with a weight (inputs, outputs)."""

    def __init__(self, gain: float) -> None:
        super().__init__(8, 8, bias=False)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x @ self.weight


class ScaledMap(Linear):
    """Of the kind and shape of :class:`Linear`, and another rearrangement."""

    def vectors(self, x: Tensor) -> Tensor:
        gain = self.modules[0].gain
        assert isinstance(gain, float)
        return super().vectors(gain * x)

    def to_matrix(self, gradient: Tensor) -> Tensor:
        return gradient.T[None]

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0].T


class TransposedMap(LinearMap):
    """The same said by other methods."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Linear, *, conv: ConvCovariance, bias: bool) -> None:
        super().__init__(name, module, shape=(8, 8))
        self.features = self.dim = 8

    def vectors(self, x: Tensor) -> Tensor:
        gain = self.modules[0].gain
        assert isinstance(gain, float)
        return super().vectors(gain * x)

    def gradient(self) -> Tensor:
        return self.weight_gradient.T[None]

    def write(self, matrix: Tensor) -> None:
        self.weight_gradient.copy_(matrix[0].T)


class Ways:
    """A mixin."""

    modules: list[nn.Module]

    def vectors(self, x: Tensor) -> Tensor:
        gain = self.modules[0].gain
        assert isinstance(gain, float)
        return gain * x.reshape(1, -1, 8)

    def to_matrix(self, gradient: Tensor) -> Tensor:
        return gradient.T[None]

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix[0].T


class Mixed(Ways, Linear):
    """The same by inheritance."""


@pytest.mark.parametrize("layer_type", [ScaledMap, TransposedMap, Mixed])
def test_a_layer_type_that_rearranges_in_its_own_way_is_neither_counted_nor_rewritten_with_others(
    layer_type: type[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_LAYER_TYPES", dict(registry._LAYER_TYPES))
    registry.register_layer(Scaled)(layer_type)
    monkeypatch.setattr(joining, "DEVICES", ("cpu",))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), Scaled(1.0), Scaled(10.0), nn.Linear(8, 8), Scaled(0.1), nn.Linear(8, 8)
    ).double()
    inputs: dict[nn.Module, Tensor] = {}
    for module in model:
        module.register_forward_hook(lambda module, args, output: inputs.update({module: args[0].detach()}))
    ap = ActivationPreconditioner(model, damping=0.1, solver="exact", update_every=10)  # inverses, not factors
    model(torch.randn(64, 8).double()).square().mean().backward()
    before = {module: module.weight.grad.clone() for module in model}
    ap.step()
    for module in model:
        assert isinstance(module, nn.Linear)
        z = inputs[module] * getattr(module, "gain", 1.0)
        covariance = z.T @ z / len(z)
        damped = covariance + 0.1 * covariance.trace() * torch.eye(8, dtype=torch.double)
        gradient = before[module].T if isinstance(module, Scaled) else before[module]
        expected = torch.linalg.solve(damped, gradient, left=False)
        found = module.weight.grad.T if isinstance(module, Scaled) else module.weight.grad
        torch.testing.assert_close(found, expected)
