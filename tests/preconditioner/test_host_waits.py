"""What would make a host wait for its GPU, counted on the CPU: reading a number, or fetching a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner import exact, inverse


class Reads(TorchDispatchMode):
    """Counts operators that hand a number to the host."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], Counter[str]]:
    """Counts them in what it is given to do."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def call(*args: Any) -> Any:
            found[name] += 1
            return original(*args)

        return call

    for name in ("cpu", "tolist"):
        monkeypatch.setattr(Tensor, name, counted(name))
    for module in (exact, inverse):  # these look at all blocks on a CPU only
        monkeypatch.setattr(module, "known_good", lambda good: False)

    def count(function: Callable[[], None]) -> Counter[str]:
        found.clear()
        with Reads(found):
            function()
        return Counter(found)

    return count


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_host_waits_on_refreshes_only_and_as_often_for_seven_layers_as_for_two(
    solver: str, ema: float, waits: Callable[[Callable[[], None]], Counter[str]]
) -> None:
    counts: dict[int, list[Counter[str]]] = {}
    for layers in (2, 7):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(layers)))
        ap = ActivationPreconditioner(model, solver=solver, ema=ema, update_every=4)
        x = torch.randn(100, 64)

        def train(model: nn.Module = model, x: Tensor = x, ap: ActivationPreconditioner = ap) -> None:
            model(x).square().mean().backward()
            ap.step()

        for _ in range(4):
            train()
        counts[layers] = [waits(train) for _ in range(4)]
    for refresh, *between in counts.values():
        assert sum(refresh.values()) > 0
        assert between == [Counter()] * 3
    assert counts[2] == counts[7]
