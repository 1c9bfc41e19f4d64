"""Recorded rewrites equal launched ones: as CUDA graphs where there is a GPU, elsewhere as operators made again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner import replay

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"solver": "exact", "ema": 0.5},
    "lowrank": {"solver": "lowrank", "max_error": 0.05},
}


class SimulatedGraph(TorchDispatchMode):
    """Like a CUDA graph, it makes the same operators on the same addresses again, whatever the host has become."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for func, args, kwargs, output in self.calls:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)  # else a view, or changed in place


@contextmanager
def simulated_recording(graph: SimulatedGraph, **options: Any) -> Iterator[None]:
    with graph:
        yield


@pytest.fixture(params=["simulated", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        return "cuda"
    monkeypatch.setattr(replay, "_recordable", lambda stack: stack.addresses is not None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", simulated_recording)
    return "cpu"


class Net(nn.Module):
    """Layers of several sizes and kinds, the last of which may go unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(8, 64, 3, padding=1)
        self.mixing = nn.Sequential(*(nn.Conv1d(64, 64, 3, padding=1, groups=g) for g in (1, 1, 2, 2)))
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.hidden = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3)))
        self.sometimes = nn.Linear(64, 64)

    def forward(self, x: Tensor, sometimes: bool) -> Tensor:
        h = torch.tanh(self.mixing(torch.tanh(self.conv(x)))).mT
        h = self.hidden(h + self.attention(h, h, h, need_weights=False)[0])
        return self.sometimes(h) if sometimes else h


def batch(step: int, device: str) -> Tensor:
    x = torch.randn(6, 8, 12, generator=torch.Generator().manual_seed(step)) * torch.arange(1, 9)[:, None] ** -0.5
    return x.double().to(device)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module, ap: ActivationPreconditioner, step: int, device: str) -> None:
    model.zero_grad()
    model(batch(step, device), not 8 <= step < 14).square().mean().backward()
    ap.step()


@pytest.mark.parametrize("name", OPTIONS)
def test_recorded_rewrites_follow_refreshes_new_ranks_and_missing_gradients(device: str, name: str) -> None:
    model, reference = (Net().double().to(device) for _ in range(2))
    options = {"update_every": 4} | OPTIONS[name]
    ap, launching = (ActivationPreconditioner(m, **options) for m in (model, reference))
    launching._replay._failed = True
    recordings = []
    for step in range(24):
        run(model, ap, step, device)
        run(reference, launching, step, device)
        for (key, found), expected in zip(gradients(model).items(), gradients(reference).values(), strict=True):
            assert float((found - expected).norm()) <= 1e-9 * float(expected.norm()), (step, key)
        recordings.append(sum(recording is not None for recording in ap._replay._recordings.values()))
    assert recordings[0] == 0
    assert max(recordings) >= 2  # with and without the last layer
    assert not launching._replay._recordings


def test_what_takes_turns_is_recorded_as_soon_as_it_is_asked_for_twice_in_a_row(device: str) -> None:
    model = Net().double().to(device)
    ap = ActivationPreconditioner(model, solver="exact", update_every=100)
    for step in range(12):
        model.zero_grad()
        model(batch(step, device), step % 3 > 0).square().mean().backward()  # without the last layer, with it, with it
        ap.step()
    assert sum(recording is not None for recording in ap._replay._recordings.values()) == 2


def test_large_gradients_are_launched_one_by_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LARGEST", 1000)
    model = Net().double().to(device)
    ap = ActivationPreconditioner(model, update_every=4, **OPTIONS["exact"])
    for step in range(6):
        run(model, ap, step, device)
    assert set(ap._replay._recordings.values()) == {None}


def test_solutions_that_every_refresh_makes_anew_are_not_recorded(device: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4)).to(device)  # few outputs: factors are kept
    ap = ActivationPreconditioner(model, solver="exact")
    for step in range(4):
        model.zero_grad()
        model(torch.randn(128, 64, generator=torch.Generator().manual_seed(step)).to(device)).sum().backward()
        ap.step()
    assert {stack.addresses for stack in ap._stacks if stack.dim == 64} == {None}


def test_where_recording_fails_the_rewrites_go_on_and_it_is_said_once(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def refuse(graph: Any, **options: Any) -> Iterator[None]:
        raise RuntimeError("operation not permitted")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    model, reference = (Net().double().to(device) for _ in range(2))
    ap, launching = (ActivationPreconditioner(m, update_every=4, **OPTIONS["lowrank"]) for m in (model, reference))
    launching._replay._failed = True
    with caplog.at_level(logging.WARNING):
        for step in range(8):
            run(model, ap, step, device)
            run(reference, launching, step, device)
    assert sum("cannot be recorded: operation not permitted" in record.message for record in caplog.records) == 1
    found, expected = gradients(model), gradients(reference)
    assert all(torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-7) for key in expected)
