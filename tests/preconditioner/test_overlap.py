"""A refresh that is finished in the next step: the same inverses, some of them a step later, and nothing lost."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from same import assert_same
from torch import Tensor, nn
from torch.nn.functional import linear

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner import renewal
from dopr_lightning.preconditioner.layers.embedding import Embedding
from dopr_lightning.preconditioner.lowrank import FIRST_RANK, WARM_UP
from dopr_lightning.preconditioner.threads import in_background

EVERY = 4
STEPS = 3 * EVERY

SOLVERS: dict[str, dict[str, Any]] = {
    "exact": {"solver": "exact", "ema": 0.5},
    "woodbury": {"solver": "exact"},
    "lowrank": {"solver": "lowrank", "max_error": 0.02},
    "both": {"solver": "auto", "ema": 0.9},
}


@pytest.fixture(params=["in the next step", "in a thread"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the host's part of a refresh: on a CPU, and beside a GPU."""
    if request.param == "in a thread":
        monkeypatch.setattr(renewal, "_host_is_idle", lambda device: True)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    widths = ((24, 256), (256, 256), (256, 24), (24, 3))
    return nn.Sequential(*(nn.Sequential(nn.Linear(*sizes), nn.Tanh()) for sizes in widths))


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x = torch.randn(90, 24, generator=torch.Generator().manual_seed(step)) * torch.arange(1, 25) ** -0.7
    model(x).square().sum().backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", SOLVERS)
def test_some_inverses_take_effect_a_step_later_and_nothing_else_changes(name: str) -> None:
    """The weights stay as they are, so that the others see the same rows."""
    models = net(), net()
    ap = ActivationPreconditioner(models[0], update_every=EVERY, overlap=True, **SOLVERS[name])
    at_once = ActivationPreconditioner(models[1], update_every=EVERY, **SOLVERS[name])
    for step in range(STEPS):
        last = net()
        keeping = ActivationPreconditioner(last, update_every=1000, **SOLVERS[name])
        keeping.load_state_dict(at_once.state_dict())
        for model, preconditioner in (models[0], ap), (models[1], at_once), (last, keeping):
            backward(model, step)
            preconditioner.step()
        expected = gradients(models[1])
        if step >= WARM_UP and step % EVERY == 0:
            later = {row.parameter for row in at_once.summary() if row.solver in ("lowrank", "woodbury")}
            assert bool(later) is (name != "exact")
            old = gradients(last)
            for parameter in later:
                assert not torch.equal(old[parameter], expected[parameter])
                expected[parameter] = old[parameter]
        assert_same(gradients(models[0]), expected)
    assert_same(ap.state_dict(), at_once.state_dict())


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("stop", [2 * EVERY, 2 * EVERY + 1])
def test_a_resume_is_bit_identical_before_a_refresh_and_before_its_end(name: str, stop: int) -> None:
    def run(model: nn.Module, ap: ActivationPreconditioner, steps: range) -> dict[str, Any]:
        for step in steps:
            backward(model, step)
            ap.step()
        return ap.state_dict()

    options = {"update_every": EVERY, "overlap": True, **SOLVERS[name]}
    model, other, straight = net(), net(), net()
    saved = copy.deepcopy(run(model, ActivationPreconditioner(model, **options), range(stop)))
    resumed = ActivationPreconditioner(other, **options)
    resumed.load_state_dict(saved)
    end = stop + EVERY + 1
    found = run(other, resumed, range(stop, end))
    assert_same(found, run(straight, ActivationPreconditioner(straight, **options), range(end)))
    assert_same(gradients(other), gradients(straight))


@pytest.mark.usefixtures("place")
def test_a_refresh_may_be_finished_in_inference_mode() -> None:
    """As where a checkpoint is saved at a validation's end; here with a refresh that asks for more directions."""
    states = []
    for inference in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 8, bias=False))
        ap = ActivationPreconditioner(model, update_every=EVERY, overlap=True, solver="lowrank", max_error=0.05)
        for step in range(STEPS):
            model.zero_grad()
            x = torch.randn(300, 256, generator=torch.Generator().manual_seed(step))
            x[:, (3 if step < EVERY else 256) :] = 0
            model(x).square().sum().backward()
            ap.step()
            with torch.inference_mode(inference):
                ap.state_dict()
        assert ap._stacks[0].tracked > FIRST_RANK
        states.append({**ap.state_dict(), "gradients": gradients(model)})
    assert_same(*states)


def test_a_state_that_is_refused_leaves_the_refresh_under_way() -> None:
    _model, ap = steps_with(*BEFORE, "module")
    pending = ap._pending
    assert pending is not None
    state = ActivationPreconditioner(nn.Linear(2, 2)).state_dict()
    with pytest.raises(ValueError, match="saved for other layers"):
        ap.load_state_dict({**state, "layers": {"other.weight": {}}})
    assert ap._pending is pending


@pytest.mark.parametrize("at", [EVERY, EVERY + 1])
def test_a_step_that_is_skipped_leaves_no_trace(at: int) -> None:
    """Instead of one that refreshes, or of one in which the refresh is to be finished."""
    states = []
    for skips in (False, True):
        model = net()
        ap = ActivationPreconditioner(model, update_every=EVERY, overlap=True, **SOLVERS["lowrank"])
        for step in range(2 * EVERY):
            if skips and step == at:
                backward(model, 100)
                ap.discard()
            backward(model, step)
            ap.step()
        states.append({**ap.state_dict(), "gradients": gradients(model)})
    assert_same(*states)


def test_where_every_step_refreshes_nothing_waits() -> None:
    models = net(), net()
    aps = [ActivationPreconditioner(model, overlap=on) for model, on in zip(models, (True, False), strict=True)]
    for step in range(WARM_UP + 2):
        for model, ap in zip(models, aps, strict=True):
            backward(model, step)
            ap.step()
        assert_same(gradients(models[0]), gradients(models[1]))


class Sometimes(nn.Module):
    """A layer that some steps use; with its module's hooks, or past them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(24, 400), nn.Linear(400, 400)

    def forward(self, x: Tensor, how: str) -> Tensor:
        h = torch.tanh(self.always(x))
        if how == "module":
            return self.sometimes(h)
        return linear(h, self.sometimes.weight) if how == "weight" else h


def backward_with(model: Sometimes, step: int, how: str) -> None:
    model.zero_grad()
    model(torch.randn(300, 24, generator=torch.Generator().manual_seed(step)), how).square().sum().backward()


def steps_with(*how: str, **options: Any) -> tuple[Sometimes, ActivationPreconditioner]:
    model = Sometimes()
    ap = ActivationPreconditioner(model, update_every=EVERY, overlap=True, solver="lowrank", **options)
    for step, kind in enumerate(how):
        backward_with(model, step, kind)
        ap.step()
    return model, ap


BEFORE = ["module"] * EVERY
"""Up to the first refresh that is finished later."""


def test_a_gradient_without_rows_is_found_out_in_the_next_step() -> None:
    model, ap = steps_with(*BEFORE, "weight")
    backward_with(model, 5, "module")
    with pytest.raises(RuntimeError, match=r"sometimes\.weight: has a gradient, but .* were not seen"):
        ap.step()


def test_a_gradient_of_zeros_without_rows_is_none() -> None:
    """As optimizers leave it whose ``zero_grad`` keeps tensors: it costs no further refresh."""
    model, ap = steps_with(*BEFORE)
    refreshed = []
    for step in range(EVERY, 4 * EVERY):
        if ap.collecting:
            refreshed.append(step)
        backward_with(model, step, "none")
        model.sometimes.weight.grad = torch.zeros_like(model.sometimes.weight)
        model.sometimes.bias.grad = torch.zeros_like(model.sometimes.bias)
        ap.step()
    assert refreshed == [EVERY, 2 * EVERY, 3 * EVERY]


def test_a_layer_that_is_never_used_keeps_no_other_from_overlapping() -> None:
    model, ap = steps_with(*["none"] * EVERY)
    assert None in [record.refreshed_at for stack in ap._stacks for record in stack.records]
    backward_with(model, EVERY, "none")
    ap.step()
    assert ap._pending is not None


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_counted_on_the_device_are_rows(sparse: bool) -> None:
    """An embedding counts them there, and where there is a mask every layer does."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 8, sparse=sparse), "linear": nn.Linear(8, 3)})
    ap = ActivationPreconditioner(model, update_every=EVERY, overlap=True)
    for step in range(2 * EVERY):
        model.zero_grad()
        tokens = torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(step))
        with ap.mask(tokens != 0):
            model["linear"](model["embedding"](tokens)).square().sum().backward()
        ap.step()
    assert [[record.refreshed_at for record in stack.records] for stack in ap._stacks] == [[EVERY]] * 2


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_a_refresh_makes_no_sparse_gradient_dense(overlap: bool, counts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To see whether a layer without rows has learnt; of an embedding the host always knows none."""

    def dense(layer: Embedding) -> Tensor:
        raise AssertionError(f"{layer.name} was asked for its gradient's matrix")

    monkeypatch.setattr(Embedding, "gradient", dense)
    torch.manual_seed(0)
    model = nn.Embedding(5, 8, sparse=True)
    ap = ActivationPreconditioner(model, update_every=EVERY, overlap=overlap)
    for step in range(2 * EVERY):
        model.zero_grad()
        tokens = torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(step))
        (model(tokens) * (counts or step < EVERY)).square().sum().backward()
        if step == EVERY and not counts:
            ap.discard()
        ap.step()
    (stack,) = ap._stacks
    assert [record.refreshed_at for record in stack.records] == [EVERY if counts else 0]


def test_copies_are_made_of_what_is_finished() -> None:
    model, ap = steps_with(*BEFORE, "module")
    assert ap._pending is not None
    other, copied = copy.deepcopy((model, ap))
    for m, preconditioner in (model, ap), (other, copied):
        backward_with(m, 5, "none")
        preconditioner.step()
    assert_same(copied.state_dict(), ap.state_dict())


def test_removing_the_hooks_raises_nothing() -> None:
    model, ap = steps_with(*BEFORE, max_failures=1)
    backward_with(model, EVERY, "module")
    for stack in ap._stacks:
        stack._sums.fill_(torch.nan)
    ap.step()
    ap.remove()
    assert not any(module._forward_hooks for module in model.modules())
    assert ap._pending is None


@pytest.mark.parametrize("error", [ValueError, None])
def test_a_thread_finishes_or_says_why_not(error: type[Exception] | None) -> None:
    def function() -> str:
        if error is not None:
            raise error("no")
        return threading.current_thread().name

    result = in_background(function, torch.device("cpu"))
    if error is None:
        assert result().startswith("dopr-background")
    else:
        with pytest.raises(error, match="no"):
            result()


def test_a_layer_without_a_gradient_at_the_refresh_may_have_one_in_the_next_step() -> None:
    _, ap = steps_with(*BEFORE, "none", *BEFORE, "module")
    assert [row.rows for row in ap.summary() if row.covered] == [300, 300]


def test_the_next_window_opens_with_as_many_directions_as_the_last_one_asked_for() -> None:
    model, ap = steps_with(*BEFORE, "module", max_error=1e-6)
    tracked = [stack.tracked for stack in ap._stacks]
    ap._due = True  # as if a layer had been used for the first time
    ap._capture.listen(True)
    backward_with(model, 5, "module")
    assert [stack.tracked for stack in ap._stacks] > tracked
    ap.step()
    for stack in ap._stacks:
        assert stack._image.shape == (stack.blocks, stack.tracked, stack.dim)


def test_failures_are_counted_once_and_the_last_good_inverse_kept() -> None:
    model = net()
    ap = ActivationPreconditioner(model, update_every=EVERY, overlap=True, solver="lowrank", max_failures=2)
    for step in range(3 * EVERY):
        model.zero_grad()
        x = torch.randn(90, 24, generator=torch.Generator().manual_seed(step))
        model(x * torch.nan if step == EVERY else x).nan_to_num().square().sum().backward()
        for parameter in model.parameters():
            parameter.grad.nan_to_num_()
        ap.step()
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())
    assert [row.failures for row in ap.summary() if row.covered] == [1] * 4


def test_an_input_that_is_always_zero_does_not_end_the_overlap() -> None:
    """Its layer never has an inverse, and needs none."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"seen": nn.Linear(24, 256), "unused": nn.Linear(8, 256), "out": nn.Linear(256, 3)})
    ap = ActivationPreconditioner(model, update_every=EVERY, overlap=True, solver="lowrank")
    overlapped = []
    for _ in range(STEPS):
        model.zero_grad()
        hidden = model["seen"](torch.randn(90, 24)) + model["unused"](torch.zeros(90, 8))
        model["out"](hidden.tanh()).square().sum().backward()
        ap.step()
        overlapped.append(ap._pending is not None)
    assert overlapped == [step >= WARM_UP and step % EVERY == 0 for step in range(STEPS)]
