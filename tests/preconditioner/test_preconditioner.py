"""When rows are counted, when inverses are renewed, what is kept when something fails."""

import contextlib
import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from same import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner import preconditioner


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


def weight_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def batch(seed: int, n: int = 16, d: int = 5) -> Tensor:
    return torch.randn(n, d, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def preconditioned(gradient: Tensor, covariance: Tensor, gamma: float, scale: str = "trace") -> Tensor:
    d = len(covariance)
    damping = gamma * covariance.trace() / (1 if scale == "trace" else d)
    return gradient @ torch.linalg.inv(covariance + damping * torch.eye(d, dtype=covariance.dtype))


def covariance(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


@pytest.mark.parametrize("scale", ["trace", "mean"])
def test_damping_scale(scale: str) -> None:
    model, x = mlp(5, 3), batch(0)
    ap = ActivationPreconditioner(model, damping=0.2, damping_scale=scale)
    backward(model, x)
    before = weight_gradients(model)[0]
    ap.step()
    torch.testing.assert_close(weight_gradients(model)[0], preconditioned(before, covariance(x), 0.2, scale))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD])
def test_large_damping_gives_the_base_optimizers_step(optimizer: type[torch.optim.Optimizer]) -> None:
    gamma, x = 1e9, batch(0)
    steps = []
    for dopr in (False, True):
        model = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
        nn.init.constant_(model[0].weight, 0.3)
        options = {"eps": 1e-30} if optimizer is torch.optim.AdamW else {}
        # M -> G / (gamma tr Sigma): SGD, which is linear in the gradient, needs that factor in its rate.
        scale = gamma * float(covariance(x).trace()) if dopr and optimizer is torch.optim.SGD else 1.0
        optim = optimizer(model.parameters(), lr=0.01 * scale, weight_decay=0.0, **options)
        ap = ActivationPreconditioner(model, damping=gamma) if dopr else None
        before = model[0].weight.detach().clone()
        for _ in range(3):
            backward(model, x)
            if optimizer is torch.optim.Muon:  # its bf16 normalisation has an absolute eps of 1e-7
                model[0].weight.grad *= 1e6 * (gamma if dopr else 1)
            if ap is not None:
                ap.step()
            optim.step()
        steps.append(model[0].weight.detach() - before)
    tolerance = 2e-2 if optimizer is torch.optim.Muon else 1e-6
    torch.testing.assert_close(steps[1], steps[0], rtol=tolerance, atol=tolerance * float(steps[0].abs().max()))


def test_accumulated_micro_batches_of_unequal_size_count_every_row_once() -> None:
    model, x = mlp(5, 4, 3), batch(0, 12)
    ap = ActivationPreconditioner(model)
    backward(model, x)
    ap.step()
    whole = weight_gradients(model)
    model.zero_grad()
    for part in x.split([7, 4, 1]):
        model(part).square().sum().backward()
    ap.step()
    for a, b in zip(weight_gradients(model), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_rows_once(reentrant: bool) -> None:
    model, x = mlp(5, 4, 3), batch(0).requires_grad_()
    ap = ActivationPreconditioner(model)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    ap.step()
    assert {row.rows for row in ap.summary() if row.covered} == {16}


def test_forwards_without_a_backward_do_not_count() -> None:
    model, x = mlp(5, 4, 3), batch(0)
    ap = ActivationPreconditioner(model)
    backward(model, x)
    ap.step()
    expected = weight_gradients(model)
    with torch.no_grad():
        model(batch(1))
    model.eval()
    model(batch(2))
    model.train()
    model(batch(3))  # a graph that is never walked back
    backward(model, x)
    ap.step()
    for a, b in zip(weight_gradients(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast_does_not_reach_the_statistics() -> None:
    model = nn.Linear(4, 2)
    x = 300 + 100 * torch.randn(100_000, 4)  # z^2 summed overflows fp16, drowns in bf16
    ap = ActivationPreconditioner(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    ap.step()
    actual = ap._stacks[0].covariance(0)
    assert actual is not None
    torch.testing.assert_close(actual[0].double(), covariance(x.bfloat16().double()), rtol=1e-4, atol=0)


def test_update_every_keeps_the_inverse_between_refreshes() -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model, damping=0.1, update_every=3)
    for step in range(7):
        backward(model, batch(step))
        before = weight_gradients(model)[0]
        ap.step()
        expected = preconditioned(before, covariance(batch(step - step % 3)), 0.1)
        torch.testing.assert_close(weight_gradients(model)[0], expected)


def test_modules_have_hooks_only_where_rows_are_wanted() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.MultiheadAttention(4, 2)).double()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def backward_with(x: Tensor) -> None:
        h = model[0](x)
        model[1](h, h, h)[0].square().sum().backward()

    ap = ActivationPreconditioner(model, update_every=4, solver="exact")
    at_first, found = hooks(), []
    for step in range(9):
        found.append(hooks())
        backward_with(batch(step)[:, None])
        ap.step()
    assert at_first == 6  # one per map, and two around the functional one
    assert found == [6, 0, 0, 0, 6, 0, 0, 0, 6]
    ap.load_state_dict(ap.state_dict() | {"steps": 12})
    assert hooks() == 6
    ap.load_state_dict(ap.state_dict() | {"steps": 13})
    assert hooks() == 0
    for nonsense in (0, 2.5, "3"):
        with pytest.raises((TypeError, ValueError), match="update_every must be"):
            ap.update_every = nonsense  # type: ignore[assignment]
    assert (ap.update_every, hooks()) == (4, 0)
    ap.update_every = 13
    assert hooks() == 6
    ap.remove()
    assert hooks() == 0


def test_a_state_of_another_solver_that_refreshes_more_often_at_first_is_gone_on_from() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2)]
    saved, loaded = (
        ActivationPreconditioner(model, solver=solver, update_every=10)  # type: ignore[arg-type]
        for model, solver in zip(models, ("lowrank", "auto"), strict=True)
    )
    for step, (model, ap) in enumerate(zip(models, (saved, loaded), strict=True)):
        if step == 1:
            loaded.load_state_dict(saved.state_dict())
        model(torch.randn(64, 16)).square().mean().backward()
        ap.step()
    assert [row.rows for row in loaded.summary() if row.covered] == [64, 64]


def test_a_state_that_is_refused_changes_nothing() -> None:
    models = [nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)) for _ in range(2)]
    saved, other = (
        ActivationPreconditioner(model, solver=solver, update_every=4)  # type: ignore[arg-type]
        for model, solver in zip(models, ("lowrank", "exact"), strict=True)
    )
    for _ in range(4):
        models[0](torch.randn(64, 16)).sum().backward()
        saved.step()
    for _ in range(6):
        with contextlib.suppress(ValueError):
            other.load_state_dict(saved.state_dict())
        models[1](torch.randn(64, 16)).sum().backward()
        other.step()
    assert other.steps == 6


@pytest.mark.parametrize("options", [{"solver": "exact"}, {"solver": "exact", "ema": 0.5}, {"solver": "lowrank"}])
def test_a_state_may_be_loaded_in_inference_mode(options: dict[str, Any]) -> None:
    """What is saved there is of inference tensors itself."""
    model, other = (nn.Linear(16, 4) for _ in range(2))
    other.load_state_dict(model.state_dict())
    saved, loaded = (ActivationPreconditioner(m, **options) for m in (model, other))
    backward(model, batch(0, d=16).float())
    saved.step()
    with torch.inference_mode():
        loaded.load_state_dict(saved.state_dict())
    for seed in range(1, 3):
        for m, ap in (model, saved), (other, loaded):
            backward(m, batch(seed, d=16).float())
            ap.step()
        assert_same(weight_gradients(other), weight_gradients(model))


@pytest.mark.parametrize("solver", ["exact", "lowrank"])
def test_a_damping_that_overflows_is_a_failure_and_keeps_the_gradient(solver: Any) -> None:
    model = nn.Linear(8, 4)
    ap = ActivationPreconditioner(model, damping=1e4, solver=solver)
    model(torch.randn(16, 8) * 3e17).sum().backward()
    before = model.weight.grad.clone()
    ap.step()
    assert torch.equal(model.weight.grad, before)
    assert [row.failures for row in ap.summary() if row.covered] == [1]


def test_hooks_that_are_added_later_see_the_same_in_every_window() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    ap = ActivationPreconditioner(model, update_every=2, solver="exact")
    model[1].register_forward_hook(lambda module, args, output: {"out": output})
    for step in range(5):
        model(batch(step))["out"].square().sum().backward()
        ap.step()
    assert [row.rows for row in ap.summary() if row.covered] == [16, 16]


def test_ema_is_a_bias_corrected_mean() -> None:
    model, ema = mlp(5, 3), 0.8
    ap = ActivationPreconditioner(model, damping=0.1, ema=ema)
    for step in range(4):
        backward(model, batch(step))
        before = weight_gradients(model)[0]
        ap.step()
        weights = [ema ** (step - s) for s in range(step + 1)]
        mean = sum(w * covariance(batch(s)) for s, w in enumerate(weights)) / sum(weights)
        torch.testing.assert_close(weight_gradients(model)[0], preconditioned(before, mean, 0.1))


def test_a_nan_batch_keeps_the_last_good_inverse_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, poisoned = mlp(5, 3), batch(1)
    poisoned[3, 2] = torch.nan
    ap = ActivationPreconditioner(model, damping=0.1, ema=0.5)
    backward(model, batch(0))
    ap.step()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            backward(model, poisoned)
            model[0].weight.grad = torch.ones(3, 5, dtype=torch.double)
            ap.step()
    torch.testing.assert_close(
        weight_gradients(model)[0], preconditioned(torch.ones(3, 5).double(), covariance(batch(0)), 0.1)
    )
    assert [r.getMessage() for r in caplog.records] == [
        "0.weight: covariance has NaN or infinity (rows 16); kept the inverse of step 0"
    ]


def test_a_gradient_without_captured_rows_is_an_error_that_names_the_layer() -> None:
    model = mlp(5, 4, 3)
    ap = ActivationPreconditioner(model)
    torch.nn.functional.linear(batch(0), model[0].weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"^0\.weight: has a gradient, but"):
        ap.step()


@pytest.mark.parametrize("options", [{"solver": "exact", "ema": 0.5}, {"solver": "exact"}, {"solver": "lowrank"}])
def test_rows_of_a_count_that_failed_on_its_way_are_forgotten(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a batch that is too large for the device is skipped, and the next one stepped with."""
    models = [nn.Linear(24, 4, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    aps = [ActivationPreconditioner(model, **options) for model in models]
    kind = type(aps[0]._stacks[0])
    add = kind._add

    def fails(self: Any, *args: Any) -> None:
        add(self, *args)
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_add", fails)
        with pytest.raises(torch.OutOfMemoryError):
            backward(models[0], batch(0, d=24).float())
    for model, ap in zip(models, aps, strict=True):
        backward(model, batch(1, d=24).float())
        ap.step()
    assert_same(weight_gradients(models[0]), weight_gradients(models[1]))
    assert_same(aps[0].state_dict(), aps[1].state_dict())


def test_an_unused_layer_is_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(5, 3)}).double()
    ap = ActivationPreconditioner(model)
    model["used"](batch(0)).square().sum().backward()
    ap.step()
    assert model["unused"].weight.grad is None


def test_a_shared_module_and_a_shared_weight_pool_their_rows() -> None:
    model = nn.ModuleList([nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)]).double()
    model[1].weight = model[0].weight
    ap = ActivationPreconditioner(model, damping=0.1)
    first = batch(0)
    second = model[0](first)
    model[0](model[1](second)).sum().backward()
    before = weight_gradients(model)[0]
    ap.step()
    rows = torch.cat([first, second, model[1](second)]).detach()
    torch.testing.assert_close(weight_gradients(model)[0], preconditioned(before, covariance(rows), 0.1))


def test_keyword_calls_are_captured() -> None:
    model = nn.Linear(5, 3).double()
    ap = ActivationPreconditioner(model)
    model(input=batch(0)).sum().backward()
    ap.step()
    assert ap.summary()[0].rows == 16


def test_exclude_matches_whole_names_and_frozen_layers_are_reported() -> None:
    model = nn.ModuleDict({f"m{i}": nn.Linear(2, 2) for i in (1, 10, 2)})
    model["m2"].requires_grad_(False)
    summary = ActivationPreconditioner(model, exclude=["m1"]).summary()
    reasons = {row.parameter: row.reason for row in summary if row.parameter.endswith("weight")}
    assert reasons == {
        "m1.weight": "m1 matches an exclude pattern",
        "m10.weight": "",
        "m2.weight": "the weight is frozen (requires_grad=False)",
    }
    assert {row.parameter for row in summary} == {name for name, _ in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_weights_without_entries_are_left_out() -> None:
    model = nn.ModuleDict({"condition": nn.Linear(0, 3), "state": nn.Linear(5, 3)}).double()
    ap = ActivationPreconditioner(model)
    (model["condition"](torch.empty(16, 0).double()) + model["state"](batch(0))).square().sum().backward()
    ap.step()
    reasons = {row.parameter: row.reason for row in ap.summary() if row.parameter.endswith("weight")}
    assert reasons == {"condition.weight": "the weight has no entries", "state.weight": ""}


def test_summary_reports_the_spectrum() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    ap = ActivationPreconditioner(model)
    backward(model, torch.diag(torch.tensor([3.0, 3.0, 1.0], dtype=torch.double)).repeat(4, 1))
    ap.step()
    (row,) = ap.summary()
    assert row.condition_number == pytest.approx(9)
    share = torch.tensor([9, 9, 1]) / 19
    assert row.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()))
    assert "0.weight" in str(ap.summary())


@pytest.mark.parametrize("options", [{}, {"update_every": 3}, {"ema": 0.9}])
def test_resume_is_bit_identical(options: dict[str, float]) -> None:
    def run(steps: range, state: dict | None) -> tuple[list[Tensor], dict]:
        model = mlp(5, 4, 4, 3)
        ap = ActivationPreconditioner(model, **options)
        if state is not None:
            ap.load_state_dict(copy.deepcopy(state))
        for step in steps:
            backward(model, batch(step))
            ap.step()
        return weight_gradients(model), ap.state_dict()

    _, half = run(range(4), None)
    whole, _ = run(range(9), None)
    resumed, _ = run(range(4, 9), half)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"solver": "lowrank"}])
def test_a_state_of_the_beginning_is_the_beginning(options: dict[str, Any]) -> None:
    gradients = []
    for detour in (0, 3):
        model = mlp(5, 4, 3)
        ap = ActivationPreconditioner(model, **options)
        start = ap.state_dict()
        for step in range(detour):
            backward(model, 9 * batch(step))
            ap.step()
        ap.load_state_dict(start)
        backward(model, batch(7))
        ap.step()
        gradients.append(weight_gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_state_of_the_beginning_is_loaded_after_one_layer_went_elsewhere() -> None:
    model = mlp(5, 5, 5)
    ap = ActivationPreconditioner(model)
    start = ap.state_dict()
    next(module for module in model.modules() if isinstance(module, nn.Linear)).float()
    ap.load_state_dict(start)
    assert sum(row.covered for row in ap.summary()) == 2


def test_state_of_another_model_is_refused() -> None:
    wide_model = mlp(5, 4, 3)
    small, wide = (ActivationPreconditioner(m, update_every=2) for m in (mlp(5, 3), wide_model))
    other = mlp(6, 3)
    wider = ActivationPreconditioner(other)
    backward(other, batch(0, d=6))
    wider.step()
    with pytest.raises(ValueError, match=r"other layers; it lacks, so exclude .* afresh: 2\.weight$"):
        wide.load_state_dict(wider.state_dict())
    backward(wide_model, batch(0))
    wide.step()
    with pytest.raises(ValueError, match=r"other layers; not covered here: 2\.weight$"):
        wider.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight: the preconditioner.s saved factor is of shape \(1, 6, 6\)"):
        small.load_state_dict(wider.state_dict())


def test_a_state_of_layers_that_did_not_go_together_is_refused_with_the_reason() -> None:
    """Layers of different dtypes track directions apart from each other."""

    def made(*dtypes: torch.dtype) -> tuple[list[nn.Module], ActivationPreconditioner]:
        model = nn.ModuleList(nn.Linear(80, 3, bias=False, dtype=dtype) for dtype in dtypes)
        return list(model), ActivationPreconditioner(model, solver="lowrank", damping=1e-3)

    layers, ap = made(torch.double, torch.float)
    for step in range(5):
        for layer, scale in zip(layers, (torch.arange(1, 81) ** -0.5, torch.arange(1, 81) ** -4.0), strict=True):
            layer(batch(step, 200, 80).to(layer.weight.dtype) * scale.to(layer.weight.dtype)).square().sum().backward()
        ap.step()
    _, other = made(torch.float, torch.float)
    with pytest.raises(ValueError, match=r"saved basis is of shape .* or the layers' dtypes or devices\?"):
        other.load_state_dict(ap.state_dict())


def test_copies_of_the_model_carry_no_live_hook() -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model)
    twin = copy.deepcopy(model)
    backward(model, batch(0))
    backward(twin, batch(1, n=7))
    ap.step()
    assert ap.summary()[0].rows == 16


@pytest.mark.parametrize("options", [{"max_rows": 8}, {"solver": "lowrank", "overlap": True, "update_every": 2}])
def test_the_default_device_does_not_matter(options: dict[str, Any]) -> None:
    """Random columns and bases are drawn by a generator of the CPU, which refuses to draw on another device."""
    model = mlp(5, 4, 3)
    batches = [batch(seed) for seed in range(5)]
    with torch.device("meta"):
        ap = ActivationPreconditioner(model, **options)
        for x in batches:
            backward(model, x)
            ap.step(measure=True)
        ap.load_state_dict(ap.state_dict())
        assert ap.summary()[0].rows


def test_a_second_preconditioner_of_a_weight_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    def told(*others: nn.Module, **options: Any) -> list[str]:
        caplog.clear()
        for other in others:
            ActivationPreconditioner(other, **options).remove()
        return caplog.messages

    model = mlp(5, 4, 3)
    first = ActivationPreconditioner(model, include=["2"])
    (message,) = told(model)
    assert message.startswith("2.weight: another preconditioner covers it too, ")
    assert told(model, max_dim=2, bias=True, exclude=["0"]) == [message]
    assert not told(model, exclude=["2"])
    assert not told(mlp(5, 4, 3), copy.deepcopy(model), *copy.deepcopy([model]))
    # Of optimizers that share a layer, each after a backward of its own.
    assert not told(model, model, parameters=[*model.parameters()])
    del model[2].weight  # as where a normalisation is taken off
    assert not told(mlp(5, 4))
    model = mlp(5, 4, 3)
    first = ActivationPreconditioner(model)
    first.remove()
    assert not told(model)


def test_one_that_is_gone_is_no_second_preconditioner(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model, update_every=9, solver="exact")
    backward(model, batch(0))
    ap.step()
    del ap
    gc.collect()
    ActivationPreconditioner(model)
    assert not caplog.messages


def test_remove_takes_the_hooks_off() -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model)
    ap.remove()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("update_every", [1, 10])  # between refreshes the last inverse would go on rewriting
def test_a_step_after_remove_is_refused(update_every: int) -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model, update_every=update_every)
    backward(model, torch.randn(8, 5, dtype=torch.double))
    ap.step()
    ap.remove()
    with pytest.raises(RuntimeError, match=r"was removed.*; make a new one"):
        ap.step()


@pytest.mark.parametrize("model", [mlp(5, 3).parameters(), torch.optim.AdamW(mlp(5, 3).parameters()), None])
def test_what_is_no_module_is_refused_by_name(model: Any) -> None:
    with pytest.raises(TypeError, match=f"model must be a module.*got {type(model).__name__}; pass the model itself"):
        ActivationPreconditioner(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"damping": float("nan")}, "damping must be positive"),
        ({"damping_scale": "max"}, "damping_scale must be one of"),
        ({"update_every": 0}, "update_every must be at least 1"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"conv": "pixel"}, "conv must be one of"),
        ({"include": ["1"]}, "include: '1' matches no module with parameters in Sequential"),
        ({"exclude": ["?"]}, "nothing to precondition in Sequential"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationPreconditioner(mlp(5, 3), **options)


def test_what_follows_a_layer_may_work_in_place() -> None:
    rows = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace), nn.Linear(4, 3)).double()
        ap = ActivationPreconditioner(model, damping=0.1)
        backward(model, batch(0))
        ap.step()
        rows.append(weight_gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


def test_checkpointing_does_not_keep_inputs_alive() -> None:
    model, alive = mlp(5, 4, 3), []
    ActivationPreconditioner(model)

    def forward(x: Tensor) -> Tensor:
        h = model[1](model[0](x))
        alive.append(weakref.ref(h))
        return model[2](h)

    y = checkpoint(forward, batch(0).requires_grad_(), use_reentrant=False)
    gc.collect()
    assert alive[0]() is None
    y.sum().backward()


def test_weights_tied_between_different_kinds_are_left_alone_and_reported() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(6, 4), "h": nn.Linear(4, 6, bias=False), "l": nn.Linear(4, 4, bias=False)})
    model["h"].weight = model["e"].weight
    ap = ActivationPreconditioner(model)
    model["h"](model["l"](model["e"](torch.tensor([0, 1, 1])))).square().sum().backward()
    before = model["e"].weight.grad.clone()
    ap.step()
    assert torch.equal(model["e"].weight.grad, before)
    reasons = {row.parameter: row.reason for row in ap.summary()}
    assert reasons["e.weight"] == "tied between different kinds: e.weight (embedding), h.weight (linear)"
    assert reasons["l.weight"] == ""


def test_a_layer_unfrozen_later_is_an_error_that_names_it() -> None:
    model = mlp(5, 4, 3)
    model[0].requires_grad_(False)
    ap = ActivationPreconditioner(model)
    model[0].requires_grad_(True)
    backward(model, batch(0))
    with pytest.raises(RuntimeError, match=r"^0\.weight: was frozen when the preconditioner was made"):
        ap.step()


def test_a_trainable_bias_of_a_frozen_weight_is_left_alone() -> None:
    model = mlp(5, 4, 3)
    model[0].weight.requires_grad_(False)
    ap = ActivationPreconditioner(model)
    backward(model, batch(0))
    before = model[0].bias.grad.clone()
    ap.step()
    assert torch.equal(model[0].bias.grad, before)


def test_a_bias_that_another_optimizer_holds_is_left_to_it() -> None:
    """The first layer's weight is rewritten as without it, whether the bias has a gradient or not."""
    model = mlp(5, 4, 3)
    mine = [model[0].weight, *model[2].parameters()]
    ap = ActivationPreconditioner(model, bias=True, damping=0.1, parameters=mine)
    for frozen in (False, True):
        model[0].bias.requires_grad_(not frozen)  # as toggle_optimizer does
        x = batch(0)
        backward(model, x)
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        ap.step()
        torch.testing.assert_close(model[0].weight.grad, preconditioned(before["0.weight"], covariance(x), 0.1))
        assert not torch.equal(model[2].bias.grad, before["2.bias"])
        if not frozen:
            assert torch.equal(model[0].bias.grad, before["0.bias"])


def test_a_bias_frozen_later_is_an_error() -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model, bias=True)
    model[0].bias.requires_grad_(False)
    backward(model, batch(0))
    with pytest.raises(RuntimeError, match=r"^0\.weight has a gradient and its bias has none"):
        ap.step()


def test_devices_without_float64_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preconditioner, "WITHOUT_FLOAT64", {"cpu"})
    with pytest.raises(ValueError, match="float64, which cpu devices lack"):
        ActivationPreconditioner(mlp(5, 3))


def saved_and_loaded(both: Any) -> Any:
    file = io.BytesIO()
    torch.save(both, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, saved_and_loaded, lambda both: pickle.loads(pickle.dumps(both))],
    ids=["deep", "torch", "pickle"],
)
@pytest.mark.parametrize("width", [5, 200])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_every": 3},
        {"ema": 0.5, "solver": "exact"},
        {"solver": "lowrank"},
        {"solver": "lowrank", "update_every": 3, "ema": 0.5},
    ],
    ids=str,
)
def test_copies_go_on_by_themselves(options: dict[str, Any], width: int, copier: Callable[[Any], Any]) -> None:
    """Taken in the middle of a window. Views do not share storage any more in what plain pickle brings back."""
    model = mlp(width, 3)
    ap = ActivationPreconditioner(model, **options)
    backward(model, batch(0, d=width))
    ap.step()
    backward(model, batch(9, d=width))
    other, copied = copier((model, ap))
    results = []
    for of, by in ((other, copied), (model, ap)):
        rewritten = []
        for step in range(1, 8):
            # A direction that is new at each refresh, so that old ones do not do.
            backward(of, batch(step, d=width) + 10 * batch(20 + step, 1, width))
            by.step()
            rewritten.append(weight_gradients(of)[0])
        results.append((torch.stack(rewritten), by.state_dict()))
    (theirs, state), (ours, expected) = results
    assert torch.equal(theirs, ours)
    assert_same(state, expected)


def test_a_copy_of_a_removed_one_is_removed() -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model)
    ap.remove()
    other, copied = copy.deepcopy((model, ap))
    assert not any(module._forward_hooks for module in other.modules())
    copied.remove()


def test_copies_are_made_while_weights_are_frozen() -> None:
    """As those of the other optimizer are under ``toggle_optimizer``."""
    model = mlp(5, 4, 3)
    ap = ActivationPreconditioner(model)
    model[0].requires_grad_(False)
    other, copied = copy.deepcopy((model, ap))
    other[0].requires_grad_(True)
    backward(other, batch(0))
    before = weight_gradients(other)[0]
    copied.step()
    torch.testing.assert_close(weight_gradients(other)[0], preconditioned(before, covariance(batch(0)), 0.01))


def test_globs_are_lists() -> None:
    """Iterated by letter, ``exclude="0"`` would do and ``include="bo*"`` cover everything."""
    for name in ("include", "exclude"):
        with pytest.raises(TypeError, match=rf"^{name} must be a list of globs.*, got 'head'; write \['head'\]"):
            ActivationPreconditioner(mlp(5, 3), **{name: "head"})


def test_an_excluded_layer_may_be_unfrozen() -> None:
    model = mlp(5, 4, 3)
    model[0].requires_grad_(False)
    ap = ActivationPreconditioner(model, exclude=["0"])
    model[0].requires_grad_(True)
    backward(model, batch(0))
    before = model[0].weight.grad.clone()
    ap.step()
    assert torch.equal(model[0].weight.grad, before)


def test_names_are_the_models_own_however_it_is_wrapped(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(mlp(5, 4, 3))
        fabric = Fabric(accelerator="cpu", devices=1)
        for wrapped in (torch.compile(parallel, backend="eager"), fabric.setup(parallel), fabric.setup(mlp(5, 4, 3))):
            ap = ActivationPreconditioner(wrapped, exclude=["0"])
            assert [row.parameter for row in ap.summary() if row.covered] == ["2.weight"]
            ap.remove()
    finally:
        torch.distributed.destroy_process_group()


def test_failures_survive_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(5, 3)
    ap = ActivationPreconditioner(model, max_failures=3)
    for seed in range(2):
        backward(model, torch.full_like(batch(seed), torch.nan))
        ap.step()
    ap.remove()
    resumed = ActivationPreconditioner(model, max_failures=3)
    resumed.load_state_dict(ap.state_dict())
    assert resumed.summary()[0].failures == 2
    caplog.clear()
    backward(model, torch.full_like(batch(2), torch.nan))
    with pytest.raises(RuntimeError, match="3 refreshes in a row"):
        resumed.step()
    assert not caplog.records


def test_a_state_saved_before_the_first_step_is_empty_and_loads() -> None:
    model = mlp(5, 4, 3)
    ap = ActivationPreconditioner(model)
    model[0](batch(0)).sum().backward()  # a window that only the first layer has opened
    other = ActivationPreconditioner(mlp(5, 4, 3))
    other.load_state_dict(ap.state_dict())
    assert ap.state_dict()["layers"] == {}
