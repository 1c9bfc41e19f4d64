"""Exact, Woodbury and low-rank solvers: one method, so one result, each where it is cheapest."""

from __future__ import annotations

import copy
import logging
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner.exact import ExactStack
from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.lowrank import FIRST_RANK, WARM_UP, LowRankStack, begin_refresh
from dopr_lightning.preconditioner.stack import Stack
from dopr_lightning.preconditioner.woodbury import WoodburyStack

GAMMA = 0.01


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def linear(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))).double()


def decaying(seed: int, n: int, d: int, exponent: float = 1.5) -> Tensor:
    """Rows whose covariance has eigenvalues about i^-exponent, in a fixed random basis."""
    basis = torch.linalg.qr(draw(99, d, d))[0]
    scale = torch.arange(1, d + 1, dtype=torch.double) ** (-exponent / 2)
    return (draw(seed, n, d) * scale) @ basis.T


def covariance(rows: Tensor) -> Tensor:
    return rows.mT @ rows / len(rows)


def rewritten(gradient: Tensor, sigma: Tensor, gamma: float = GAMMA) -> Tensor:
    damping = gamma * sigma.trace() * torch.eye(len(sigma), dtype=sigma.dtype)
    return torch.linalg.solve(sigma + damping, gradient, left=False)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def step(model: nn.Sequential, ap: ActivationPreconditioner, *batches: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's gradient and its rewrite."""
    model.zero_grad()
    for x in batches:
        model(x).square().sum().backward()
    weight = model[0].weight
    gradient = weight.grad.clone()
    ap.step()
    return gradient, weight.grad.clone()


def solver(ap: ActivationPreconditioner) -> str | None:
    return ap.summary()[0].solver


def held(stack: Stack) -> int:
    """Bytes of all tensors that a stack holds, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif type(value).__module__.startswith("dopr_lightning.") and not isinstance(value, Layer):
            visit(vars(value))

    visit(vars(stack))
    return sum(storages.values())


# Exact


@pytest.mark.parametrize("update_every", [1, 20])
@pytest.mark.parametrize("outputs", [2, 200])
@pytest.mark.parametrize("kind", ["linear", "grouped", "together"])
def test_exact_is_the_closed_form_whatever_it_keeps(kind: str, outputs: int, update_every: int) -> None:
    """It keeps inverses where they are used often or on many rows, and else factors."""
    torch.manual_seed(0)
    x, d = draw(0, 90, 24), 12 if kind == "grouped" else 24
    if kind == "grouped":
        model: nn.Module = nn.Conv1d(24, outputs, 1, groups=2, bias=False).double()
    else:
        model = nn.ModuleList(
            nn.Linear(24, outputs, bias=False) for _ in range(2 if kind == "together" else 1)
        ).double()
    ap = ActivationPreconditioner(model, solver="exact", update_every=update_every)
    for now in range(2):
        model.zero_grad()
        for layer in model if isinstance(model, nn.ModuleList) else [model]:
            y = layer(x[..., None]) if kind == "grouped" else layer(x)
            y.square().sum().backward()
        before = [p.grad.clone() for p in model.parameters()]
        if now == 1:  # a poisoned refresh, or none: the last good solution serves
            poison = torch.full_like(x, torch.nan)
            (model(poison[..., None]) if kind == "grouped" else model[0](poison)).sum().backward()
            for p, gradient in zip(model.parameters(), before, strict=True):
                p.grad = gradient.clone()
        ap.step()
        for p, gradient in zip(model.parameters(), before, strict=True):
            sigma = covariance(x)
            pieces = [
                rewritten(gradient.view(outputs, d)[rows], sigma[part, part])
                for rows, part in (
                    [(slice(0, outputs // 2), slice(0, 12)), (slice(outputs // 2, None), slice(12, 24))]
                    if kind == "grouped"
                    else [(slice(None), slice(None))]
                )
            ]
            torch.testing.assert_close(p.grad.view(outputs, d), torch.cat(pieces), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("saved", "loaded"), [(1, 20), (20, 1)])
def test_a_resume_may_change_the_cadence(saved: int, loaded: int) -> None:
    """And with it what the exact solver keeps: the state's solution serves until the next refresh, then a new one."""
    model, x = linear(24, 3), draw(0, 90, 24)
    first = ActivationPreconditioner(model, solver="exact", update_every=saved)
    gradient, expected = step(model, first, x)
    first.remove()
    second = ActivationPreconditioner(model, solver="exact", update_every=loaded)
    second.load_state_dict(first.state_dict())
    while second.collecting:
        gradient, found = step(model, second, x)
        torch.testing.assert_close(found, rewritten(gradient, covariance(x)), rtol=1e-9, atol=1e-9)
        if loaded == 1:
            break
    else:
        model[0].weight.grad = gradient.clone()
        second.step()
        torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-9, atol=1e-9)


# Woodbury


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, "woodbury"), (19, "woodbury"), (20, "exact"), (21, "exact"), (200, "exact")]
)
def test_woodbury_serves_fewer_rows_than_half_the_dimension_and_is_exact(rows: int, expected: str) -> None:
    model, x = linear(40, 3), draw(0, rows, 40)
    ap = ActivationPreconditioner(model, solver="exact")
    gradient, found = step(model, ap, x)
    assert solver(ap) == expected
    torch.testing.assert_close(found, rewritten(gradient, covariance(x)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["grouped", "blocks", "bias"])
def test_woodbury_equals_exact_on_layers_of_several_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for forced in (False, True):
        torch.manual_seed(0)
        model = (nn.Conv1d(40, 6, 1, groups=2) if kind == "grouped" else nn.Linear(40, 6)).double()
        x = draw(0, 2, 40, 3) if kind == "grouped" else draw(0, 6, 40)
        if forced:
            monkeypatch.setattr(WoodburyStack, "too_many_rows", property(lambda self: True))
        ap = ActivationPreconditioner(
            model, solver="exact", damping=0.1, max_dim=17 if kind == "blocks" else None, bias=kind == "bias"
        )
        model(x).square().sum().backward()
        ap.step()
        assert solver(ap) == ("exact" if forced else "woodbury")
        results.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_woodbury_becomes_exact_when_a_later_window_has_more_rows() -> None:
    """In the middle of the window, after some of its micro-batches: none may be lost."""
    model = linear(40, 3)
    ap = ActivationPreconditioner(model, solver="exact")
    step(model, ap, draw(0, 5, 40))
    assert solver(ap) == "woodbury"
    parts = [draw(s, 9, 40) for s in (1, 2, 3)]
    gradient, found = step(model, ap, *parts)
    assert solver(ap) == "exact"
    torch.testing.assert_close(found, rewritten(gradient, covariance(torch.cat(parts))), rtol=1e-9, atol=1e-9)
    gradient, found = step(model, ap, few := draw(4, 5, 40))
    torch.testing.assert_close(found, rewritten(gradient, covariance(few)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-4, 1e-7, 1e-9])
def test_the_change_to_exact_survives_little_damping_in_float32(damping: float) -> None:
    """The inverse that it takes along is positive definite up to rounding only."""
    model = linear(40, 3).float()
    ap = ActivationPreconditioner(model, solver="exact", damping=damping)
    step(model, ap, 100 * draw(0, 19, 40).float() @ torch.diag(torch.logspace(0, -4, 40)))
    gradient, found = step(model, ap, x := draw(1, 400, 40).float())
    assert solver(ap) == "exact"
    assert error(found.double(), rewritten(gradient.double(), covariance(x.double()), damping)) < 1e-3


def test_an_inverse_outlives_the_change_of_its_solver() -> None:
    """A layer that is not used in the window that makes its neighbour exact keeps the inverse it had."""
    model = nn.ModuleDict({"a": nn.Linear(40, 3, bias=False), "b": nn.Linear(40, 3, bias=False)}).double()
    ap = ActivationPreconditioner(model, solver="exact", update_every=2)
    x = draw(0, 5, 40)
    (model["a"](x) + model["b"](x)).square().sum().backward()
    ap.step()
    ap.step()
    model.zero_grad()
    model["a"](draw(1, 60, 40)).square().sum().backward()
    ap.step()
    assert {row.solver for row in ap.summary()} == {"exact"}
    model["b"].weight.grad = draw(2, 3, 40)
    ap.step()
    torch.testing.assert_close(model["b"].weight.grad, rewritten(draw(2, 3, 40), covariance(x)), rtol=1e-9, atol=1e-9)


def test_woodbury_keeps_its_rows_when_the_input_buffer_is_refilled() -> None:
    model, buffer = linear(40, 3), torch.empty(6, 40, dtype=torch.double)
    ap = ActivationPreconditioner(model, solver="exact")
    for seed in (0, 1):
        buffer.copy_(draw(seed, 6, 40))
        model(buffer).square().sum().backward()
    buffer.zero_()
    gradient = model[0].weight.grad.clone()
    ap.step()
    assert solver(ap) == "woodbury"
    rows = torch.cat([draw(0, 6, 40), draw(1, 6, 40)])
    torch.testing.assert_close(model[0].weight.grad, rewritten(gradient, covariance(rows)), rtol=1e-9, atol=1e-9)


def test_woodbury_reports_the_spectrum_of_its_rows() -> None:
    model, x = linear(40, 3), draw(0, 4, 40)
    ap = ActivationPreconditioner(model, solver="exact")
    step(model, ap, x)
    (row,) = ap.summary()
    share = torch.linalg.eigvalsh(x @ x.T)
    share = share / share.sum()
    assert row.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()))
    assert row.condition_number == math.inf


def test_rows_summed_over_refreshes_are_no_case_for_woodbury() -> None:
    model = linear(40, 3)
    ap = ActivationPreconditioner(model, solver="exact", ema=0.5)
    step(model, ap, draw(0, 4, 40))
    assert solver(ap) == "exact"


# Low rank


def test_lowrank_keeps_to_its_certificate_on_a_decaying_spectrum() -> None:
    model = linear(300, 8)
    ap = ActivationPreconditioner(model, solver="lowrank", max_error=0.05)
    for seed in range(8):
        x = decaying(seed, 600, 300)
        gradient, found = step(model, ap, x)
        if seed < WARM_UP:
            continue
        (row,) = ap.summary()
        actual = error(found, rewritten(gradient, covariance(x)))
        assert row.solver == "lowrank"
        assert row.error is not None
        assert 1e-4 < actual <= 1.3 * row.error
        assert row.rank is not None
        assert 0 < row.rank < 300 // 4
        assert row.error <= 0.05
    # Not by doing little: the plain gradient, rescaled as well as can be, is far from M.
    rescaled = gradient * (gradient * found).sum() / gradient.square().sum()
    assert error(rescaled, found) > 10 * actual


def test_lowrank_pieces_keep_to_the_certificate_of_the_whole_layer() -> None:
    """Pieces of 1, 1/30 and 1/100000 of the inputs' size: of a small one no direction exceeds the damping."""
    n, d = 900, 200
    x = torch.zeros(n, 3 * d, dtype=torch.double)
    for index, factor in enumerate((1.0, 1 / 30, 1e-5)):
        x[index::3, index * d : (index + 1) * d] = factor * decaying(index, n // 3, d)
    model = linear(3 * d, 30)
    ap = ActivationPreconditioner(model, solver="lowrank", damping=GAMMA, max_dim=d, max_error=0.1)
    for _ in range(6):
        step(model, ap, x)
    model.zero_grad()
    (model(x) * draw(7, n, 30)).sum().backward()
    gradient = model[0].weight.grad.clone()
    ap.step()
    (stack,) = ap._stacks
    assert isinstance(stack, LowRankStack)
    assert 0 < stack.errors[0] <= 0.1
    used = stack._fields.coefficients.count_nonzero(-1).tolist()
    assert used[0] > used[1] >= used[2] == 0
    assert error(model[0].weight.grad, rewritten(gradient, covariance(x))) < 0.1


def test_layers_of_one_size_use_the_directions_that_each_needs() -> None:
    """A steep spectrum and a flat one in one stack; what the summary says of either is what the exact spectrum says."""
    model = nn.ModuleDict({name: nn.Linear(200, 3, bias=False) for name in ("steep", "flat")}).double()
    ap = ActivationPreconditioner(model, solver="lowrank", max_error=0.2)
    x = {"steep": decaying(1, 600, 200, 2.0), "flat": decaying(2, 600, 200, 1.2)}
    for _ in range(6):
        model.zero_grad()
        for name, layer in model.items():
            layer(x[name]).square().sum().backward()
        before = {name: layer.weight.grad.clone() for name, layer in model.items()}
        ap.step()
    assert len(ap._stacks) == 1
    rows = {row.parameter.removesuffix(".weight"): row for row in ap.summary()}
    for name, row in rows.items():
        sigma = covariance(x[name])
        actual = error(model[name].weight.grad, rewritten(before[name], sigma))
        assert 1e-4 < actual <= 1.3 * row.error <= 1.3 * 0.2, name
        values = torch.linalg.eigvalsh(sigma)
        assert row.effective_rank == pytest.approx(
            float(torch.special.entr(values / values.sum()).sum().exp()), rel=0.1
        )
        tracked = ap._stacks[0].tracked
        assert row.condition_number == pytest.approx(float(values[-1] / values[:-tracked].mean()), rel=0.2)
    assert rows["steep"].rank < rows["flat"].rank


def test_a_bad_batch_is_left_out_of_the_lowrank_average() -> None:
    model, ema, found = linear(200, 3), 0.7, []
    ap = ActivationPreconditioner(model, solver="lowrank", ema=ema, max_error=0.01)
    gradient = draw(1, 3, 200)
    batches = [(1 + seed) * decaying(seed, 300, 200, 3.0) for seed in range(5)]
    for now in range(6):
        bad = now == 3
        x = batches[now - (now > 3)].clone()
        if bad:
            x[7, 3] = math.nan
        model(x).nan_to_num().sum().backward()
        model[0].weight.grad = gradient.clone()
        ap.step()
        found.append(model[0].weight.grad.clone())
    assert torch.equal(found[3], found[2])
    assert ap.summary()[0].failures == 1
    weights = [ema ** (4 - s) for s in range(5)]
    mean = sum(w * covariance(x) for w, x in zip(weights, batches, strict=True)) / sum(weights)
    assert error(found[-1], rewritten(gradient, mean)) < 0.02
    without_the_third = [w * (s != 2) for s, w in enumerate(weights)]
    other = sum(w * covariance(x) for w, x in zip(without_the_third, batches, strict=True)) / sum(without_the_third)
    assert error(found[-1], rewritten(gradient, other)) > 0.05


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize(("solver", "square"), [("lowrank", False), ("exact", True)])
def test_lowrank_forms_no_matrix_as_large_as_the_covariance(solver: str, square: bool) -> None:
    d = 1024
    model = linear(d, 2)
    ap = ActivationPreconditioner(model, solver=solver, ema=0.5)
    with Largest() as largest:
        for seed in range(2):
            step(model, ap, decaying(seed, 64, 64)[:, torch.arange(d) % 64])
    assert (largest.entries >= d * d) is square


def test_lowrank_is_exact_where_it_tracks_the_whole_space() -> None:
    model = linear(20, 3)
    ap = ActivationPreconditioner(model, solver="lowrank", max_error=1e-9)
    for seed in range(4):
        gradient, found = step(model, ap, x := draw(seed, 50, 20))
    assert solver(ap) == "lowrank"
    torch.testing.assert_close(found, rewritten(gradient, covariance(x)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
def test_what_can_be_recorded_reads_only_what_refreshes_change_in_place(solver: str) -> None:
    """Nothing on the host: ranks and scales are made useless, addresses are not asked for again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)).double()
    ap = ActivationPreconditioner(model, solver=solver, ema=0.5, max_error=0.1, update_every=5)
    addresses = []
    for step in range(12):
        model.zero_grad()
        x = draw(step, 40, 64) * torch.arange(1, 65) ** -1.0
        model(x).square().sum().backward()
        before = [layer.weight.grad.clone() for layer in model]
        ap.step()
        expected = [layer.weight.grad.clone() for layer in model]
        for layer, gradient in zip(model, before, strict=True):
            layer.weight.grad.copy_(gradient)
        for stack in ap._stacks:
            spoiled = {"ranks": [1], "_scales": [float("nan")]} if solver == "lowrank" else {}
            saved = {name: getattr(stack, name) for name in spoiled}
            vars(stack).update(spoiled)
            stack.apply(fixed=True)
            vars(stack).update(saved)
        for layer, gradient in zip(model, expected, strict=True):
            torch.testing.assert_close(layer.weight.grad, gradient)
        addresses.append([stack.addresses for stack in ap._stacks])
    if solver == "lowrank":
        assert addresses[-2] == addresses[-1]
    assert all(address is not None for step in addresses for address in step)


def test_one_failed_block_of_a_layer_does_not_cost_the_others_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(400, 6, 1, groups=2, bias=False)).double()
    ap = ActivationPreconditioner(model, solver="lowrank", damping=GAMMA)
    steep, flat = decaying(1, 300, 200, 4.0), decaying(2, 300, 200, 0.7)
    both = torch.cat([steep, steep], dim=1).mT[None]
    for x in (both, both, torch.cat([torch.full_like(steep, math.nan), flat], dim=1).mT[None]):
        model.zero_grad()
        model(x).nan_to_num().sum().backward()
        gradient = torch.randn_like(model[0].weight)
        model[0].weight.grad = gradient.clone()
        ap.step()
    (stack,) = ap._stacks
    assert isinstance(stack, LowRankStack)
    assert [record.failures for record in stack.records] == [1]
    blocks = gradient[..., 0].unflatten(0, (2, 3)) @ stack.inverse()
    assert error(model[0].weight.grad[..., 0], blocks.flatten(0, 1)) < 1e-12


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_stacks_renewed_together_are_renewed_as_each_alone(ema: float) -> None:
    sizes = {"a": (300, 400), "b": (200, 300), "broken": (250, 100), "unused": (220, 100), "narrow": (8, 100)}
    x = {name: decaying(1, rows, dim).float() for name, (dim, rows) in sizes.items()}
    model = nn.ModuleDict({name: nn.Linear(dim, 3, bias=False) for name, (dim, _) in sizes.items()})
    ap = ActivationPreconditioner(model, solver="lowrank", ema=ema)
    for time in range(3):
        used = [name for name in sizes if name != "unused" or time == 1]
        for name in used:
            rows = x[name] * (1 + time)
            if name == "broken" and time == 2:
                rows = rows.index_fill(0, torch.tensor([5]), math.nan)
            model[name](rows).nan_to_num().sum().backward()
        for stack in ap._stacks:
            stack.close()
        others = copy.deepcopy(ap._stacks)
        together = begin_refresh(ap._stacks)()  # type: ignore[arg-type]
        for stack, other in zip(ap._stacks, others, strict=True):
            outcome = together[stack]
            torch.testing.assert_close(outcome, other.refresh(slice(0, 1)), equal_nan=True, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(stack.inverse(), other.inverse(), rtol=1e-4, atol=1e-6)
            name = stack.layers[0].name.split(".")[0]
            assert bool(outcome[2]) is (name in used and not (name == "broken" and time == 2))
            stack.accept(outcome.tolist(), time)


def test_lowrank_averages_over_refreshes_with_bias_correction() -> None:
    """Few rows each, so that what a batch sees differs from what their average sees."""
    model, ema, d = linear(40, 3), 0.8, 40
    ap = ActivationPreconditioner(model, solver="lowrank", ema=ema, max_error=1e-9)
    for now in range(5):
        gradient, found = step(model, ap, draw(now, 15, d))
        weights = [ema ** (now - s) for s in range(now + 1)]
        mean = sum(w * covariance(draw(s, 15, d)) for s, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(found, rewritten(gradient, mean), rtol=1e-3, atol=1e-4)
        if now:
            assert error(found, rewritten(gradient, covariance(draw(now, 15, d)))) > 0.1


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_lowrank_memory_grows_with_the_width_not_with_its_square(ema: float) -> None:
    used = {}
    for d in (256, 1024):
        model = linear(d, 2)
        ap = ActivationPreconditioner(model, solver="lowrank", ema=ema, max_error=0.5)
        for seed in range(4):
            step(model, ap, decaying(seed, 64, 64)[:, torch.arange(d) % 64])
        (stack,) = ap._stacks
        used[d] = held(stack)
        assert used[d] <= 5 * d * FIRST_RANK * 8
        assert used[d] > d * FIRST_RANK * 8  # what the count finds at all
    assert used[1024] < 5 * used[256]
    wide = linear(1024, 2)
    exact = ActivationPreconditioner(wide, solver="exact", ema=ema)
    step(wide, exact, draw(0, 600, 1024))
    assert held(exact._stacks[0]) > 5 * used[1024]


def test_lowrank_resumes_bit_for_bit_while_its_rank_grows() -> None:
    def start() -> tuple[nn.Sequential, ActivationPreconditioner]:
        model = linear(320, 6)
        return model, ActivationPreconditioner(model, solver="lowrank", max_error=0.005, update_every=2)

    def x(now: int) -> Tensor:
        return decaying(now, 200, 320, 1.0)

    model, ap = start()
    states, expected, tracked = [], [], []
    for now in range(9):
        expected.append(step(model, ap, x(now))[1])
        states.append(copy.deepcopy(ap.state_dict()))
        tracked.append(ap._stacks[0].tracked)
    assert set(tracked) == {FIRST_RANK, FIRST_RANK + 16, 80}  # 80 is a quarter of the width
    for first, state in enumerate(states[:-1], start=1):
        model, ap = start()
        ap.load_state_dict(state)
        for now in range(first, 9):
            assert torch.equal(step(model, ap, x(now))[1], expected[now]), (first, now)
        assert ap._stacks[0].tracked == 80


def test_lowrank_tracks_fewer_directions_when_they_are_not_needed() -> None:
    model = linear(300, 4)
    ap = ActivationPreconditioner(model, solver="lowrank", max_error=0.3)
    (stack,) = ap._stacks
    assert isinstance(stack, LowRankStack)
    low = draw(50, 4, 300)
    for seed in range(6):
        x = draw(seed, 100, 4) @ low  # four directions
        gradient, found = step(model, ap, x)
    assert stack.tracked < FIRST_RANK
    assert error(found, rewritten(gradient, covariance(x))) < 0.3


@pytest.mark.parametrize("poisoned", [True, False])
def test_a_failed_or_unused_refresh_takes_no_direction_away(poisoned: bool) -> None:
    """The last good inverse is in use, whatever the last refresh brought."""
    model = linear(320, 4)
    ap = ActivationPreconditioner(model, solver="lowrank", max_error=0.005, update_every=2)
    for seed in range(7):
        step(model, ap, decaying(seed, 400, 320, 1.0))
    gradient, results = draw(7, 4, 320), []
    for _ in range(3):
        model[0].weight.grad = gradient.clone()
        assert not ap.collecting
        ap.step()
        results.append(model[0].weight.grad.clone())
        if poisoned:
            model(torch.full((4, 320), torch.nan, dtype=torch.double)).sum().backward()
        model.zero_grad()
        ap.step()
    assert error(results[0], rewritten(gradient, covariance(decaying(6, 400, 320, 1.0)))) < 0.2
    assert all(torch.equal(results[0], later) for later in results[1:])


# Auto


def test_auto_takes_lowrank_for_wide_layers_only() -> None:
    model = linear(1024, 32, 8)
    assert [row.solver for row in ActivationPreconditioner(model).summary()] == ["lowrank", "woodbury"]


def test_auto_falls_back_to_exact_where_the_tolerance_asks_for_too_much(caplog: pytest.LogCaptureFixture) -> None:
    d, model = 256, linear(256, 4)
    ap = ActivationPreconditioner(model, solver="auto", max_error=1e-3)
    found_by = []
    with caplog.at_level(logging.INFO, "dopr_lightning"):
        for seed in range(7):
            x = draw(seed, 300, d)  # a flat spectrum, the worst there is for it
            gradient, found = step(model, ap, x)
            found_by.append(solver(ap))
    assert found_by[0] == "lowrank"
    assert found_by[-1] == "exact"
    torch.testing.assert_close(found, rewritten(gradient, covariance(x)), rtol=1e-9, atol=1e-9)
    assert ap.summary()[0].rows == 300
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith("0.weight: 64 of 256 directions leave a certified error of")

    resumed = ActivationPreconditioner(other := linear(d, 4), solver="auto", max_error=1e-3)
    resumed.load_state_dict(copy.deepcopy(ap.state_dict()))
    assert solver(resumed) == "exact"
    other.load_state_dict(model.state_dict())
    assert torch.equal(step(other, resumed, draw(9, 300, d))[1], step(model, ap, draw(9, 300, d))[1])


def test_the_fallback_carries_the_inverse_over() -> None:
    """Between refreshes the exact solver goes on with what the low-rank one knew."""
    d, model = 256, linear(256, 4)
    ap = ActivationPreconditioner(model, solver="auto", max_error=1e-3, update_every=4)
    gradient = draw(0, 4, d)
    while solver(ap) != "exact":
        step(model, ap, draw(1, 300, d))
        model[0].weight.grad = gradient.clone()
        last = ap._stacks[0]
        if isinstance(last, LowRankStack):
            inverse = last.inverse()[0].clone()
    step_without_refresh = not ap.collecting
    ap.step()
    assert step_without_refresh
    assert isinstance(ap._stacks[0], ExactStack)
    # The last low-rank inverse was renewed in the step that switched; it is near the one before, both of one batch.
    assert error(model[0].weight.grad, gradient @ inverse) < 0.3
    assert error(model[0].weight.grad, gradient) > 0.3


def test_the_fallback_carries_the_average_over_refreshes() -> None:
    d, ema, model = 256, 0.9, linear(256, 4)
    ap = ActivationPreconditioner(model, solver="auto", max_error=1e-3, ema=ema)
    mean, weight, switched = torch.zeros(d, d, dtype=torch.double), 0.0, False
    for seed in range(6):
        x = draw(seed, 40, d)  # one refresh alone has 40 directions, their average many more
        gradient, found = step(model, ap, x)
        mean, weight = ema * mean + (1 - ema) * covariance(x), ema * weight + 1 - ema
        was, switched = switched, solver(ap) == "exact"
        if was:
            assert error(found, rewritten(gradient, mean / weight)) < 0.3
            assert error(found, rewritten(gradient, covariance(x))) > 0.5
    assert was


def test_lowrank_warns_once_where_the_tolerance_cannot_be_met(caplog: pytest.LogCaptureFixture) -> None:
    model = linear(256, 4)
    ap = ActivationPreconditioner(model, solver="lowrank", max_error=1e-3)
    with caplog.at_level(logging.INFO, "dopr_lightning"):
        for seed in range(8):
            step(model, ap, draw(seed, 300, 256))
    assert solver(ap) == "lowrank"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0.weight: 64 of 256 directions" in record.getMessage()
    assert "raise max_error or damping, or take solver='auto'" in record.getMessage()


# State


@pytest.mark.parametrize("rows", [(6, 6, 6, 6), (6, 6, 30, 30), (6, 30, 6, 6), (30, 6, 6, 30)])
@pytest.mark.parametrize("update_every", [1, 2])
def test_resume_is_bit_identical_across_woodbury_and_exact(rows: tuple[int, ...], update_every: int) -> None:
    def run(now: range, state: dict | None) -> tuple[list[Tensor], dict, str | None]:
        model = linear(40, 20, 3)
        ap = ActivationPreconditioner(model, solver="exact", update_every=update_every)
        if state is not None:
            ap.load_state_dict(state)
        found = [step(model, ap, draw(s, rows[s], 40))[1] for s in now]
        return found, copy.deepcopy(ap.state_dict()), solver(ap)

    whole, _, last = run(range(4), None)
    for cut in (1, 2, 3):
        first, state, _ = run(range(cut), None)
        second, _, also = run(range(cut, 4), state)
        assert also == last
        for a, b in zip(whole, first + second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [4, 60])
def test_state_of_another_width_is_refused(rows: int) -> None:
    """Whether the state holds factors or inverses."""
    wide = linear(64, 3)
    ap = ActivationPreconditioner(wide, solver="exact")
    step(wide, ap, draw(0, rows, 64))
    narrow = linear(32, 3)
    with pytest.raises(ValueError, match=r"^0\.weight: the preconditioner's saved (factor|inverse) is of shape"):
        ActivationPreconditioner(narrow, solver="exact").load_state_dict(ap.state_dict())


def test_state_of_another_solver_is_refused_unless_auto() -> None:
    model = linear(256, 3)
    ap = ActivationPreconditioner(model, solver="lowrank")
    step(model, ap, draw(0, 300, 256))
    ap.remove()
    with pytest.raises(ValueError, match=r"^0\.weight: .* saved by solver='lowrank', this one has solver='exact'"):
        ActivationPreconditioner(model, solver="exact").load_state_dict(ap.state_dict())
    exact = ActivationPreconditioner(model, solver="exact")
    step(model, exact, draw(0, 300, 256))
    exact.remove()
    with pytest.raises(ValueError, match="saved by solver='exact', this one has solver='lowrank'"):
        ActivationPreconditioner(model, solver="lowrank").load_state_dict(exact.state_dict())
    auto = ActivationPreconditioner(model, solver="auto")
    auto.load_state_dict(exact.state_dict())
    assert solver(auto) == "exact"


@pytest.mark.parametrize("rows", [4, 60])
def test_a_state_without_averages_is_refused_where_there_are_to_be_some(rows: int) -> None:
    """Whether the state holds factors or inverses; to take it would switch averaging off without a word."""
    model = linear(40, 3)
    ap = ActivationPreconditioner(model, solver="exact")
    step(model, ap, draw(0, rows, 40))
    ap.remove()
    with pytest.raises(ValueError, match=r"^0\.weight: .* ema "):
        ActivationPreconditioner(model, solver="exact", ema=0.9).load_state_dict(ap.state_dict())
