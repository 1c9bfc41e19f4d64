"""Our form (no multiplier in the forward pass) is mup's, in function space: same outputs at every step."""

from __future__ import annotations

import copy

import mup
import pytest
import torch
from torch import Tensor, nn

from dopr_lightning.mup import MupSpec
from dopr_lightning.optim import make_optimizer

BASE, WIDTH = 8, 32


def ours(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3)
    )


def theirs(width: int) -> nn.Sequential:
    return ours(width)[:-1].append(mup.MuReadout(width, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 5, generator=generator).double(), torch.randn(64, 3, generator=generator).double()


def trajectory(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 12) -> Tensor:
    inputs, targets = data()
    outputs = []
    for _ in range(steps):
        outputs.append(model(inputs))
        optimizer.zero_grad()
        (outputs[-1] - targets).square().mean().backward()
        optimizer.step()
    return torch.stack(outputs).detach()


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_training_is_mups(base: str) -> None:
    torch.manual_seed(0)
    mine = ours(WIDTH).double()
    reference = theirs(WIDTH).double()
    reference.load_state_dict(mine.state_dict())
    mup.set_base_shapes(reference, theirs(BASE), delta=theirs(2 * BASE))
    spec = MupSpec.from_factory(ours, width=BASE)
    spec.initialize(mine)
    # MuReadout keeps its weight at base size and divides by the growth; ours is that quotient.
    with torch.no_grad():
        quotient = reference[-1].weight / (WIDTH / BASE)
        torch.testing.assert_close(mine[-1].weight, quotient)

    if base == "adamw":
        expected = mup.MuAdamW(reference.parameters(), lr=0.02, eps=1e-30)
        for group in expected.param_groups:
            group["weight_decay"] = 0.0
        optimizer = make_optimizer(mine, base, lr=0.02, mup=spec, eps=1e-30)
    else:
        expected = mup.MuSGD(reference.parameters(), lr=0.1, momentum=0.9)
        optimizer = make_optimizer(mine, base, lr=0.1, mup=spec)
    torch.testing.assert_close(trajectory(mine, optimizer), trajectory(reference, expected), rtol=1e-9, atol=1e-9)


def test_at_the_base_width_muP_is_standard_parametrisation() -> None:  # noqa: N802
    torch.manual_seed(0)
    plain = ours(BASE).double()
    mine = copy.deepcopy(plain)
    spec = MupSpec.from_factory(ours, width=BASE)
    spec.initialize(mine)
    runs = [
        trajectory(model, make_optimizer(model, "muon", lr=0.02, weight_decay=0.1, mup=how))
        for model, how in ((plain, None), (mine, spec))
    ]
    assert torch.equal(*runs)


def test_weight_decay_shrinks_as_in_mup() -> None:
    """``independent`` is what mup does: MuAdamW multiplies the decay by what it divides the rate by."""
    torch.manual_seed(0)
    mine, reference = ours(WIDTH), theirs(WIDTH)
    mup.set_base_shapes(reference, theirs(BASE), delta=theirs(2 * BASE))
    optimizer = make_optimizer(mine, "adamw", lr=0.02, weight_decay=0.3, mup=MupSpec.from_factory(ours, width=BASE))
    expected = mup.MuAdamW(reference.parameters(), lr=0.02, weight_decay=0.3)

    def shrinkage(opt: torch.optim.Optimizer, weight: nn.Parameter) -> float:
        return next(g["lr"] * g["weight_decay"] for g in opt.param_groups if any(p is weight for p in g["params"]))

    assert shrinkage(optimizer, mine[2].weight) == pytest.approx(shrinkage(expected, reference[2].weight))
    assert shrinkage(optimizer, mine[-1].weight) == pytest.approx(0.02 * 0.3)
