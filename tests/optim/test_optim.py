"""One composite Optimizer: equal to its parts run separately, whole in checkpoints, at home with schedulers."""

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import weight_norm

from dopr_lightning import MupSpec
from dopr_lightning.optim import CompositeOptimizer, configure_optimizers, make_optimizer, parameter_roles
from dopr_lightning.optim.muon import Muon
from dopr_lightning.optim.schedules import make_scheduler


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 8)
        self.input = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.readout = nn.Linear(8, 2)

    def forward(self, token: Tensor) -> Tensor:
        h = torch.tanh(self.input(self.embedding(token)))
        h = torch.tanh(self.conv(h.mT).mT)
        return self.readout(self.norm(torch.tanh(self.hidden(h))))


NO_DECAY = {"weight_decay": 0.0}

TOKENS = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, scheduler: object = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


class Eager(torch.optim.SGD):
    """Makes its state in the constructor, as Adagrad did for years."""

    def __init__(self, params: object, lr: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["steps"] = 0

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["steps"] += 1
        super().step()


def test_state_of_a_constructor_is_kept() -> None:
    net = Net()
    optimizer = make_optimizer(net, Eager, lr=0.1)
    train(net, optimizer, 2)
    assert {state["steps"] for state in optimizer.state.values()} == {2}


def test_roles_are_read_off_the_model() -> None:
    assert parameter_roles(Net()) == {
        "embedding.weight": "embedding",
        "input.weight": "hidden",
        "input.bias": "vector",
        "conv.weight": "hidden",
        "conv.bias": "vector",
        "hidden.weight": "hidden",
        "hidden.bias": "vector",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "readout.weight": "readout",
        "readout.bias": "vector",
    }


def test_without_an_embedding_the_first_matrix_is_the_input() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    assert list(parameter_roles(model).values()) == ["input", "hidden", "readout"]


def test_an_embedding_behind_the_first_matrix_is_no_input() -> None:
    """As that of positions is not, behind the convolution that cuts an image into patches."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1, bias=False), nn.Embedding(5, 4), nn.Linear(4, 4, bias=False))
    model.append(nn.Linear(4, 2, bias=False))
    assert list(parameter_roles(model).values()) == ["input", "embedding", "hidden", "readout"]


class Tokens(nn.Module):
    """Beside layers, what none of them owns: of a module that has some, and of one that only holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.position = nn.Parameter(torch.zeros(1, 9, 4))
        self.patch = nn.Conv2d(3, 4, 2)
        self.adapter = nn.Parameter(torch.zeros(4, 2))
        self.query = nn.ParameterList([nn.Parameter(torch.zeros(1, 4))])
        self.own = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(4, 4))})  # a linear layer, it may be
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 1)
        self.last = nn.Parameter(torch.zeros(1, 4))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, checkpoint_wrapper], ids=["as is", "c", "cw"])
def test_what_no_layer_owns_is_an_embedding_and_no_end(wrap: Callable[[nn.Module], nn.Module]) -> None:
    roles = {name.replace("_orig_mod.", ""): role for name, role in parameter_roles(wrap(Tokens())).items()}
    assert {name: role for name, role in roles.items() if role != "vector"} == {
        "token": "embedding",
        "position": "embedding",
        "patch.weight": "input",
        "adapter": "hidden",
        "query.0": "embedding",
        "own.weight": "hidden",
        "attention.in_proj_weight": "hidden",
        "attention.out_proj.weight": "hidden",
        "recurrent.weight_ih": "hidden",
        "recurrent.weight_hh": "hidden",
        "head.weight": "readout",
        "last": "embedding",
    }


@pytest.mark.parametrize("norm", [lambda layer: layer, weight_norm], ids=["plain", "weight_norm"])
def test_depthwise_kernels_are_inputs_with_muP_and_without(norm: Callable[[nn.Module], nn.Module]) -> None:  # noqa: N802
    def build(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(3, width, 1),
            norm(nn.Conv1d(width, 2 * width, 3, groups=width)),
            norm(nn.ConvTranspose1d(2 * width, 2 * width, 3, groups=2 * width)),
            nn.Conv1d(2 * width, width, 1),
            nn.Conv1d(width, 2, 1),
        )

    model = build(16)
    roles = parameter_roles(model)
    assert [role for role in roles.values() if role != "vector"][-2:] == ["hidden", "readout"]
    assert {role for name, role in roles.items() if name[0] in "12"} == {"input", "vector"}
    assert parameter_roles(model, known=MupSpec.from_factory(build, width=8).roles(model)) == roles


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, nn.utils.weight_norm], ids=["new", "old"])
def test_magnitudes_of_weight_norm_are_vectors_with_muP_and_without(norm: Callable[[nn.Module], nn.Module]) -> None:  # noqa: N802
    def build(width: int) -> nn.Module:
        layers = [norm(nn.Conv1d(3, width, 1)), norm(nn.Conv1d(width, width, 3)), nn.GRUCell(width, width)]
        return nn.Sequential(*layers[:2], norm(layers[2], "weight_hh"), nn.Linear(width, 2))

    model = build(16)
    roles = parameter_roles(model)
    by_shape = {tuple(model.get_parameter(name).shape): role for name, role in roles.items()}
    assert by_shape == {
        (16,): "vector",
        (16, 1, 1): "vector",
        (16, 3, 1): "input",  # by order of registration
        (16, 16, 3): "hidden",
        (48,): "vector",
        (48, 1): "vector",
        (48, 16): "hidden",
        (2, 16): "readout",
        (2,): "vector",
    }
    assert parameter_roles(model, known=MupSpec.from_factory(build, width=8).roles(model)) == roles
    optimizer = make_optimizer(model, "muon", lr=0.1, weight_decay=0.1)
    assert {g["weight_decay"] for g in optimizer.param_groups for p in g["params"] if p.shape[1:].numel() == 1} == {0.0}


def test_norms_over_several_dimensions_are_vectors_with_muP_and_without() -> None:  # noqa: N802
    """No matrices for Muon, nor for weight decay."""

    def build(width: int) -> nn.Module:
        norms = nn.LayerNorm([width, 8]), nn.RMSNorm([width, 8])
        return nn.Sequential(nn.Conv1d(3, width, 1), *norms, nn.Conv1d(width, width, 1), nn.Conv1d(width, 2, 1))

    model = build(16)
    roles = parameter_roles(model)
    assert {role for name, role in roles.items() if name[0] in "12"} == {"vector"}
    told = dict.fromkeys(("1.weight", "1.bias", "2.weight"), "embedding")
    assert parameter_roles(model, known=MupSpec.from_factory(build, width=8, roles=told).roles(model)) == roles


def test_an_attentions_own_key_and_value_are_embeddings_with_muP_and_without() -> None:  # noqa: N802
    """And no end of the network."""

    def build(width: int) -> nn.Module:
        attention = nn.MultiheadAttention(width, width // 4, kdim=width, add_bias_kv=True)
        return nn.ModuleList([attention, nn.Linear(width, width), nn.Linear(width, 2)])

    model = build(16)
    roles = parameter_roles(model)
    assert roles["0.bias_k"] == roles["0.bias_v"] == "embedding"
    spec = MupSpec.from_factory(build, width=8)
    assert {name: roles[name] for name in ("0.bias_k", "0.bias_v")}.items() <= spec.roles(model).items()


@pytest.mark.parametrize("first", ["head", "embedding"])
def test_a_readout_tied_to_an_embedding_is_one_and_the_last_matrix_is_hidden(first: str) -> None:
    tied = {"embedding": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)}
    tied["head"].weight = tied["embedding"].weight
    model = nn.ModuleDict({first: tied.pop(first)} | {str(k): nn.Linear(8, 8) for k in range(3)} | tied)
    roles = {role for name, role in parameter_roles(model).items() if name == f"{first}.weight"}
    assert roles == {"embedding"}
    assert [role for role in parameter_roles(model).values() if role != "vector"] == ["embedding"] + 3 * ["hidden"]


@pytest.mark.parametrize("pattern", ["1.weight", "1._orig_mod.weight"])
def test_a_glob_need_not_know_what_is_compiled(pattern: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.compile(nn.Linear(8, 8)), nn.Linear(8, 8))
    assert parameter_roles(model, {pattern: "condition"})["1._orig_mod.weight"] == "condition"


def test_scales_of_channels_are_vectors() -> None:
    """As those of ConvNeXt: no matrices for Muon, nor for weight decay."""
    model = nn.ModuleDict({"in": nn.Conv2d(3, 4, 1), "hidden": nn.Conv2d(4, 4, 1), "out": nn.Conv2d(4, 2, 1)})
    model.scale = nn.Parameter(torch.ones(4, 1, 1))
    assert parameter_roles(model)["scale"] == "vector"


def test_what_is_guessed_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Where something hangs on it and nobody has told: two networks in one have an end each in the middle."""
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for name in ("actor", "critic")})
    own = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    own.parameter_roles = lambda: {"1.weight": "readout"}
    told = {"actor.1.weight": "readout", "critic.0.weight": "input"}
    with caplog.at_level(logging.INFO, "lightning"):
        configure_optimizers(model, "adamw", lr=0.1)
        configure_optimizers(own, "muon", lr=0.1)
        configure_optimizers(model, "muon", lr=0.1, roles=told)
        assert caplog.messages == []
        configure_optimizers(model, "muon", lr=0.1)
    (said,) = caplog.messages
    assert said.startswith(
        "roles by order of registration: actor.0.weight is the input and critic.1.weight is the readout. If"
    )
    assert said.endswith('roles={"actor.0.weight": "input", "critic.1.weight": "readout"}')
    assert list(parameter_roles(model, told).values())[::2] == ["input", "readout"] * 2


def test_roles_declared_by_a_submodule_and_overrides_win() -> None:
    net = Net()
    net.parameter_roles = lambda: {"conv.weight": "input"}
    roles = parameter_roles(nn.ModuleDict({"policy": net}), {"policy.hidden.*": "readout"})
    assert (roles["policy.conv.weight"], roles["policy.input.weight"]) == ("input", "hidden")
    assert (roles["policy.hidden.weight"], roles["policy.readout.weight"]) == ("readout", "hidden")


def test_a_glob_over_layers_leaves_their_vectors_alone() -> None:
    overrides = {"*": "condition", "hidden.*": "hidden", "norm.*": "input", "readout.bias": "readout"}
    assert parameter_roles(Net(), overrides) == {
        "embedding.weight": "condition",
        "input.weight": "condition",
        "input.bias": "vector",
        "conv.weight": "condition",
        "conv.bias": "vector",
        "hidden.weight": "hidden",
        "hidden.bias": "vector",
        "norm.weight": "input",  # where nothing else is meant
        "norm.bias": "input",
        "readout.weight": "condition",
        "readout.bias": "readout",
    }
    for group in make_optimizer(Net(), "muon", lr=0.1, weight_decay=0.1, roles={"hidden.*": "hidden"}).param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_declared_roles_hold_behind_what_wraps_a_part_or_the_whole(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = Net()
    net.parameter_roles = lambda: {"hidden.weight": "condition"}
    plain = parameter_roles(net)
    net.hidden = wrap(net.hidden)
    assert list(parameter_roles(net).values()) == list(plain.values())
    assert list(parameter_roles(wrap(net)).values()) == list(plain.values())


def test_shapes_say_hidden_of_what_is_declared_a_condition() -> None:
    net = Net()
    net.parameter_roles = lambda: {"conv.weight": "condition", "hidden.weight": "condition"}
    roles = parameter_roles(net, known={"conv.weight": "hidden", "hidden.weight": "readout", "input.weight": "fixed"})
    assert (roles["conv.weight"], roles["hidden.weight"], roles["input.weight"]) == ("condition", "readout", "hidden")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"hiden.*": "hidden"}, "matches no trainable parameter"), ({"hidden.*": "matrix"}, "unknown role 'matrix'")],
)
def test_bad_role_overrides(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_roles(Net(), overrides)


def test_composite_equals_its_parts_run_separately() -> None:
    together, apart = Net(), Net()
    optimizer = make_optimizer(together, "muon", lr=0.01, weight_decay=0.1)
    hidden = [apart.input.weight, apart.conv.weight, apart.hidden.weight]
    decayed = [apart.embedding.weight, apart.readout.weight]
    vectors = [p for p in apart.parameters() if p.dim() < 2]
    parts = [
        Muon(hidden, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(decayed, lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.0),
    ]
    for _ in range(3):
        train(together, optimizer, 1)
        for part in parts:
            part.zero_grad()
        apart(TOKENS).square().sum().backward()
        for part in parts:
            part.step()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_muon_on_a_convolution_is_torchs_muon_on_the_flattened_kernel() -> None:
    torch.manual_seed(0)
    kernel, gradient = torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    conv, matrix = nn.Parameter(kernel.clone()), nn.Parameter(kernel.flatten(1).clone())
    for parameter, optimizer in ((conv, Muon([conv], lr=0.1)), (matrix, torch.optim.Muon([matrix], lr=0.1))):
        for scale in (1.0, -0.5):
            parameter.grad = (scale * gradient).reshape(parameter.shape)
            optimizer.step()
    torch.testing.assert_close(conv.flatten(1), matrix, rtol=0, atol=2e-3)  # torch computes in bfloat16
    assert not torch.equal(conv, kernel)


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices, not a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("base", ["adamw", "muon", "sgd", torch.optim.NAdam])
def test_resume_is_bit_identical(base: str | type[torch.optim.Optimizer]) -> None:
    def start() -> tuple[Net, torch.optim.Optimizer, object]:
        model = Net()
        optimizer = make_optimizer(model, base, lr=0.01, weight_decay=0.1)
        return model, optimizer, make_scheduler(optimizer, "cosine", 2, 8)

    whole, optimizer, scheduler = start()
    train(whole, optimizer, 3, scheduler)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    train(whole, optimizer, 4, scheduler)

    resumed, optimizer, scheduler = start()
    for target, state in zip((resumed, optimizer, scheduler), saved, strict=True):
        target.load_state_dict(state)
    train(resumed, optimizer, 4, scheduler)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_roles_is_refused() -> None:
    """As of a run from before there were conditions, which Muon then took."""
    before, now = (make_optimizer(Net(), "muon", lr=0.01, roles=roles) for roles in (None, {"conv.*t": "condition"}))
    with pytest.raises(
        ValueError, match=r"has groups of \[3, 2, 6\] parameters, this one's of \[2, 3, 6\]; .* the roles"
    ):
        now.load_state_dict(before.state_dict())


def test_every_trainable_parameter_is_in_exactly_one_group_and_vectors_are_not_decayed() -> None:
    model = Net()
    model.hidden.weight.requires_grad_(False)
    optimizer = make_optimizer(model, "muon", lr=0.01, weight_decay=0.1)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == sum(p.requires_grad for p in model.parameters())
    assert all((p.dim() >= 2) == (g["weight_decay"] > 0) for g in optimizer.param_groups for p in g["params"])


def test_cosine_with_warm_up_keeps_the_ratio_of_the_groups_rates() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)])
    scheduler = make_scheduler(optimizer, "cosine", 4, 12)
    seen = []
    for _ in range(13):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [0.2, 0.4, 0.6, 0.8] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert [a for a, _ in seen] == pytest.approx(expected)
    assert [b for _, b in seen] == pytest.approx([0.1 * e for e in expected])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 0, 10), "unknown schedule 'linear'; choose from constant, cosine"),
        (("cosine", 10, 10), "needs a finite number of steps beyond its 10 warm-up steps"),
        (("cosine", 0, math.inf), r"set Trainer\(max_steps=\.\.\.\)"),
        (("constant", -1, 10), "must not be negative"),
        (("constant", 0.1, 10), r"warmup_steps must be a whole number of steps, got 0\.1"),
        (("cosine", None, 10), "warmup_steps must be a whole number of steps, got None"),
        (("cosine", 0, "10"), "total_steps must be a number of steps, got '10'"),
    ],
)
def test_bad_schedules(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), *arguments)


def test_a_constant_rate_is_left_to_whoever_sets_it() -> None:
    """Lightning's finder of rates, say: a scheduler would set it back after a step."""
    assert isinstance(configure_optimizers(Net(), lr=0.1), CompositeOptimizer)


@pytest.mark.parametrize(
    "callback",
    [
        GradientAccumulationScheduler({0: 8}),
        BatchSizeFinder(),
        pytorch_lightning.callbacks.GradientAccumulationScheduler({0: 8}),
    ],
)
def test_a_cosine_whose_end_a_callback_moves_is_refused(callback: Callback) -> None:
    model, options = Net(), {"lr": 0.1, "schedule": "cosine"}
    model._trainer = SimpleNamespace(
        max_epochs=4, callbacks=[callback], estimated_stepping_batches=8, fast_dev_run=False
    )
    with pytest.raises(ValueError, match=f"{type(callback).__name__} moves it; .* or total_steps"):
        configure_optimizers(model, **options)
    assert configure_optimizers(model, **options, total_steps=8)
    model._trainer.max_epochs = -1  # as it is in a fit of so many steps
    assert configure_optimizers(model, **options)


def test_gradual_unfreezing_is_pointed_out_before_it_ends_the_fit(caplog: pytest.LogCaptureFixture) -> None:
    class Gradual(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.backbone(x))

        def configure_optimizers(self) -> Any:
            return configure_optimizers(self, lr=0.1)

    def fit(*callbacks: Callback) -> None:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(max_epochs=2, limit_train_batches=1, accelerator="cpu", callbacks=[*callbacks], **quiet).fit(Gradual())

    with pytest.raises(TypeError, match=r"groups are fixed: .* in a new fit, or take an optimizer of torch's"):
        fit(BackboneFinetuning(unfreeze_backbone_at_epoch=1))
    (said,) = [message for message in caplog.messages if "unfreeze" in message]
    assert said.startswith("BackboneFinetuning may unfreeze layers in the middle of the fit, and add their group to")
    caplog.clear()
    fit()
    assert not any("unfreeze" in message for message in caplog.messages)


def test_a_fast_dev_run_may_be_shorter_than_the_warm_up() -> None:
    class Warm(BoringModel):
        def configure_optimizers(self) -> Any:
            return configure_optimizers(self, lr=0.1, schedule="cosine", warmup_steps=10)

    Trainer(fast_dev_run=2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False).fit(Warm())
    with pytest.raises(ValueError, match="beyond its 10 warm-up steps"):
        Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False).fit(Warm())


@pytest.mark.parametrize("module", [Net(), LightningModule()], ids=["a submodule", "outside a fit"])
def test_a_cosine_without_a_trainer_must_be_told_its_end(module: nn.Module) -> None:
    module.part = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=f"must know its end, and {type(module).__name__} has no Trainer.*total_steps"):
        configure_optimizers(module, lr=0.1, schedule="cosine")
    assert configure_optimizers(module, lr=0.1, schedule="cosine", total_steps=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "adam-w", "lr": 1.0}, "unknown base optimizer 'adam-w'; choose from adamw, muon, sgd"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"lr": "0.1"}, "lr must be positive and finite, got '0.1'"),
        ({"lr": 1.0, "weight_decay": -1.0}, r"weight_decay must be finite and not negative, got -1\.0"),
        ({"lr": 1.0, "weight_decay": None}, "weight_decay must be finite and not negative, got None"),
        ({"lr": 1.0, "weight_decay_rule": "both"}, "unknown weight decay rule 'both'; choose from independent, coup"),
        ({"lr": 1.0, "lr_by_role": {"hidden": "2"}}, "the multiplier of 'hidden' must be positive, got '2'"),
        ({"base": torch.optim.Rprop, "lr": 1.0, "weight_decay": 0.5}, r"Rprop has no weight decay, .*ignore .*=0\.5"),
        ({"base": torch.optim.LBFGS, "lr": 1.0}, "LBFGS evaluates the loss several times.*needs a closure"),
        ({"base": torch.optim.Muon, "lr": 1.0}, r"torch\.optim\.Muon takes matrices only; base='muon'"),
        ({"base": partial(torch.optim.AdamW, lr=1.0), "lr": 1.0}, "leave lr out of the partial AdamW"),
        ({"base": partial(torch.optim.AdamW, []), "lr": 1.0}, "give the partial AdamW its options by name"),
        ({"base": partial(torch.optim.AdamW, beta=0.9), "lr": 1.0}, "AdamW does not accept these options: .*'beta'"),
        ({"base": lambda params, **options: None, "lr": 1.0}, "unknown base optimizer <function"),
        ({"base": torch.optim.Adam([torch.zeros(1)]), "lr": 1.0}, "base must be the class Adam, not an optimizer"),
        ({"lr": 1.0, "beta": 0.9}, "AdamW does not accept these options: .*'beta'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(Net(), **options)


@pytest.mark.parametrize("model", [Net().parameters(), list(Net().parameters()), Net], ids=["iter", "list", "class"])
def test_parameters_in_place_of_a_model(model: object) -> None:
    """As torch's optimizers take them."""
    with pytest.raises(TypeError, match=rf"model must be a module.* got {type(model).__name__}; pass the model"):
        make_optimizer(model, lr=1.0)


@pytest.mark.parametrize("argument", ["roles", "lr_by_role"])
@pytest.mark.parametrize("value", [["readout"], "readout", 0.0, {0: "readout"}], ids=["list", "str", "number", "keys"])
def test_what_should_map_and_does_not(argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{argument} must map .* to .*, \{{.*\}}, got "):
        make_optimizer(Net(), lr=1.0, **{argument: value})


OPTIMIZERS = (
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)


@pytest.mark.parametrize("algorithm", OPTIMIZERS, ids=lambda algorithm: algorithm.__name__)
def test_any_optimizer_class_steps_as_it_does_by_itself(algorithm: type[torch.optim.Optimizer]) -> None:
    together, alone = Net(), Net()
    train(together, make_optimizer(together, algorithm, lr=0.01), 3)
    train(alone, algorithm(alone.parameters(), lr=0.01, **({} if algorithm is torch.optim.Rprop else NO_DECAY)), 3)
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_partial_of_a_class_brings_its_options() -> None:
    optimizer = make_optimizer(Net(), partial(torch.optim.RAdam, betas=(0.8, 0.9), eps=1e-5), lr=0.01, eps=1e-6)
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.9), 1e-6)}


def test_groups_cannot_be_added_later() -> None:
    optimizer = make_optimizer(Net(), "adamw", lr=1.0)
    assert isinstance(optimizer, CompositeOptimizer)
    with pytest.raises(TypeError, match="groups are fixed"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_a_copy_steps_like_the_original() -> None:
    model = Net()
    optimizer = make_optimizer(model, "muon", lr=0.01)
    train(model, optimizer, 2)
    twin, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(twin, copied, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_fused_optimizer_can_be_asked_for() -> None:
    optimizer = make_optimizer(Net(), "adamw", lr=0.01, fused=True)
    assert all(group["fused"] and not group["foreach"] for group in optimizer.param_groups)


def test_muon_names_a_layout_it_cannot_flatten() -> None:
    kernel = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"shape \(4, 3, 2, 2\) as a matrix, which its memory layout"):
        Muon([nn.Parameter(kernel)])


def test_a_longer_schedule_is_not_cut_by_the_checkpoint_of_a_shorter_one() -> None:
    def start(steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, make_scheduler(optimizer, "cosine", 0, steps)

    _, short = start(10)
    optimizer, long = start(100)
    long.load_state_dict(short.state_dict())
    for _ in range(5):
        optimizer.step()
        long.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 + math.cos(math.pi * 5 / 100)))
