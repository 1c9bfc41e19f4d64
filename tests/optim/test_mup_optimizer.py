"""The optimizer under muP: its groups' numbers, the schedulers it lives with, those it refuses, its checkpoints."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from dopr_lightning import ActivationPreconditioner, DoPr, MupSpec, configure_optimizers, mup_table
from dopr_lightning.mup.rules import sign
from dopr_lightning.optim import BASES, Base, make_optimizer

BASE, WIDTH = 8, 32
M = WIDTH / BASE


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, width)
        self.input = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.hidden = nn.Linear(2 * width, width)
        self.readout = nn.Linear(width, 2)

    def forward(self, token: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.hidden(self.norm(torch.tanh(self.input(self.embedding(token)))))))


SPEC = MupSpec.from_factory(Net, width=BASE)
TOKENS = torch.tensor([[0, 1, 2, 3], [3, 4, 5, 6]])


def start(base: str = "adamw", width: int = WIDTH, **options: Any) -> tuple[Net, Optimizer]:
    model = SPEC.initialize(Net(width))
    assert isinstance(model, Net)
    return model, make_optimizer(model, base, **{"lr": 0.01, "weight_decay": 0.1, "mup": SPEC} | options)


def train(model: nn.Module, optimizer: Optimizer, steps: int, after: Callable[[Tensor], object] | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(TOKENS).square().sum()
        loss.backward()
        optimizer.step()
        if after is not None:
            after(loss)


def groups(model: nn.Module, optimizer: Optimizer, key: str) -> dict[str, Any]:
    """By parameter name; every parameter in exactly one group."""
    found = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is parameter
            assert name not in found
            found[name] = group.get(key)
    assert list(found) != []
    assert {*found} == {name for name, p in model.named_parameters() if p.requires_grad}
    return found


# The groups' numbers -----------------------------------------------------------------------------------------------


VECTORS = ("input.bias", "norm.weight", "norm.bias", "hidden.bias", "readout.bias")

ADAMW = {"embedding.weight": 1, "input.weight": 1 / M, "hidden.weight": 1 / M, "readout.weight": 1 / M} | dict.fromkeys(
    VECTORS, 1
)
MULTIPLIERS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "adamw": ({}, ADAMW),
    # rows 64, cols 32 and the reverse, at base 16, 8: sqrt(max) grows like M^1/2, and sqrt(out/in) does not.
    "muon": ({}, ADAMW | {"input.weight": M**-0.5, "hidden.weight": M**-0.5}),
    "signum": ({}, ADAMW),
    "lion": ({}, ADAMW),
    "soap": ({}, ADAMW),
    "adamuon": ({}, ADAMW | {"input.weight": M**-0.5, "hidden.weight": M**-0.5}),
    # torch's original factor is that of the spectral condition up to a constant.
    "original muon": ({"adjust_lr_fn": "original"}, ADAMW | {"input.weight": 1, "hidden.weight": 1}),
    "sgd": (
        {},
        {"embedding.weight": M, "input.weight": 1, "hidden.weight": 1, "readout.weight": 1 / M, "readout.bias": 1}
        | dict.fromkeys(VECTORS[:-1], M),
    ),
}


@pytest.mark.parametrize("case", MULTIPLIERS)
@pytest.mark.parametrize(
    ("rule", "decay"), [("independent", lambda m: 0.1 / m), ("coupled", lambda m: 0.1), ("none", lambda m: 0.0)]
)
def test_rates_and_decays_by_hand(case: str, rule: str, decay: Callable[[float], float]) -> None:
    options, expected = MULTIPLIERS[case]
    model, optimizer = start(case.split()[-1], weight_decay_rule=rule, **options)
    assert groups(model, optimizer, "lr_mult") == pytest.approx(expected)
    assert groups(model, optimizer, "lr") == pytest.approx({name: 0.01 * m for name, m in expected.items()})
    assert groups(model, optimizer, "weight_decay") == pytest.approx(
        {name: 0.0 if name in VECTORS else decay(m) for name, m in expected.items()}
    )


@pytest.mark.parametrize("case", MULTIPLIERS)
@pytest.mark.parametrize("rule", ["independent", "coupled"])
def test_what_a_step_decays_by_hand(case: str, rule: str) -> None:
    """Nothing but decay moves a weight whose gradient is 0: by 12 % at every width (independent), or by as many times
    that as the rate is multiplied (coupled)."""
    options, multipliers = MULTIPLIERS[case]
    for width, grown in ((BASE, False), (WIDTH, True)):
        model, optimizer = start(case.split()[-1], width, lr=0.1, weight_decay=1.2, weight_decay_rule=rule, **options)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(2 if case == "soap" else 1):  # whose first step only measures
            optimizer.step()
        for name, parameter in model.named_parameters():
            pace = multipliers[name] if grown and rule == "coupled" else 1
            kept = 1.0 if name in VECTORS else 1 - 0.1 * 1.2 * pace
            torch.testing.assert_close(parameter.detach(), kept * before[name])


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_roles_have_rates_of_their_own(base: str) -> None:
    """Beside muP's; the weight decay's multiplier is the width's alone, so a role scales its decay too."""
    _, expected = MULTIPLIERS[base]
    plain = groups(*start(base), "weight_decay")
    model, optimizer = start(base, lr_by_role={"embedding": 0.25, "readout": 3.0})
    ours = {"embedding.weight": 0.25, "readout.weight": 3.0}
    wanted = {name: m * ours.get(name, 1) for name, m in expected.items()}
    assert groups(model, optimizer, "lr_mult") == pytest.approx(wanted)
    assert groups(model, optimizer, "lr") == pytest.approx({name: 0.01 * m for name, m in wanted.items()})
    assert groups(model, optimizer, "weight_decay") == plain


def test_muon_leaves_a_condition_to_adamw_with_a_hidden_matrix_rate() -> None:
    model, optimizer = start("muon", roles={"hidden.weight": "condition"}, lr_by_role={"condition": 0.5})
    expected = MULTIPLIERS["muon"][1] | {"hidden.weight": 0.5 * ADAMW["hidden.weight"]}
    assert groups(model, optimizer, "lr_mult") == pytest.approx(expected)
    muon, adamw = optimizer.parts
    assert [name for group in muon.param_groups for name in group["param_names"]] == ["input.weight"]
    assert "hidden.weight" in [name for group in adamw.param_groups for name in group["param_names"]]


def test_a_roles_rate_scales_its_step() -> None:
    """Plain gradient descent in float64: every weight moves by its rate times its gradient."""
    model = Net(WIDTH).double()
    share = {"readout": 3.0, "hidden": 0.5, "vector": 0.1}
    by_name = {"readout.weight": 3.0, "hidden.weight": 0.5, "input.weight": 0.5} | dict.fromkeys(VECTORS, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, "sgd", lr=0.01, lr_by_role=share, momentum=0.0)
    train(model, optimizer, 1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = before[name] - 0.01 * by_name.get(name, 1.0) * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [float, np.float32, int])
def test_roles_rates_are_not_flattened_unseen(kind: Callable[[float], Any]) -> None:
    """Without muP too, and by a hand-written schedule of any kind of number."""
    model = Net(WIDTH)
    optimizer = make_optimizer(model, "adamw", lr=0.01, lr_by_role={"readout": 0.5})
    for group in optimizer.param_groups:
        group["lr"] = kind(1.0)
    with pytest.raises(ValueError, match="no longer have the ratio that muP, or lr_by_role, gave them"):
        train(model, optimizer, 1)


def test_decays_are_not_flattened_unseen() -> None:
    """As schedules of weight decay do that know of one value; those that scale each group's, and none at all, pass."""
    model = Net(WIDTH)
    optimizer = make_optimizer(model, "adamw", lr=0.01, weight_decay=0.1, mup=SPEC)
    for decay in (0.05, 0.0):
        for group in optimizer.param_groups:
            group["weight_decay"] = decay * group.get("wd_mult", 0.0)
        train(model, optimizer, 1)
    for group in optimizer.param_groups:
        if "wd_mult" in group:
            group["weight_decay"] = 0.04
    with pytest.raises(ValueError, match=r"the weight decays of \S+ and \S+ no longer have the ratio .*own wd_mult"):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("by_role", "message"),
    [
        ({"input": 0.5}, "no trainable parameter has the role 'input'; there are embedding, hidden, readout, vector"),
        ({"readout": 0.0}, "the multiplier of 'readout' must be positive, got 0.0"),
        ({"readout": float("nan")}, "must be positive"),
    ],
)
def test_rates_of_roles_that_are_not_there(by_role: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(Net(WIDTH), "adamw", lr=0.01, lr_by_role=by_role)


def test_eps_by_hand() -> None:
    model, optimizer = start(eps=1e-6)
    assert groups(model, optimizer, "eps") == pytest.approx(
        {
            "embedding.weight": 1e-6 / M,
            "input.weight": 1e-6 / M**2,
            "hidden.weight": 1e-6 / M**2,
            "readout.weight": 1e-6 / M,
            "readout.bias": 1e-6,
        }
        | dict.fromkeys(VECTORS[:-1], 1e-6 / M)
    )
    model, optimizer = start("sgd")
    assert not any("eps" in key for group in optimizer.param_groups for key in group)


def test_roles_are_read_off_the_shapes() -> None:
    """Not guessed from the order, by which the last matrix would be the readout."""

    def factory(width: int) -> nn.Module:
        sizes = {"readout": (width, 2), "input": (5, width), "other": (3, width), "hidden": (width, width)}
        return nn.ModuleDict({name: nn.Linear(*inout, bias=False) for name, inout in sizes.items()})

    spec, model = MupSpec.from_factory(factory, width=BASE), factory(WIDTH)
    assert groups(model, make_optimizer(model, "muon", lr=0.01, mup=spec), "lr_mult") == {
        "readout.weight": 1 / M,
        "input.weight": 1,
        "other.weight": 1,
        "hidden.weight": M**-0.5,
    }


def test_adamuon_keeps_to_its_spectral_norm_under_mup() -> None:
    """Unless told otherwise; and to the paper's scale without muP."""

    def scales(**options: Any) -> set[str]:
        _, optimizer = start("adamuon", **options)
        return {group["scale"] for group in optimizer.param_groups if "scale" in group}

    assert scales() == {"spectral"}
    assert scales(scale="rms") == scales(mup=None) == {"rms"}


def test_frozen_parameters_are_in_no_group() -> None:
    model = Net(WIDTH)
    model.input.requires_grad_(False)
    assert "input.weight" not in groups(model, make_optimizer(model, "muon", lr=0.01, mup=SPEC), "lr")


def test_without_mup_nothing_is_multiplied() -> None:
    optimizer = make_optimizer(Net(WIDTH), "adamw", lr=0.01, weight_decay=0.1, eps=1e-6)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    assert not any("lr_mult" in group for group in optimizer.param_groups)


def test_a_class_of_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"how NAdam's update grows with the width is not known.*BASES that says so"):
        make_optimizer(Net(WIDTH), torch.optim.NAdam, lr=0.01, mup=SPEC)
    with pytest.raises(ValueError, match=r"how AdamW's update .*; pass base='adamw' in place of the class"):
        make_optimizer(Net(WIDTH), torch.optim.AdamW, lr=0.01, mup=SPEC)


def test_every_part_of_an_eps_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, "own", Base(torch.optim.Adafactor, growth=sign))
    model, optimizer = start("own", eps=(1e-6, 1e-3))
    assert groups(model, optimizer, "eps")["input.weight"] == pytest.approx((1e-6 / M**2, 1e-3 / M**2))
    model, optimizer = start("own")
    assert groups(model, optimizer, "eps")["input.weight"] == (None, pytest.approx(1e-3 / M**2))


def test_an_unknown_rule_and_another_model_are_refused() -> None:
    with pytest.raises(TypeError, match=r"mup must be a MupSpec, as MupSpec\.from_factory makes it, got 'x'"):
        start(mup="x")
    with pytest.raises(ValueError, match="unknown weight decay rule 'both'"):
        start(weight_decay_rule="both")
    with pytest.raises(ValueError, match=r"MupSpec is of another model: Linear has no embedding\.weight"):
        make_optimizer(nn.Linear(3, 4), "adamw", lr=0.01, mup=SPEC)
    with pytest.raises(ValueError, match="narrower than the base model"):
        make_optimizer(Net(4), "adamw", lr=0.01, mup=SPEC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forgotten_initialisation_is_pointed_out(dtype: torch.dtype) -> None:
    model = Net(128).to(dtype)
    with pytest.warns(UserWarning, match=r"readout\.weight is as torch drew it, in a model wider than its base .*: 8"):
        make_optimizer(model, "adamw", lr=0.01, mup=SPEC)


def loaded(width: int) -> nn.Module:
    """Bears no mark, but the values of one that was initialised."""
    model = Net(width)
    model.load_state_dict(SPEC.initialize(Net(width)).state_dict())
    return model


def trained(width: int) -> nn.Module:
    """Without muP, by which it now goes on."""
    model = Net(width)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), 5)
    return model


def drawn_otherwise(width: int) -> nn.Module:
    model = Net(width)
    nn.init.normal_(model.readout.weight, std=width**-0.5)
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: SPEC.initialize(Net(128)),
        lambda: SPEC.initialize(Net(128), zero_readouts=True),
        lambda: copy.deepcopy(SPEC.initialize(Net(128))),
        lambda: loaded(128),
        lambda: trained(128),
        lambda: drawn_otherwise(128),
        lambda: Net(BASE),
        lambda: Net(128).to("meta"),
    ],
    ids=["initialised", "zero", "copied", "loaded", "trained", "drawn otherwise", "base", "meta"],
)
def test_nothing_is_said_of_what_was_initialised_trained_or_need_not_be(model: Callable[[], nn.Module]) -> None:
    made = model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_optimizer(made, "adamw", lr=0.01, mup=SPEC)


# The table ---------------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_optimizer_does() -> None:
    with torch.device("meta"):
        text = mup_table(Net(WIDTH), "muon", SPEC, weight_decay_rule="independent")
    header, *rows = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    assert header == ["role", "by", "tensors", "for example", "lr", "weight decay", "eps", "initial value"]
    assert rows == [
        ["embedding", "rest", "1", "embedding.weight 7x32", "x 1", "x 1", "x 0.25", "x 1"],
        ["hidden", "muon", "2", "input.weight 64x32", "x 0.5", "x 2", "x 0.0625", "x 1"],
        ["readout", "rest", "1", "readout.weight 2x32", "x 0.25", "x 4", "x 0.25", "x 0.5"],
        ["vector", "rest", "2", "input.bias 64", "x 1", "x 0", "x 0.25", "x 2"],
        ["vector", "rest", "2", "norm.weight 64", "x 1", "x 0", "x 0.25", "x 1"],
        ["vector", "rest", "1", "readout.bias 2", "x 1", "x 0", "x 1", "x 2"],
    ]


def test_the_table_takes_what_the_optimizer_takes() -> None:
    def row(**options: Any) -> list[str]:
        text = mup_table(Net(WIDTH), "muon", SPEC, **options)
        return next(re.split(r"\s{2,}", line)[1:6] for line in text.splitlines() if "input.weight" in line)

    moved = {"input.weight": "input"}
    assert row(weight_decay_rule="coupled") == ["muon", "2", "input.weight 64x32", "x 0.5", "x 1"]
    assert row(adjust_lr_fn="original") == ["muon", "2", "input.weight 64x32", "x 1", "x 1"]
    assert row(roles=moved) == ["rest", "1", "input.weight 64x32", "x 0.25", "x 4"]


# Schedulers --------------------------------------------------------------------------------------------------------


def peaks(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def in_turn(optimizer: Optimizer) -> lr_scheduler.LRScheduler:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 20)], milestones=[5])


def cycled(optimizer: Optimizer) -> bool:
    """Whether all parts have the momentum that the cycles of two schedulers move: Muon and AdamW do not."""
    return "betas" in optimizer.defaults


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, peaks(o), total_steps=26, cycle_momentum=cycled(o)),
    "cycle": lambda o: lr_scheduler.CyclicLR(o, [0.1 * r for r in peaks(o)], peaks(o), 5, cycle_momentum=cycled(o)),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=20),
    "sequential": in_turn,
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [5, 10], 0.1),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 20, 2.0),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", factor=0.1, patience=0, min_lr=0, eps=0),
}


@pytest.mark.parametrize("base", ["adamw", "muon"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_scale_each_groups_rate(name: str, base: str) -> None:
    """To their end and beyond, every rate is the multiplier times what a plain optimizer at the base rate has."""
    model, optimizer = start(base, width=3 * BASE)  # thirds: rates differ by rounding
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, plain)]
    seen = set()

    def step(loss: Tensor) -> None:
        plain.step()
        for scheduler in schedulers:
            scheduler.step(*([0.0] if name == "plateau" else []))
        expected = plain.param_groups[0]["lr"]
        seen.add(expected)
        for group in (group for part in optimizer.parts for group in part.param_groups):
            assert group["lr"] == pytest.approx(group["lr_mult"] * expected, rel=1e-6, abs=1e-12)

    train(model, optimizer, 25, step)
    assert len(seen) > 2
    assert max(seen) > 2 * min(seen)


FLATTENING: dict[str, Callable[[Optimizer], Any]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=25),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-6),
    "cycle": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, 5),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", factor=0.1, patience=0, min_lr=1e-6),
    "plateau's eps": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", factor=0.5, patience=0),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.001),
}


@pytest.mark.parametrize("name", FLATTENING)
def test_schedulers_that_flatten_the_rates_are_refused(name: str) -> None:
    model, optimizer = start()
    scheduler = FLATTENING[name](optimizer)
    last = copy.deepcopy(model.state_dict())

    def step(loss: Tensor) -> None:
        scheduler.step(*([0.0] if name.startswith("plateau") else []))
        last.update(copy.deepcopy(model.state_dict()))

    message = (
        r"learning rates of [\w.]+ and [\w.]+ no longer have the ratio that muP, or lr_by_role, gave them.*LambdaLR "
        r"does; OneCycleLR needs max_lr=\[group\['lr'\] .*CosineAnnealingLR eta_min=0, ReduceLROnPlateau min_lr=0 and "
        r"eps=0; lr_find"
    )
    with pytest.raises(ValueError, match=message):
        train(model, optimizer, 25, step)
    # Said before the step, not after.
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", FLATTENING)
def test_without_mup_any_scheduler_does(name: str) -> None:
    """All groups have the rate that it gives a plain optimizer, and steps go on at it."""
    model = Net(WIDTH)
    optimizers = [make_optimizer(model, "adamw", lr=0.01, weight_decay=0.1)]
    optimizers.append(torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.01))
    schedulers = [FLATTENING[name](o) for o in optimizers]
    seen, last = set(), copy.deepcopy(model.state_dict())

    def step(loss: Tensor) -> None:
        assert not torch.equal(model.readout.weight, last["readout.weight"])
        last.update(copy.deepcopy(model.state_dict()))
        optimizers[1].step()
        for scheduler in schedulers:
            scheduler.step(*([0.0] if name.startswith("plateau") else []))
        assert set(peaks(optimizers[0])) == set(peaks(optimizers[1]))
        seen.update(peaks(optimizers[0]))

    train(model, optimizers[0], 25, step)
    assert len(seen) > 2
    assert max(seen) > 2 * min(seen)


def test_momentum_is_cycled_where_all_parts_have_the_same() -> None:
    model, optimizer = start("adamw")
    scheduler = lr_scheduler.OneCycleLR(optimizer, peaks(optimizer), total_steps=10)
    before = {group["betas"][0] for group in optimizer.param_groups}
    train(model, optimizer, 3, lambda _: scheduler.step())
    (after,) = {group["betas"][0] for group in optimizer.param_groups}
    assert before == {0.95}
    assert after < 0.9
    with pytest.raises(ValueError, match="`cycle_momentum`"):  # Muon's momentum, AdamW's betas
        lr_scheduler.OneCycleLR(start("muon")[1], 0.01, total_steps=10)
    model, optimizer = start("muon")
    scheduler = lr_scheduler.OneCycleLR(optimizer, peaks(optimizer), total_steps=10, cycle_momentum=False)
    train(model, optimizer, 3, lambda _: scheduler.step())
    assert {group["momentum"] for group in optimizer.param_groups if "momentum" in group} == {0.95}


class Trained(L.LightningModule):
    def __init__(self, width: int = WIDTH, base: str = "adamw", spec: MupSpec | None = SPEC) -> None:
        super().__init__()
        self.network = Net(width)
        self.base, self.spec, self.lr = base, spec, 0.01

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader([TOKENS] * 4, batch_size=None)

    def configure_optimizers(self) -> Any:
        return configure_optimizers(
            self, self.base, lr=self.lr, weight_decay=0.1, schedule="cosine", warmup_steps=2, mup=self.spec
        )


def trainer(folder: Path, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(settings | options))


@pytest.mark.filterwarnings("ignore")
def test_lightnings_rate_finder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no longer have the ratio that muP, or lr_by_role, gave them.*lr_find cannot"
    ):
        Tuner(trainer(tmp_path, enable_checkpointing=True)).lr_find(Trained(), num_training=5)
    assert Tuner(trainer(tmp_path, enable_checkpointing=True)).lr_find(Trained(spec=None), num_training=5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [lambda n: 0.001, lambda n: [0.001] * n, lambda n: [0.001]])
def test_lightnings_weight_averaging_with_one_rate_is_refused(given: Callable[[int], Any], tmp_path: Path) -> None:
    """Before the first step, not where it sets the rate."""
    groups = make_optimizer(Trained(), "adamw", lr=0.01, mup=SPEC).param_groups
    fit = trainer(tmp_path, callbacks=[StochasticWeightAveraging(swa_lrs=given(len(groups)), swa_epoch_start=1)])
    with pytest.raises(
        ValueError, match=r"does not keep the ratio .* the 5 groups; give it a list: swa_lrs=\[0.001 \* gr"
    ):
        fit.fit(Trained())
    assert fit.global_step == 0


@pytest.mark.filterwarnings("ignore")
def test_lightnings_weight_averaging_may_keep_the_ratio(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[StochasticWeightAveraging(swa_lrs=0.001, swa_epoch_start=1)]).fit(Trained(spec=None))
    rates = [0.001 * group["lr_mult"] for group in make_optimizer(Trained(), "adamw", lr=0.01, mup=SPEC).param_groups]
    assert len(set(rates)) > 1
    fit = trainer(tmp_path, callbacks=[StochasticWeightAveraging(swa_lrs=rates, swa_epoch_start=1)])
    fit.fit(Trained())
    assert fit.global_step == 12


# With activation preconditioning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adamw", "muon", "sgd"])
def test_preconditioned_steps_keep_the_multipliers(base: str) -> None:
    model, optimizer = start(base)
    ap = ActivationPreconditioner(model, damping=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    multipliers = groups(model, optimizer, "lr_mult")
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS).square().sum().backward()
        raw = model.hidden.weight.grad.clone()
        ap.step()
        assert not torch.allclose(raw, model.hidden.weight.grad)
        optimizer.step()
    assert groups(model, optimizer, "lr_mult") == multipliers
    assert groups(model, optimizer, "lr") == pytest.approx({name: 0.01 * m for name, m in multipliers.items()})
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_in_lightning_with_the_callback(tmp_path: Path) -> None:
    module = Trained(base="muon")
    run = trainer(tmp_path, callbacks=[DoPr(damping=0.01)])
    run.fit(module)
    (optimizer,) = run.optimizers
    assert run.global_step == 12
    found = groups(module, optimizer, "lr_mult")
    assert found == {f"network.{name}": m for name, m in groups(*start("muon"), "lr_mult").items()}


# Checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adamw", "muon", "sgd"])
def test_resume_is_bit_identical_under_mup(base: str, tmp_path: Path) -> None:
    def begin() -> tuple[Net, Optimizer, lr_scheduler.LRScheduler]:
        model, optimizer = start(base)
        return model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 8)

    whole, optimizer, scheduler = begin()
    train(whole, optimizer, 3, lambda _: scheduler.step())
    torch.save([part.state_dict() for part in (whole, optimizer, scheduler)], tmp_path / "run.pt")
    train(whole, optimizer, 4, lambda _: scheduler.step())

    resumed = begin()
    for part, state in zip(resumed, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[1], 4, lambda _: resumed[2].step())
    for a, b in zip(whole.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"mup": MupSpec.from_factory(Net, width=4)}, {}),
        ({"mup": None}, {}),
        ({}, {"mup": None}),
        ({"mup": MupSpec.from_factory(Net, width=WIDTH)}, {}),  # at its base: fewer groups
        ({"adjust_lr_fn": "original"}, {}),
    ],
    ids=["another base", "from standard", "to standard", "at the base", "another scale"],
)
def test_a_checkpoint_of_another_parametrisation_is_refused(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    (_, other), (model, optimizer) = start("muon", **theirs), start("muon", **ours)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"checkpoint's groups have learning-rate multipliers \[.*resume with the muP"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before
    train(model, optimizer, 1)
