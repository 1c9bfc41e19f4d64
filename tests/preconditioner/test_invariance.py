"""Proposition 4.2: AP does not depend on the coordinates of a layer's input.

Under z -> T z, W -> W T^-1 (T affine, with the homogeneous coordinate) gradients become G T^T and covariances
T Sigma T^T, so M = G Sigma^-1 becomes M T^-1: it moves the weights exactly as the reparametrisation does. A base that
is linear in M (SGD, with momentum) keeps the whole trajectory. A base that acts on M's entries (AdamW) does not
commute with T^-1, so for DoPr-AdamW the proposition holds for what AdamW is fed, not for what it makes of it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dopr_lightning import ActivationPreconditioner

DIMS = (4, 6)  # inputs of the two layers


class Net(nn.Module):
    """y = W2 T2(tanh(W1 T1(x) + b1)) + b2, with fixed affine maps T."""

    def __init__(self, maps: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maps = maps
        self.layers = nn.ModuleList([nn.Linear(DIMS[0], DIMS[1]), nn.Linear(DIMS[1], 2)]).double()
        with torch.no_grad():  # the weights absorb the maps' inverses: the function is the same
            for layer, (matrix, shift) in zip(self.layers, maps, strict=True):
                layer.weight.copy_(layer.weight @ torch.linalg.inv(matrix))
                layer.bias.sub_(layer.weight @ shift)

    def forward(self, x: Tensor) -> Tensor:
        (a1, c1), (a2, c2) = self.maps
        first, second = self.layers
        return second(torch.tanh(first(x @ a1.T + c1)) @ a2.T + c2)


def problem(reparametrise: bool) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Inputs, targets, and the maps in front of the layers (identities unless ``reparametrise``)."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    x, target = draw(64, DIMS[0]), draw(64, 2)
    maps = [(torch.eye(d, dtype=torch.double) + 0.3 * draw(d, d), draw(d)) for d in DIMS]
    if not reparametrise:
        maps = [(torch.eye(d, dtype=torch.double), torch.zeros(d, dtype=torch.double)) for d in DIMS]
    return x, target, maps


def trajectory(reparametrise: bool, optimizer: Callable[..., torch.optim.Optimizer], dopr: bool, lr: float) -> Tensor:
    """The network's outputs on fixed inputs after each of 5 full-batch steps."""
    x, target, maps = problem(reparametrise)
    net = Net(maps)
    ap = ActivationPreconditioner(net, damping=1e-13, bias=True) if dopr else None
    optim = optimizer(net.parameters(), lr=lr)
    outputs = []
    for _ in range(5):
        loss = (net(x) - target).square().mean()
        optim.zero_grad()
        loss.backward()
        if ap is not None:
            ap.step()
        optim.step()
        outputs.append(net(x).detach())
    return torch.stack(outputs)


def deviation(optimizer: Callable[..., torch.optim.Optimizer], dopr: bool, lr: float) -> float:
    plain = trajectory(False, optimizer, dopr, lr)
    moved = trajectory(True, optimizer, dopr, lr)
    travelled = (plain[-1] - plain[0]).norm()
    return float((plain - moved).norm() / travelled)


def sgd(params: object, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adamw(params: object, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, eps=1e-30, weight_decay=0.0)


def test_dopr_sgd_is_invariant() -> None:
    assert deviation(sgd, dopr=True, lr=0.1) < 1e-6


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_the_base_optimizers_are_not(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    assert deviation(optimizer, dopr=False, lr=0.01) > 0.1


def test_an_elementwise_base_sees_covariant_matrices_but_does_not_commute_with_the_map() -> None:
    fed = []
    for reparametrise in (False, True):
        x, target, maps = problem(reparametrise)
        net = Net(maps)
        ap = ActivationPreconditioner(net, damping=1e-13, bias=True)
        (net(x) - target).square().mean().backward()
        ap.step()
        # M T, with T the affine map in homogeneous coordinates: the same whatever the coordinates were.
        for layer, (matrix, shift) in zip(net.layers, maps, strict=True):
            m = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            t = torch.eye(len(matrix) + 1, dtype=torch.double)
            t[:-1, :-1], t[:-1, -1] = matrix, shift
            fed.append(m @ t)
    for plain, moved in zip(fed[:2], fed[2:], strict=True):
        torch.testing.assert_close(plain, moved, rtol=1e-6, atol=1e-6)
    assert deviation(adamw, dopr=True, lr=0.01) > 0.1
