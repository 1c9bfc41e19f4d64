"""torch.compile counts the rows that eager counts, in whole graphs: one of refreshes, and one of all other steps."""

import copy
import logging
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from test_capture import Rows, Watched, attention_layers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.scheduler import BaseSchedulerNode, Scheduler
from torch.utils.checkpoint import checkpoint

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner.audit import GradientAudit


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function: Callable, backend: str = "aot_eager") -> Callable:
    return torch.compile(function, backend=backend, fullgraph=True)


def in_a_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def mlp() -> tuple[nn.Sequential, list[Watched]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)).double()
    return model, [Watched([model[0]]), Watched([model[2]])]


def encoder() -> tuple[nn.Module, list[Watched]]:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).double()
    return model, [*attention_layers(model.self_attn), Watched([model.linear1]), Watched([model.linear2])]


def tokens() -> tuple[nn.Module, list[Watched]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6), nn.Conv1d(3, 2, 1), nn.Flatten(), nn.Linear(12, 1)).double()
    return model, [Watched([model[i]]) for i in (0, 1, 3)]


MODELS = {
    "mlp": (mlp, lambda n: torch.randn(n, 5, dtype=torch.double)),
    "encoder": (encoder, lambda n: torch.randn(n, 3, 6, dtype=torch.double)),
    "tokens": (tokens, lambda n: torch.randint(5, (n, 3))),
}


def step(forward: Callable[[Tensor], Tensor], rows: Rows, x: Tensor) -> list[tuple[Watched, Tensor]]:
    rows.calls.clear()
    forward(x).square().sum().backward()
    return [(layer, x) for layer, x, _ in rows.calls]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_models_count_the_same_rows(name: str, compile_first: bool) -> None:
    make, data = MODELS[name]
    model, layers = make()
    plain, plain_layers = make()
    rows, plain_rows = Rows(), Rows()
    if compile_first:
        forward = compiled(model)
        rows.capture(*layers)
    else:
        rows.capture(*layers)
        forward = compiled(model)
    plain_rows.capture(*plain_layers)
    for _ in range(3):
        x = data(4)
        step(forward, rows, x)
        step(plain, plain_rows, x)
        assert len(rows.calls) == len(layers)
        for layer, plain_layer in zip(layers, plain_layers, strict=True):
            torch.testing.assert_close(rows.of(layer), plain_rows.of(plain_layer))
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert graphs() == 1


def test_the_default_backend_counts_the_same_rows() -> None:
    model, layers = mlp()
    plain = copy.deepcopy(model)
    rows = Rows()
    rows.capture(*layers)
    forward, x = compiled(model, "inductor"), torch.randn(7, 5, dtype=torch.double)
    for _ in range(2):
        step(forward, rows, x)
        torch.testing.assert_close(rows.of(layers[0]), x)
        torch.testing.assert_close(rows.of(layers[1]), plain[:2](x))


@pytest.mark.parametrize("threaded", [False, True])
def test_cuda_graphs_leave_the_counting_out(threaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's decision, asked as on a GPU; tests/preconditioner/test_cuda.py runs what follows from it there."""
    reasons: dict[str, str | None] = {}
    decide = Scheduler.should_partition

    def should_partition(self: Scheduler, node: BaseSchedulerNode) -> str | None:
        reason = decide(self, node)
        reasons[str(getattr(node.node, "op_overload", type(node.node).__name__))] = reason
        return reason

    monkeypatch.setattr(Scheduler, "should_partition", should_partition)
    monkeypatch.setattr(BaseSchedulerNode, "is_gpu", lambda node: True)
    model, layers = mlp()
    rows = Rows()
    rows.capture(*layers)
    options = {"triton.cudagraphs": True, "fx_graph_cache": False}
    with torch._inductor.config.patch(options):
        loss = compiled(model, backend="inductor")(torch.randn(7, 5, dtype=torch.double)).square().sum()

    def backward() -> None:
        with torch._inductor.config.patch(options):
            loss.backward()

    if threaded:  # as on a GPU
        in_a_thread(backward)
    else:
        backward()
    assert len(rows.calls) == 2
    counting = reasons.pop("dopr_lightning.count_rows.default")
    assert counting is not None
    assert "custom partition op" in counting
    assert None in reasons.values()  # what else there is, is recorded


def test_there_is_one_graph_of_refreshes_and_one_of_other_steps() -> None:
    model, layers = mlp()
    rows, x = Rows(), torch.randn(7, 5, dtype=torch.double)
    capture = rows.capture(*layers)
    forward = compiled(model)

    def round_trip(wanted: bool) -> int:
        capture.listen(wanted)
        model.train()
        step(forward, rows, x)
        seen = len(rows.calls)
        forward(x)  # never walked back
        with torch.no_grad():
            forward(x)
        model.eval()
        forward(x).sum().backward()
        assert len(rows.calls) == seen
        return seen

    assert [round_trip(True), round_trip(False)] == [2, 0]
    before = graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert [round_trip(wanted) for wanted in (True, False, True, False)] == [2, 0, 2, 0]
    assert graphs() == before


def test_training_and_evaluation_on_batches_of_several_sizes_stay_compiled() -> None:
    model, layers = mlp()
    rows = Rows()
    capture = rows.capture(*layers)
    forward = compiled(model)  # in whole graphs: torch raises where it would give up, and run what it cannot trace
    for wanted in (True, False):
        capture.listen(wanted)
        for size in (7, 5, 1):
            x = torch.randn(size, 5, dtype=torch.double)
            assert len(step(forward, rows, x)) == 2 * wanted
            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(forward(x), model(x))
            model.train()
    assert graphs() > 8  # torch's own limit


def test_nothing_is_left_of_the_hooks_in_the_graph_of_steps_without_refresh() -> None:
    operators: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        operators.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    model, layers = mlp()
    rows, x = Rows(), torch.randn(7, 5, dtype=torch.double)
    capture = rows.capture(*layers)
    forward = torch.compile(model, backend=backend, fullgraph=True)
    step(forward, rows, x)
    capture.listen(False)
    step(forward, rows, x)
    plain, _ = mlp()
    torch.compile(plain, backend=backend, fullgraph=True)(x)
    with_hooks, without, *rest = operators
    assert any("autograd_function_apply" in operator for operator in with_hooks)
    assert not any("autograd_function_apply" in operator for operator in without)
    assert not rest  # the other model shares that graph


def test_blocks_compiled_one_by_one_share_a_graph_and_keep_their_rows_apart() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu_()

    model = nn.Sequential(*(Block() for _ in range(10))).double()
    plain = copy.deepcopy(model)
    layers, rows, x = [Watched([block.fc]) for block in model], Rows(), torch.randn(7, 5).double().requires_grad_()
    rows.capture(*layers)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    step(model, rows, x)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(rows.of(layer), plain[:i](x))
    assert graphs() == 1


def test_attention_blocks_compiled_one_by_one_share_their_graphs() -> None:
    model = nn.Sequential(*(encoder()[0] for _ in range(4)))
    layers, rows = [layer for block in model for layer in attention_layers(block.self_attn)], Rows()
    capture = rows.capture(*layers)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    for wanted in (True, False, True):
        capture.listen(wanted)
        x = torch.randn(7, 3, 6, dtype=torch.double, requires_grad=True)
        assert len(step(model, rows, x)) == len(layers) * wanted
    assert graphs() == 2


def test_micro_batches_that_are_alive_together_and_changing_sizes() -> None:
    model, layers = mlp()
    rows = Rows()
    rows.capture(*layers)
    forward, parts = compiled(model), torch.randn(12, 5, dtype=torch.double).split([7, 4, 1])
    losses = [forward(part).sum() for part in parts]
    for loss in losses:
        loss.backward()
    assert torch.equal(rows.of(layers[0]), torch.cat(parts))


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_and_around_compiled_code_counts_once(outside: bool, reentrant: bool) -> None:
    model, layers = mlp()
    rows, x = Rows(), torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    rows.capture(*layers)
    inner = compiled(model) if outside else model

    def forward(x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=reentrant)

    step(forward if outside else compiled(forward), rows, x)
    assert [len(rows.of(layer)) for layer in layers] == [7, 7]


def test_masks_reach_compiled_graphs() -> None:
    model, layers = mlp()
    rows, x = Rows(), torch.randn(3, 5, dtype=torch.double)
    capture = rows.capture(*layers)
    forward = compiled(model)
    step(forward, rows, x)
    assert all(mask is None for _, _, mask in rows.calls)
    for mask in (torch.tensor([True, False, True]), torch.tensor([False, True, True])):
        with capture.mask(mask):
            step(forward, rows, x)
        assert all(torch.equal(seen, mask) for _, _, seen in rows.calls)
    assert graphs() == 2


def test_under_autocast_the_rows_are_those_of_the_cast_input() -> None:
    module, rows = nn.Linear(5, 4), Rows()
    layer, x = Watched([module]), torch.randn(3, 5)
    rows.capture(layer)
    forward = compiled(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(x)
    y.sum().backward()
    assert torch.equal(rows.of(layer), x.bfloat16())


def test_twins_and_removed_captures_count_nothing() -> None:
    model, layers = mlp()
    rows, x = Rows(), torch.randn(3, 5, dtype=torch.double)
    capture = rows.capture(*layers)
    forward, twin = compiled(model), compiled(copy.deepcopy(model))
    assert len(step(forward, rows, x)) == 2
    assert not step(twin, rows, x)
    assert len(step(forward, rows, x)) == 2
    capture.remove()
    assert not step(forward, rows, x)


def test_a_second_capture_takes_over_from_the_first() -> None:
    model, layers = mlp()
    first, second, x = Rows(), Rows(), torch.randn(3, 5, dtype=torch.double)
    capture = first.capture(*layers)
    forward = compiled(model)
    step(forward, first, x)
    capture.remove()
    first.calls.clear()
    second.capture(*layers)
    step(forward, second, x)
    assert (len(first.calls), len(second.calls)) == (0, 2)


def test_hooks_added_after_the_first_run_are_seen_and_not_those_of_another_model_of_the_class() -> None:
    (model, layers), (other, _) = mlp(), mlp()
    rows, x = Rows(), torch.randn(3, 5, dtype=torch.double)
    forward, another = compiled(model), compiled(other)
    forward(x).sum().backward()
    another(x).sum().backward()
    rows.capture(*layers)
    assert len(step(forward, rows, x)) == 2
    assert not step(another, rows, x)
    assert len(step(forward, rows, x)) == 2
    assert graphs() == 2


def test_the_audit_sees_compiled_layers_and_its_end_recompiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, layers = mlp()
    for name, layer in zip(("0", "2"), layers, strict=True):
        layer.name = name
    audit, rows, x = GradientAudit(layers), Rows(), torch.randn(9, 5, dtype=torch.double)  # type: ignore[arg-type]
    rows.capture(*layers, audit=audit)
    forward = compiled(lambda x: model(x).square().sum() + F.linear(x.square(), model[0].weight).square().sum())
    with caplog.at_level(logging.WARNING), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            step(forward, rows, x)
            audit.report()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["0"]
    assert not audit._probes


# -- the whole way ------------------------------------------------------------------------------------------------


def train(
    forward: Callable[[Tensor], Tensor], model: nn.Module, ap: ActivationPreconditioner, x: Tensor
) -> dict[str, Tensor]:
    """One step; returns the gradients that the optimizer was given."""
    model.zero_grad()
    forward(x).square().mean().backward()
    ap.step()
    with torch.no_grad():
        for p in model.parameters():
            p -= 1e-3 * p.grad
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compile_first", [True, False])
def test_steps_of_a_compiled_model_are_those_of_eager(name: str, compile_first: bool) -> None:
    make, data = MODELS[name]
    (model, _), (plain, _) = make(), make()
    if compile_first:
        forward = compiled(model)
        ap = ActivationPreconditioner(forward, update_every=2)
    else:
        ap = ActivationPreconditioner(model, update_every=2)
        forward = compiled(model)
    plain_ap = ActivationPreconditioner(plain, update_every=2)

    def steps(number: int) -> None:
        for _ in range(number):
            x = data(8)
            torch.testing.assert_close(train(forward, model, ap, x), train(plain, plain, plain_ap, x))

    steps(4)  # refreshes, the last without, which some models come to later
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps(3)
    assert graphs() == 2
    counted, plain_counted = ({row.parameter: row.rows for row in one.summary()} for one in (ap, plain_ap))
    assert counted == plain_counted


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reset", [False, True])
def test_a_model_first_compiled_between_two_refreshes_counts_from_the_next_on(name: str, reset: bool) -> None:
    make, data = MODELS[name]
    (model, _), (plain, _) = make(), make()
    ap, plain_ap = (ActivationPreconditioner(m, update_every=4) for m in (model, plain))
    forward: Callable[[Tensor], Tensor] = model
    for step in range(9):
        if step == 2:
            if reset:
                torch._dynamo.reset()
            forward = compiled(model)
        x = data(8)
        torch.testing.assert_close(train(forward, model, ap, x), train(plain, plain, plain_ap, x))
    counted, plain_counted = ({row.parameter: row.rows for row in one.summary()} for one in (ap, plain_ap))
    assert counted == plain_counted
    assert graphs() == 2


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_compiled_and_run_before(name: str) -> None:
    make, data = MODELS[name]
    (model, _), (plain, _) = make(), make()
    forward = compiled(model)
    forward(data(8)).sum().backward()
    ap, plain_ap = ActivationPreconditioner(forward), ActivationPreconditioner(plain)
    x = data(8)
    torch.testing.assert_close(train(forward, model, ap, x), train(plain, plain, plain_ap, x))
    for one, its in ((model, ap), (plain, plain_ap)):
        its.remove()
        one.zero_grad()
    forward(x).sum().backward()
    plain(x).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert graphs() == 2  # the first one serves again


def test_hooks_are_seen_in_another_thread_than_the_one_that_imported_the_package() -> None:
    model, layers = mlp()
    rows, x, seen = Rows(), torch.randn(3, 5, dtype=torch.double), []

    def run() -> None:
        capture = rows.capture(*layers)
        capture.listen(False)
        forward = compiled(model)
        seen.append(len(step(forward, rows, x)))
        capture.listen(True)
        seen.append(len(step(forward, rows, x)))

    in_a_thread(run)
    assert seen == [0, 2]


def test_what_was_compiled_before_the_package_was_imported_is_an_error_that_says_what_to_do() -> None:
    model, _ = mlp()
    forward, x = compiled(model), torch.randn(8, 5, dtype=torch.double)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's own default
        forward(x).sum().backward()
    ap = ActivationPreconditioner(forward)
    with pytest.raises(RuntimeError, match=r"^[02]\.weight: has a gradient, but .*torch\._dynamo\.reset\(\)"):
        train(forward, model, ap, x)
    torch._dynamo.reset()
    train(forward, model, ap, x)


@pytest.mark.parametrize("source", ["compiled", "plain"])
def test_a_state_passes_between_a_compiled_and_a_plain_model(source: str) -> None:
    def start(compile_it: bool) -> tuple[Callable[[Tensor], Tensor], nn.Module, ActivationPreconditioner]:
        model, _ = mlp()
        forward = compiled(model) if compile_it else model
        return forward, model, ActivationPreconditioner(forward, update_every=3)

    saved, loaded = start(source == "compiled"), start(source == "plain")
    for _ in range(2):  # the next step uses the inverse that is saved, the one after it renews it
        train(*saved, torch.randn(8, 5, dtype=torch.double))
    loaded[1].load_state_dict(saved[1].state_dict())
    loaded[2].load_state_dict(saved[2].state_dict())
    for _ in range(2):
        x = torch.randn(8, 5, dtype=torch.double)
        torch.testing.assert_close(train(*loaded, x), train(*saved, x))
