"""The whole way, from forward to ``step``, against a closed form written with the layers' rows, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from explicit import HEADS, E, ExplicitAttention, patches
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Solve = Callable[[Tensor, Tensor], Tensor]
Gradients = dict[str, Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


class Case(NamedTuple):
    """A module, what it is called with, and M of the weights it covers from the plain gradients."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    expected: Callable[[Gradients, Solve], Gradients]


def embedding(max_norm: float | None = None) -> Case:
    tokens = torch.tensor([[0, 1, 1], [4, 4, 3]])
    one_hot = F.one_hot(tokens.flatten(), 6).double()
    module = nn.Embedding(6, 3, max_norm=max_norm, sparse=True).double()
    return Case(module, (tokens,), lambda before, solve: {"weight": solve(before["weight"].T, one_hot).T})


def linear(wrap: Callable[[nn.Module], nn.Module], name: str) -> Case:
    x = draw(30, 5)
    return Case(wrap(nn.Linear(5, 4).double()), (x,), lambda before, solve: {name: solve(before[name], x)})


def convolution(module: nn.modules.conv._ConvNd, *size: int) -> Case:
    x = draw(3, 4, *size)

    def expected(before: Gradients, solve: Solve) -> Gradients:
        gradient, rows = before["weight"], x.movedim(1, -1).reshape(-1, 4).chunk(module.groups, dim=1)
        whole = []
        for g, z in zip(gradient.chunk(module.groups), rows, strict=True):
            if module.transposed:
                whole.append(solve(g.flatten(1).T, z).T)
            else:
                whole.append(torch.stack([solve(tap, z) for tap in g.flatten(2).unbind(-1)], -1))
        return {"weight": torch.cat(whole).view_as(gradient)}

    return Case(module.double(), (x,), expected)


def patched(module: nn.modules.conv._ConvNd, *size: int) -> Case:
    x = draw(3, 4, *size)

    def expected(before: Gradients, solve: Solve) -> Gradients:
        blocks = zip(before["weight"].chunk(module.groups), patches(module, x).chunk(module.groups, dim=1), strict=True)
        return {"weight": torch.cat([solve(g.flatten(1), z).view_as(g) for g, z in blocks])}

    return Case(module.double(), (x,), expected)


def attention(*inputs: Tensor, **options: int) -> Case:
    """Its four Linear layers are fed what :class:`ExplicitAttention`'s are."""
    module = nn.MultiheadAttention(E, HEADS, batch_first=True, **options).double()
    for p in module.parameters():
        nn.init.normal_(p)
    explicit = ExplicitAttention(module)
    explicit(*inputs)
    *projected, mixed = (x.detach().flatten(0, 1) for x in (*inputs, explicit.mixed))

    def expected(before: Gradients, solve: Solve) -> Gradients:
        output = {"out_proj.weight": solve(before["out_proj.weight"], mixed)}
        if module.in_proj_weight is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return output | {name: solve(before[name], z) for name, z in zip(names, projected, strict=True)}
        thirds = zip(before["in_proj_weight"].chunk(3), projected, strict=True)
        return output | {"in_proj_weight": torch.cat([solve(g, z) for g, z in thirds])}

    return Case(module, inputs, expected)


CONVOLUTIONS = {
    "Conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), groups=2), 7, 6),
    "Conv3d": lambda: (nn.Conv3d(4, 6, (1, 3, 2), (1, 2, 1), (0, 1, 1), groups=2), 4, 5, 3),
}
CASES: dict[str, Callable[[], Case]] = {
    "sparse-embedding": embedding,
    "sparse-embedding-max-norm": lambda: embedding(max_norm=0.5),
    "weight-norm": lambda: linear(parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral-norm": lambda: linear(parametrizations.spectral_norm, "parametrizations.weight.original"),
    "ConvTranspose1d": lambda: convolution(nn.ConvTranspose1d(4, 6, 4, 2, 1, groups=2), 9),
    "ConvTranspose2d": lambda: convolution(nn.ConvTranspose2d(4, 6, 3, (2, 1), 1, groups=2), 7, 6),
    "Conv2d-channel": lambda: convolution(*CONVOLUTIONS["Conv2d"]()),
    "Conv3d-channel": lambda: convolution(*CONVOLUTIONS["Conv3d"]()),
    "Conv2d-patch": lambda: patched(*CONVOLUTIONS["Conv2d"]()),
    "Conv3d-patch": lambda: patched(*CONVOLUTIONS["Conv3d"]()),
    "self-attention": lambda: attention(*[draw(5, 3, E)] * 3),
    "cross-attention": lambda: attention(draw(5, 3, E), draw(5, 4, E), draw(5, 4, E)),
    "cross-attention-kdim-vdim": lambda: attention(draw(5, 3, E), draw(5, 4, 4), draw(5, 4, 5), kdim=4, vdim=5),
}


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_closed_form(case: str, solver: str, attach, backward, damped_solve) -> None:
    torch.manual_seed(0)
    module, inputs, expected = CASES[case]()
    plain = copy.deepcopy(module)
    ap = attach(module, conv="patch" if case.endswith("patch") else "channel", solver=solver, max_error=1e-9)
    for model in (plain, module):
        y = model(*inputs)
        backward(y[0] if isinstance(y, tuple) else y)
    before = gradients(plain)
    m = expected(before, damped_solve)
    ap.step()
    assert {row.parameter.partition("[")[0] for row in ap.summary() if row.covered} == m.keys()
    torch.testing.assert_close(gradients(module), before | m, rtol=1e-6, atol=1e-8)
    assert [p.grad.is_sparse for p in module.parameters()] == [p.grad.is_sparse for p in plain.parameters()]


class Adapted(nn.Module):
    """A Linear layer as PEFT adapts it: the base is frozen, the factors A and B are Linear layers by adapter's name."""

    def __init__(self, base: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


def test_lora_preconditions_its_factors_and_the_frozen_base_costs_nothing(attach, backward, damped_solve) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": Adapted(nn.Linear(5, 4))}).double()
    x = draw(7, 6, 5)
    ap = attach(model, bias=True)
    backward(model["fc"](x))
    before = gradients(model)
    ap.step()
    names = "fc.lora_A.default.weight", "fc.lora_B.default.weight"
    rows = x.flatten(0, 1), model["fc"].lora_A["default"](x).detach().flatten(0, 1)
    expected = {name: damped_solve(before[name], z) for name, z in zip(names, rows, strict=True)}
    torch.testing.assert_close(gradients(model), expected)
    assert ap.state_dict()["layers"].keys() == expected.keys()
    assert not model["fc"].base_layer._forward_hooks
    reasons = {row.parameter: row.reason for row in ap.summary() if not row.covered}
    assert reasons.keys() == {"fc.base_layer.weight", "fc.base_layer.bias"}
    assert "frozen" in reasons["fc.base_layer.weight"]


@pytest.mark.parametrize(
    ("solver", "update_every"), [("exact", 1), ("exact", 50), ("lowrank", 1)], ids=["factor", "inverse", "lowrank"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_everything_leaves_statistics_and_m_in_float32(
    solver: str, update_every: int, dtype: torch.dtype, attach, damped_solve
) -> None:
    """Sums of these squares leave float16's range, and bfloat16 cannot count these rows."""
    torch.manual_seed(0)
    n = 20_003
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    x = (300 * torch.randn(n, 12) * 0.7 ** torch.arange(12)).to(dtype)
    ap = attach(model, solver=solver, update_every=update_every, max_error=1e-6)
    with torch.autocast("cpu", dtype):
        h = model[:2](x)
        (1e-2 * model[2](h).float().square().mean()).backward()
        before = gradients(model)
        ap.step()
    assert h.dtype == dtype
    for name, rows in {"0.weight": x, "2.weight": h.detach()}.items():
        expected = damped_solve(before[name].double(), rows.double())
        found = model.get_parameter(name).grad.double()
        assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert {row.rows for row in ap.summary() if row.covered} == {n}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", ["linear", "conv", "attention"])
def test_under_autocast_a_residual_may_be_added_in_place_and_the_rows_are_those_of_the_cast_input(
    layer: str, compiled: bool, attach, damped_solve
) -> None:
    """As without DoPr: torch keeps its cast of the input. Of these inputs little is left in bfloat16."""
    torch.manual_seed(0)
    module = {
        "linear": nn.Linear(6, 6),
        "conv": nn.Conv1d(6, 6, 1),
        "attention": nn.MultiheadAttention(6, 2, batch_first=True),
    }[layer]
    x = 4 + 0.05 * torch.randn(20, 7, 6)
    ap = attach(module, solver="exact")

    def residual(h: Tensor) -> Tensor:
        if layer == "attention":
            h += module(h, h, h, need_weights=False)[0]
        elif layer == "conv":
            h += module(h.mT).mT
        else:
            h += module(h)
        return h.square().mean()

    run = torch.compile(residual, backend="aot_eager", fullgraph=True) if compiled else residual
    with torch.autocast("cpu", torch.bfloat16):
        run(x.clone()).backward()
    weight = next(module.parameters())
    before = weight.grad.detach().clone()
    ap.step()
    for dtype, is_it in ((torch.bfloat16, True), (torch.float32, False)):
        expected = damped_solve(before.flatten(1).double(), x.to(dtype).double().flatten(0, 1))
        error = (weight.grad.flatten(1).double() - expected).norm() / expected.norm()
        assert bool(error < 1e-5) is is_it
