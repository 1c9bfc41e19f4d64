"""Which rows count, and which gradients they explain."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from dopr_lightning import ActivationPreconditioner
from dopr_lightning.preconditioner.audit import GradientAudit
from dopr_lightning.preconditioner.capture import Capture
from dopr_lightning.preconditioner.layers.linear import Linear


@dataclass(eq=False)
class Watched:
    """What Capture needs of a Layer."""

    modules: list[nn.Module]
    name: str = "weight"
    functional: bool = False
    position: int = 0
    attribute: str = "weight"
    rearranges: bool = True

    @property
    def kind(self) -> str:
        kinds = {nn.Linear: "linear", nn.Embedding: "embedding", nn.Conv1d: "conv", nn.Conv2d: "conv"}
        return next((kind for base, kind in kinds.items() if isinstance(self.modules[0], base)), "other")

    @property
    def weight(self) -> Tensor:
        return self.modules[0].get_parameter(self.attribute)

    def input(self, args: tuple, kwargs: dict) -> Tensor:
        names = ("query", "key", "value") if len(args) + len(kwargs) > 2 else ("input",)
        return args[self.position] if self.position < len(args) else kwargs[names[self.position]]


@dataclass
class Rows:
    """A sink that keeps what it gets."""

    calls: list[tuple[Watched, Tensor, Tensor | None]] = field(default_factory=list)

    def capture(self, *layers: Watched, audit: GradientAudit | None = None) -> Capture:
        return Capture(layers, lambda *call: self.calls.append(call[:3]), audit)  # type: ignore[arg-type]

    def of(self, layer: Watched) -> Tensor:
        found = [x.reshape(-1, x.shape[-1]) for owner, x, _ in self.calls if owner is layer]
        return torch.cat(found) if found else torch.empty(0)


def batch(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def linear(d_in: int = 5, d_out: int = 4, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(d_in, d_out).double()


def test_a_backward_counts_each_row_once_and_the_gradient_is_what_it_was() -> None:
    model, x, rows = nn.Sequential(linear(), nn.Tanh(), linear(4, 3)), batch(2, 7, 5), Rows()
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    layers = Watched([model[0]]), Watched([model[2]])
    rows.capture(*layers)
    model(x).square().sum().backward()
    assert torch.equal(rows.of(layers[0]), x.reshape(-1, 5))
    assert torch.equal(rows.of(layers[1]), model[:2](x).reshape(-1, 4))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    model, x, rows = nn.Sequential(linear(), nn.Tanh(), linear(4, 3)), batch(6, 5).requires_grad_(), Rows()
    layers = [Watched([model[0]]), Watched([model[2]])]
    rows.capture(*layers)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert [len(rows.of(layer)) for layer in layers] == [6, 6]


def test_checkpointing_keeps_no_input_alive() -> None:
    model, alive = nn.Sequential(linear(), nn.Tanh(), linear(4, 3)), []
    Rows().capture(Watched([model[0]]), Watched([model[2]]))

    def forward(x: Tensor) -> Tensor:
        h = model[:2](x)
        alive.append(weakref.ref(h))
        return model[2](h)

    y = checkpoint(forward, batch(6, 5).requires_grad_(), use_reentrant=False)
    gc.collect()
    assert alive[0]() is None
    y.sum().backward()


def test_a_graph_that_is_walked_back_twice_counts_once() -> None:
    layer, rows = Watched([linear()]), Rows()
    rows.capture(layer)
    loss = layer.modules[0](batch(6, 5)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(rows.of(layer)) == 6


def test_a_gradient_penalty_counts_once_and_keeps_its_gradient() -> None:
    def gradients(capture: bool) -> list[Tensor]:
        model, x, rows = nn.Sequential(linear(), nn.Tanh(), linear(4, 1)), batch(6, 5).requires_grad_(), Rows()
        layer = Watched([model[0]])
        if capture:
            rows.capture(layer)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert len(rows.of(layer)) == (6 if capture else 0)
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_a_backward_that_leaves_the_weight_out_counts_nothing() -> None:
    """Of an adversarial example, or of another network that learns through this one."""
    module, rows = linear(), Rows()
    layer, x = Watched([module]), batch(7, 5).requires_grad_()
    rows.capture(layer)
    (direction,) = torch.autograd.grad(module(x).square().sum(), x)
    module(x).sum().backward(inputs=[x])
    assert not rows.calls
    adversarial = (x + direction.sign()).detach()
    module(adversarial).square().sum().backward()
    torch.testing.assert_close(rows.of(layer), adversarial)


def test_the_two_halves_of_a_zero_bubble_backward_count_once() -> None:
    module, rows = linear(), Rows()
    layer, x = Watched([module]), batch(7, 5).requires_grad_()
    rows.capture(layer)
    y = module(x)
    _, groups = stage_backward_input([y], [torch.ones_like(y)], [x], module.parameters())
    stage_backward_weight(module.parameters(), groups)
    torch.testing.assert_close(module.weight.grad, x.sum(0).expand(4, 5))
    torch.testing.assert_close(rows.of(layer), x)


def test_only_forwards_of_training_backwards_count() -> None:
    model, rows = nn.Sequential(linear(), nn.Tanh(), linear(4, 3)), Rows()
    layers = [Watched([model[0]]), Watched([model[2]])]
    rows.capture(*layers)
    with torch.no_grad():
        model(batch(2, 5))
    model(batch(3, 5))  # a graph that is never walked back
    model.eval()
    model(batch(4, 5)).sum().backward()
    model.train()
    model[0].weight.requires_grad_(False)
    model(batch(6, 5)).sum().backward()
    assert [len(rows.of(layer)) for layer in layers] == [0, 6]


def test_inactive_steps_put_nothing_into_the_graph() -> None:
    layer, rows = Watched([linear()]), Rows()
    capture = rows.capture(layer)
    capture.listen(False)
    module = layer.modules[0]
    assert type(module(batch(6, 5)).grad_fn) is type(F.linear(batch(6, 5), module.weight, module.bias).grad_fn)
    capture.listen(True)
    y = module(batch(6, 5))
    capture.listen(False)
    y.sum().backward()
    assert not rows.calls


def test_hooks_of_others_that_come_while_ours_are_off_stay() -> None:
    layer, rows, seen = Watched([linear()]), Rows(), []
    capture, module = rows.capture(layer), layer.modules[0]
    for wanted in (False, True):
        capture.listen(wanted)
        for _ in range(3):
            module.register_forward_hook(lambda *_: seen.append(0))
    module(batch(6, 5)).sum().backward()
    assert (len(rows.calls), len(seen)) == (1, 6)
    capture.listen(False)
    module(batch(6, 5))
    assert len(seen) == 12


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_what_follows_may_work_in_place(shape: tuple[int, ...]) -> None:
    gradients = []
    for inplace in (False, True):
        module = linear()
        Rows().capture(Watched([module]))
        y = module(batch(*shape))
        (y.mul_(3).relu_() if inplace else (y * 3).relu()).square().sum().backward()
        gradients.append(module.weight.grad)
    assert torch.equal(*gradients)


def test_an_output_that_autograd_needs_still_may_not_be_overwritten() -> None:
    class Squashed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).sigmoid()

    module = Squashed(5, 4)
    Rows().capture(Watched([module]))
    y = module(torch.randn(6, 5))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_input_overwritten_before_backward_is_refused() -> None:
    """Under autocast autograd keeps a cast copy and would not notice; a layer that computes its rows needs x itself."""
    module, rows = nn.Linear(4, 2), Rows()
    layer = Watched([module], rearranges=False)
    rows.capture(layer)
    x = torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        module(x).sum().backward()
        y = module(x)
    assert torch.equal(rows.of(layer), x)
    x.mul_(100)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_carry_inert_hooks() -> None:
    model = nn.ModuleDict({"fc": linear(4, 4), "mha": nn.MultiheadAttention(4, 2).double()})
    rows = Rows()
    rows.capture(Watched([model["fc"]]), Watched([model["mha"]], functional=True, attribute="out_proj.weight"))
    twin = copy.deepcopy(model)
    x = batch(3, 2, 4)
    twin["mha"](x, x, twin["fc"](x))[0].sum().backward()
    assert not rows.calls
    assert not torch.overrides._get_current_function_mode_stack()


def test_keyword_calls_tied_modules_and_removal() -> None:
    first, second = linear(5, 5), linear(5, 5)
    second.weight = first.weight
    layer, rows = Watched([first, second]), Rows()
    capture = rows.capture(layer)
    h = first(input=batch(6, 5))
    second(h).sum().backward()
    assert torch.equal(rows.of(layer), torch.cat([h, batch(6, 5)]))
    y = first(batch(6, 5))
    capture.remove()
    y.sum().backward()
    assert len(rows.of(layer)) == 12
    assert not first._forward_hooks
    assert not second._forward_hooks


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


def test_of_keywords_the_first_tensor_is_the_input() -> None:
    module, rows = Scaled(5, 4).double(), Rows()
    layer = Linear("fc", module, conv="channel", bias=False)
    rows.capture(layer)
    module(scale=2.0, x=batch(6, 5)).sum().backward()
    assert torch.equal(rows.of(layer), batch(6, 5))


class Result(NamedTuple):
    y: Tensor
    extra: int


@pytest.mark.parametrize(
    ("wrap", "said"),
    [(lambda y: {"y": y}, "a dict"), (lambda y: [y], "a list"), (lambda y: (None, y), "no tensor"), (tuple, None)],
)
def test_an_output_that_is_no_tensor_is_refused_by_name(wrap: Callable, said: str | None) -> None:
    class Wraps(nn.Linear):
        def forward(self, input: Tensor) -> object:
            return wrap(super().forward(input))

    module, rows = Wraps(5, 4).double(), Rows()
    layer = Linear("block.fc", module, conv="channel", bias=False)
    rows.capture(layer)
    if said is None:  # of a tuple the first output is tapped
        module(batch(1, 5))[0].sum().backward()
        assert torch.equal(rows.of(layer), batch(1, 5))
        return
    message = f"^block.fc.weight: rows cannot be taken from a call with a tensor that returns {said}; exclude"
    with pytest.raises(TypeError, match=message):
        module(batch(6, 5))
    module.eval()
    module(batch(6, 5))


def test_named_outputs_keep_their_names() -> None:
    class Names(nn.Linear):
        def forward(self, input: Tensor) -> Result:
            return Result(super().forward(input), 3)

    module, rows = Names(5, 4).double(), Rows()
    layer = Watched([module])
    rows.capture(layer)
    result = module(batch(6, 5))
    result.y.sum().backward()
    assert result.extra == 3
    assert torch.equal(rows.of(layer), batch(6, 5))


def test_an_input_that_is_no_plain_tensor_is_refused_by_name() -> None:
    scaled, plain, rows = Scaled(4, 2), nn.Linear(4, 2), Rows()
    rows.capture(Watched([plain], "fc.weight"), Linear("s", scaled, conv="channel", bias=False))
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^fc\.weight: rows cannot be taken from a call with a nested tensor"):
        plain(nested)
    scaled.forward = lambda scale, x: F.linear(x, scaled.weight) * scale  # type: ignore[method-assign,misc,assignment]
    with pytest.raises(TypeError, match=r"^s\.weight: rows cannot be taken from a call with a float that"):
        scaled(2.0, torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [partial(nn.Linear, 4, 2), partial(nn.MultiheadAttention, 4, 2)])
def test_scripting_a_hooked_model_is_refused_with_the_way_out(make: Callable[[], nn.Module]) -> None:
    module = make()
    ap = ActivationPreconditioner(module)
    twin, afresh = copy.deepcopy(module), make()
    with pytest.raises(AttributeError, match=r"compiles no model with a preconditioner: call its remove\(\) first"):
        torch.jit.script(module)
    ap.remove()
    torch.jit.script(module)
    with pytest.raises(AttributeError, match=r"no copy of .*: load the copy's state_dict into a model made afresh"):
        torch.jit.script(twin)
    afresh.load_state_dict(twin.state_dict())
    torch.jit.script(afresh)


def test_the_sink_runs_without_autocast_and_gradients() -> None:
    seen = []
    module = nn.Linear(4, 2)

    def sink(layer: Watched, x: Tensor, mask: Tensor | None, lasts: bool) -> None:
        seen.append((x.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    Capture([Watched([module])], sink)  # type: ignore[list-item, arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(3, 4)).sum().backward(create_graph=True)
    assert seen == [(torch.bfloat16, False, False)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_mask_is_that_of_the_forward(checkpointed: bool) -> None:
    module, rows = linear(), Rows()
    capture = rows.capture(Watched([module]))
    mask = torch.tensor([True, False, True])
    x = batch(3, 5).requires_grad_()
    with capture.mask(mask):
        y = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
    (y.sum() + module(x).sum()).backward()
    assert [m is mask for _, _, m in rows.calls] == [False, True]
    assert rows.calls[0][2] is None


def test_functional_transforms_are_left_alone() -> None:
    module, rows = linear(), Rows()
    rows.capture(Watched([module]))
    parameters = dict(module.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(module, p, batch(3, 5)).sum())(parameters)
    assert torch.equal(gradient["weight"], batch(3, 5).sum(0).expand(4, 5))
    assert not rows.calls


def directional(model: nn.Module, x: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """The model's output, and its derivative by forward-mode differentiation."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, along)))


@pytest.mark.parametrize("detached", [True, False])
def test_forward_mode_gives_what_it_did_and_the_rows_count(detached: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, x, along = nn.Sequential(linear(), nn.Tanh(), linear(4, 3)), batch(6, 5), batch(6, 5, seed=1)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        y, slope = directional(model, x, along)
        (y - (slope.detach() if detached else slope)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    ap = ActivationPreconditioner(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    ap.step()
    assert [row.rows for row in ap.summary() if row.covered] == [6, 6]
    assert not caplog.records


@pytest.mark.parametrize(
    "derivative",
    [
        lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
        lambda model, x: torch.func.jacfwd(model)(x),
        lambda model, x: torch.autograd.functional.jvp(model, x, x)[1],
        lambda model, x: torch.autograd.functional.jacobian(model, x, strategy="forward-mode", vectorize=True),
        lambda model, x: torch.autograd.functional.jacobian(model, x, vectorize=True),
        lambda model, x: torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x, vectorize=True),
        lambda model, x: torch.autograd.functional.hessian(
            lambda x: model(x).square().sum(), x, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ],
)
def test_derivatives_of_a_hooked_model_are_what_they_were(derivative: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = nn.Sequential(linear(), nn.Tanh(), linear(4, 3)), batch(2, 5)
    expected = derivative(model, x)
    ActivationPreconditioner(model)
    torch.testing.assert_close(derivative(model, x), expected)


def attention_layers(module: nn.MultiheadAttention) -> list[Watched]:
    projections = [Watched([module], position=i, attribute="in_proj_weight") for i in range(3)]
    return [*projections, Watched([module], functional=True, attribute="out_proj.weight")]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_captures_its_inputs_and_what_its_output_projection_multiplies(
    need_weights: bool, batch_first: bool, batched: bool
) -> None:
    torch.manual_seed(0)
    module, rows = nn.MultiheadAttention(4, 2, batch_first=batch_first).double(), Rows()
    plain = copy.deepcopy(module)
    layers = attention_layers(module)
    rows.capture(*layers)
    q, k, v = (batch(*((2, 3, 4) if batched else (3, 4)), seed=i) for i in range(3))
    mask = torch.ones(3, 3).triu(1).bool() if batch_first or not batched else None
    out, _ = module(q, k, value=v, need_weights=need_weights, attn_mask=mask)
    expected, _ = plain(q, k, value=v, need_weights=need_weights, attn_mask=mask)
    assert torch.equal(out, expected)
    upstream = batch(*out.shape, seed=4)
    (out.mul_(2) * upstream).sum().backward()  # in place: the output is a view
    (expected * 2 * upstream).sum().backward()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for layer, x in zip(layers[:3], (q, k, v), strict=True):
        assert torch.equal(rows.of(layer), x.reshape(-1, 4))
    # The output projection is linear: its gradient is that of y = W z, so its rows must give it back.
    z = rows.of(layers[3]).reshape(3, -1, 4)
    g = (2 * upstream).transpose(0, 1) if batch_first and batched else 2 * upstream
    torch.testing.assert_close(torch.einsum("tbo,tbi->oi", g.reshape(3, -1, 4), z), module.out_proj.weight.grad)


def test_attention_survives_exceptions_and_keeps_its_fast_path() -> None:
    module, rows = nn.MultiheadAttention(4, 2, batch_first=True), Rows()
    rows.capture(*attention_layers(module))
    x = torch.randn(2, 3, 4)
    with pytest.raises(AssertionError):
        module(x, x[..., :3], x)
    assert not torch.overrides._get_current_function_mode_stack()
    module.eval()
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x, x, x)
    assert "aten::_native_multi_head_attention" in {event.name for event in profile.events()}
    assert not rows.calls


class Interrupted(nn.MultiheadAttention):
    """Ctrl-C may come anywhere in a forward."""

    interrupt = True

    def forward(self, *args: Tensor, **kwargs: bool) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        output = super().forward(*args, **kwargs)
        if self.interrupt:
            raise KeyboardInterrupt
        return output


@pytest.mark.parametrize("then", ["a forward", "a step", "remove"])
def test_an_interrupted_attention_leaves_nothing_on(then: str) -> None:
    """In a notebook Ctrl-C is no end: what comes next is taken for what it is, and other modes stay."""
    torch.manual_seed(0)
    model = Interrupted(4, 2, batch_first=True)
    plain = copy.deepcopy(model)
    x, modes = torch.randn(2, 3, 4), torch.overrides._get_current_function_mode_stack
    ap, reference = (ActivationPreconditioner(each, solver="exact", update_every=2) for each in (model, plain))
    outside = torch.device("cpu")
    with outside:
        before = modes()
        with pytest.raises(KeyboardInterrupt):
            model(x, x, x)
        assert len(modes()) == len(before) + 1  # else this test is of nothing
        if then == "remove":
            ap.remove()
        elif then == "a step":
            ap.discard()
            ap.step()
        else:
            model.interrupt = plain.interrupt = False
            for each, its in ((model, ap), (plain, reference)):
                each(x, x, x)[0].square().sum().backward()
                its.step()
            assert torch.equal(model.out_proj.weight.grad, plain.out_proj.weight.grad)
            rows = {row.parameter: row.rows for row in ap.summary() if row.covered}
            assert rows["out_proj.weight"] == 6
        assert modes() == before


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_encoders_evaluate_to_what_they_did(layers: int, padded: bool, context: Callable) -> None:
    """On torch's fast path or off it, where hooks keep a layer; a stack has nested padded inputs for it by then."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
    model = (nn.TransformerEncoder(layer, layers) if layers else layer).eval()
    plain, x = copy.deepcopy(model), batch(3, 5, 4)
    ActivationPreconditioner(model)
    padding = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None] if padded else None
    with context():
        found, expected = (m(x, src_key_padding_mask=padding) for m in (model, plain))
    torch.testing.assert_close(found, expected)


# -- audit --------------------------------------------------------------------------------------------------------


def audited(step: Callable[[], None], *layers: Watched, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The names that one step of the audit warns of; every layer must have been judged."""
    audit = GradientAudit(layers)  # type: ignore[arg-type]
    capture = Rows().capture(*layers, audit=audit)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        step()
        audit.report()
    capture.remove()
    assert not audit._probes
    assert all(not layer.weight._backward_hooks for layer in layers)
    return [record.getMessage().split(":")[0] for record in caplog.records]


def convolution(**options: object) -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(6, 4, 3, **options), torch.randn(2, 6, 9, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(8, 5), torch.randn(3, 7, 8)),
        lambda: (nn.Linear(8, 1), torch.randn(7, 8)),
        lambda: (nn.Linear(8, 5).bfloat16(), torch.randn(90, 8).bfloat16()),
        lambda: (nn.Embedding(9, 4, padding_idx=2), torch.randint(9, (3, 7))),
        lambda: (nn.Embedding(9, 4, sparse=True), torch.randint(9, (3, 7))),
        lambda: (nn.Conv1d(6, 4, 3), torch.randn(6, 9)),
        lambda: convolution(),
        lambda: convolution(groups=2, stride=2, padding=1),
        lambda: convolution(dilation=2, padding="same", padding_mode="circular"),
    ],
)
def test_a_layers_rows_explain_its_gradient(
    make: Callable[[], tuple[nn.Module, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module, x = make()
    layer = Watched([module], name="layer")
    assert audited(lambda: module(x).square().sum().backward(), layer, caplog=caplog) == []

    def with_another_use() -> None:
        (module(x).square().sum() + 10 * (module.weight * torch.randn_like(module.weight)).sum()).backward()

    assert audited(with_another_use, layer, caplog=caplog) == ["layer"]


def test_a_tied_output_layer_is_found(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    embedding, tokens = nn.Embedding(11, 6), torch.randint(11, (4, 9))

    def step() -> None:
        logits = F.linear(embedding(tokens), embedding.weight)
        F.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten()).backward()

    assert audited(step, Watched([embedding], name="embedding.weight"), caplog=caplog) == ["embedding.weight"]


def test_subclasses_that_compute_something_else_are_found(caplog: pytest.LogCaptureFixture) -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)

    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.square())

    class Scaled(nn.Linear):  # muP's readout
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(0.1 * input)

    torch.manual_seed(0)
    image, x = torch.randn(2, 6, 9, 8) + 1, torch.randn(20, 5)

    def warnings(module: nn.Module, x: Tensor) -> list[str]:
        return audited(lambda: module(x).square().sum().backward(), Watched([module], name="layer"), caplog=caplog)

    assert warnings(Standardised(6, 4, 3), image) == ["layer"]
    assert warnings(Squared(5, 4), x) == ["layer"]
    assert warnings(Scaled(5, 4), x) == []


class Causal(nn.Conv1d):
    """As in streaming audio and video models, and timm's Conv2dSame."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (2, 0)))


class Cropped(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., :-2]


@pytest.mark.parametrize("module", [Causal(4, 5, 3), Cropped(4, 5, 3, padding=2), Causal(4, 5, 9)])
def test_a_convolution_that_pads_or_crops_by_itself_has_its_channels_covariance(
    module: nn.Conv1d, caplog: pytest.LogCaptureFixture
) -> None:
    module, x = module.double(), torch.randn(3, 4, 7, dtype=torch.double)
    ap = ActivationPreconditioner(module, solver="exact")
    module(x).square().sum().backward()
    gradient = module.weight.grad.clone()
    ap.step()
    covariance = torch.einsum("bcp,bdp->cd", x, x) / 21
    inverse = torch.linalg.inv(covariance + 0.01 * covariance.trace() * torch.eye(4))
    torch.testing.assert_close(module.weight.grad, torch.einsum("ock,cd->odk", gradient, inverse))
    assert not caplog.records
    ap.remove()
    for max_dim in (None, 7):
        refusing = ActivationPreconditioner(module, conv="patch", max_dim=max_dim)
        with pytest.raises(
            TypeError, match=r"^weight: rows cannot be taken from a call with a tensor of shape \(3, 4, 7\)"
        ):
            module(x).sum().backward()
        refusing.remove()


def test_a_subclass_whose_input_is_not_what_its_weight_multiplies_is_refused_by_name() -> None:
    class Last(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input[:, -1])

    class Both(nn.Linear):
        def forward(self, input: Tensor, other: Tensor) -> Tensor:
            return super().forward(torch.cat([input, other], -1))

    class Coordinates(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            place = torch.linspace(0, 1, input.shape[-1]).expand(len(input), 1, -1)
            return super().forward(torch.cat([input, place], 1))

    class Positions(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(torch.arange(input.shape[1]))

    def refused(module: nn.Module, *inputs: Tensor) -> None:
        ap = ActivationPreconditioner(nn.ModuleDict({"layer": module}))
        with pytest.raises(
            TypeError, match=r"^layer\.weight: rows cannot be taken from .*; exclude the module, or cover"
        ):
            module(*inputs).sum().backward()
        ap.remove()

    x = torch.randn(2, 4, 8)
    refused(Last(8, 3), x)
    refused(Both(16, 3), x, x)
    refused(Coordinates(5, 3, 3), x)
    refused(Positions(4, 3), x)
    refused(Positions(4, 3), torch.full((2, 4), 7))


def test_an_embedding_may_see_no_token_at_first() -> None:
    module = nn.Embedding(5, 3)
    ap = ActivationPreconditioner(module)
    module(torch.zeros(2, 0, dtype=torch.long)).sum().backward()
    module(torch.tensor([[1, 4]])).square().sum().backward()
    ap.step()


def test_a_subclass_that_returns_its_rows_in_another_shape_is_let_be(caplog: pytest.LogCaptureFixture) -> None:
    class Heads(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).unflatten(-1, (2, -1)).mT

    class Chunks(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            return super().forward(input).chunk(2, -1)

    class Transposed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).mT

    class Squeezed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).squeeze()

    x = torch.randn(3, 7, 8)
    heads, chunks, transposed, squeezed = Heads(8, 6), Chunks(8, 6), Transposed(8, 6), Squeezed(8, 1)
    assert audited(lambda: transposed(x).square().sum().backward(), Watched([transposed]), caplog=caplog) == []
    assert audited(lambda: squeezed(x[:1, 0]).square().sum().backward(), Watched([squeezed]), caplog=caplog) == []
    assert audited(lambda: heads(x).square().sum().backward(), Watched([heads]), caplog=caplog) == []
    assert audited(lambda: torch.cat(chunks(x)).square().sum().backward(), Watched([chunks]), caplog=caplog) == []


def shared_and_checkpointed(layer: nn.Module, x: Tensor, reentrant: bool) -> None:
    h = checkpoint(layer, checkpoint(layer, x, use_reentrant=reentrant).tanh(), use_reentrant=reentrant)
    layer(h).square().sum().backward()


def accumulated(layer: nn.Module, x: Tensor) -> None:
    first, second = layer(layer(x)).sum(), layer(-x[:5]).square().sum()
    first.backward()
    second.backward()


def retained(layer: nn.Module, x: Tensor) -> None:
    h = layer(x)
    loss = layer(h).square().sum()
    torch.autograd.grad(h.sum(), layer.weight, retain_graph=True)
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()


def mixed_precision(layer: nn.Module, x: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.mse_loss(F.dropout(layer(F.dropout(x + 3))), x)
    scaler.scale(loss).backward()


@pytest.mark.parametrize(
    "step",
    [
        lambda layer, x: shared_and_checkpointed(layer, x, True),
        lambda layer, x: shared_and_checkpointed(layer, x, False),
        accumulated,
        retained,
        mixed_precision,
    ],
)
def test_no_false_alarm(step: Callable[[nn.Module, Tensor], None], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(16, 16), torch.randn(64, 16).requires_grad_()
    assert audited(lambda: step(module, x), Watched([module]), caplog=caplog) == []


def test_what_cannot_be_judged_is_looked_at_again(caplog: pytest.LogCaptureFixture) -> None:
    module, x = nn.Linear(5, 4), torch.randn(7, 5)
    layer = Watched([module], name="layer")
    audit = GradientAudit([layer])  # type: ignore[list-item]
    Rows().capture(layer, audit=audit)
    (module(x).square().sum() * torch.inf).backward()  # a step that GradScaler would skip
    F.linear(x, module.weight).sum().backward()  # never captured: noticed by the preconditioner
    audit.report()
    assert not caplog.records
    (module(x).square().sum() + F.linear(x.square(), module.weight).square().sum()).backward()
    audit.report()
    audit.report()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("trained", [True, False])
def test_a_weight_that_was_replaced_is_looked_at_all_the_same(trained: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.square())

    model = nn.Sequential(linear(), Squared(4, 3).double())
    ap = ActivationPreconditioner(model)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model[1].requires_grad_(trained)
    for _ in range(2):
        model(batch(6, 5)).square().sum().backward()
        ap.step()
    assert not ap._audit._probes
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["1.weight"] * trained


def test_a_weight_behind_a_parametrization_is_not_audited() -> None:
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    layer = Watched([module], attribute="parametrizations.weight.original1")
    assert not GradientAudit([layer])._probes  # type: ignore[list-item]


@pytest.mark.parametrize("module", [nn.Linear(5, 4).double(), nn.Embedding(5, 4).double(), nn.Conv1d(5, 4, 1).double()])
def test_many_backwards_in_one_are_left_to_the_next(module: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.arange(5) if isinstance(module, nn.Embedding) else batch(5, 5)

    def jacobian() -> Tensor:
        y = module(x)
        basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        return torch.autograd.grad(y, module.weight, basis, is_grads_batched=True)[0]

    expected = jacobian()
    ap = ActivationPreconditioner(module)
    torch.testing.assert_close(jacobian(), expected)
    ap.discard()
    assert ap._audit._probes
    module(x).square().sum().backward()
    ap.step()
    assert not ap._audit._probes
    assert not caplog.records


def test_a_gradient_penalty_ends_the_audit_of_its_layers(caplog: pytest.LogCaptureFixture) -> None:
    module, x = nn.Linear(5, 4), torch.randn(7, 5).requires_grad_()

    def step() -> None:
        y = module(x)
        (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        (y.square().sum() + slope.square().sum()).backward()

    assert audited(step, Watched([module]), caplog=caplog) == []
