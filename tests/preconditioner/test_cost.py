"""Costs: against counts by hand, FLOPs counted by torch, and what the solvers really hold and send."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.bench.plan import held_bytes, observed
from dopr_lightning.preconditioner.cost import (
    Cost,
    LayerSize,
    Method,
    layer_cost,
    low_rank_is_cheaper,
)
from dopr_lightning.preconditioner.packed import PackedSymmetric, packed_size

# Two blocks of gradients 3 x 4, five rows. Nothing narrower than 64 is packed: a covariance takes 16 numbers.
SIZE = LayerSize("w", blocks=2, m=3, dim=4, rows=5)


@pytest.mark.parametrize(
    ("method", "cost"),
    [
        (
            Method("exact"),
            Cost(
                statistics=2 * (2 * 5 * 16),
                solve=2 * 4**3,
                apply=2 * (2 * 3 * 4 * 4),
                held=2 * (4 * (16 + 16) + 8),
                summed=2 * (4 * 16 + 8),
                gathered=2 * (4 * 16 + 8),
            ),
        ),
        (
            # A Cholesky factor in place of the inverse: a third of the work to make, as much to use.
            Method("exact", factor=True),
            Cost(
                statistics=2 * (2 * 5 * 16),
                solve=2 * 4**3 / 3,
                apply=2 * (2 * 3 * 4 * 4),
                held=2 * (4 * (16 + 16) + 8),
                summed=2 * (4 * 16 + 8),
                gathered=2 * (4 * 16 + 8),
            ),
        ),
        (
            # basis, its derived rows, image, probe: 4 x 2 each; 2 eigenvalues, 2 coefficients, 2 traces, 2 floors,
            # an error, a weight
            Method("lowrank", tracked=2, rank=1),
            Cost(
                statistics=2 * (2 * 5 * 4 * 2 * 2),
                solve=2 * (8 * 4 * 2 * 2),
                apply=2 * (2 * 3 * 4 * 1 * 2),
                held=2 * (4 * (4 * 8 + 10) + 8),
                summed=2 * (4 * (8 + 1) + 8),
                gathered=0,
            ),
        ),
        (
            Method("diagonal"),
            Cost(statistics=2 * 5, solve=2 * 8, apply=2 * 12, held=2 * (4 * 8 + 8), summed=2 * (16 + 8), gathered=0),
        ),
    ],
)
def test_costs_are_those_counted_by_hand(method: Method, cost: Cost) -> None:
    assert layer_cost(SIZE, method) == cost


@pytest.mark.parametrize("dim", [1, 63, 64, 65, 512, 1000, 2048])
def test_packed_size_is_that_of_the_packed_matrices(dim: int) -> None:
    packed = PackedSymmetric(1, dim, dtype=torch.float32, device=torch.device("meta"))
    assert packed_size(dim) == packed.flat.numel() == sum(entries.numel() for *_, entries in packed._panels)
    assert packed_size(dim) >= dim * (dim + 1) / 2


def test_an_unknown_solver_has_no_cost() -> None:
    with pytest.raises(ValueError, match="shampoo"):
        layer_cost(SIZE, Method("shampoo"))


def product(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **_: object) -> int:
    """FLOPs of an update in place by a product, which torch's counter passes over."""
    return 2 * math.prod(a) * b[-1]


def substitution(factor: tuple[int, ...], b: tuple[int, ...], **_: object) -> int:
    """FLOPs of one triangular solve, forward or backward."""
    return math.prod(b) * factor[-1]


def counter() -> FlopCounterMode:
    aten = torch.ops.aten
    extra = {aten.addmm_: product, aten.baddbmm_: product, aten.linalg_solve_triangular: substitution}
    return FlopCounterMode(display=False, custom_mapping=extra)


def train(solver: str, dim: int, rows: int, steps: int = 5) -> tuple[ActivationPreconditioner, nn.Module]:
    """Decaying spectra, which the low-rank solver finds easy; returned before the step that is counted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(dim, dim, bias=False), nn.Tanh(), nn.Linear(dim, 7, bias=False))
    ap = ActivationPreconditioner(model, solver=solver, max_error=0.5)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(rows, dim) / torch.arange(1, dim + 1)).square().mean().backward()
        ap.step()
    return ap, model


CASES = [("exact", 192, 400, "exact"), ("exact", 192, 40, "woodbury"), ("lowrank", 256, 100, "lowrank")]


@pytest.mark.parametrize(("solver", "dim", "rows", "kind"), CASES)
def test_apply_makes_the_flops_it_is_said_to(solver: str, dim: int, rows: int, kind: str) -> None:
    ap, _ = train(solver, dim, rows)
    planned = observed(ap)
    assert {layer.method.solver for layer in planned} == {kind}
    assert {layer.size.m for layer in planned} == {dim, 7}
    with torch.no_grad(), counter() as flops:
        for stack in ap._stacks:
            stack.apply()
    assert flops.get_total_flops() == sum(layer.cost.apply for layer in planned)


@pytest.mark.parametrize(("solver", "dim", "rows", "kind"), CASES)
def test_statistics_make_the_flops_they_are_said_to(solver: str, dim: int, rows: int, kind: str) -> None:
    ap, _ = train(solver, dim, rows)
    planned = observed(ap)
    with torch.no_grad(), counter() as flops:
        for stack in ap._stacks:
            for layer in stack.layers:
                stack.add([layer], torch.randn(rows, dim), None)
    assert flops.get_total_flops() == sum(layer.cost.statistics for layer in planned)


@pytest.mark.parametrize(("solver", "dim", "rows", "kind"), CASES)
def test_memory_is_what_the_solver_holds(solver: str, dim: int, rows: int, kind: str) -> None:
    ap, _ = train(solver, dim, rows)
    predicted = sum(layer.cost.held for layer in observed(ap))
    # What is not counted: empty tensors and scalars, and the odd bookkeeping vector.
    assert held_bytes(ap) == pytest.approx(predicted, rel=0.01)


@pytest.mark.parametrize(("solver", "dim", "rows", "kind"), CASES)
def test_bytes_between_ranks_are_those_of_the_sums(solver: str, dim: int, rows: int, kind: str) -> None:
    ap, _ = train(solver, dim, rows)
    costs = [layer.cost for layer in observed(ap)]
    assert sum(cost.summed for cost in costs) == sum(s.sums.nbytes + s.counts.nbytes for s in ap._stacks)
    flag = 8  # whether the inverse is good, a float64
    gathered = sum(s.shared.nbytes + flag * s.blocks for s in ap._stacks if s.shared is not None)
    assert sum(cost.gathered for cost in costs) == gathered


def test_the_low_rank_solver_is_for_wide_layers() -> None:
    assert not low_rank_is_cheaper(64, 48, update_every=10)
    assert low_rank_is_cheaper(2048, 48, update_every=10)
    assert low_rank_is_cheaper(2048, 48, update_every=1)
