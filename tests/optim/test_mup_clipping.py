"""Clipping by norm under muP: the norm changes with the width where nothing else does, and that is said."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader

from dopr_lightning import ActivationPreconditioner, DoPr, MupSpec, configure_optimizers
from dopr_lightning.mup.rules import gradient
from dopr_lightning.optim import BASES, Base, make_optimizer
from dopr_lightning.policies.networks import ResidualMLP

BASE, COPIES = 6, 4
GENERATOR = torch.Generator().manual_seed(0)
INPUTS, TARGETS = (torch.randn(32, size, generator=GENERATOR, dtype=torch.float64) for size in (5, 3))


def network(width: int, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, width, bias=bias),
        nn.Tanh(),
        nn.Linear(width, width, bias=bias),
        nn.Tanh(),
        nn.Linear(width, 3, bias=bias),
    ).double()


def copied(narrow: nn.Sequential) -> nn.Sequential:
    """The same function, of every hidden unit so many copies, each weighted that much less by what reads it.

    muP's claims are exact here: a copy's error is 1/COPIES of its unit's, and so is what a step must change in a weight
    that reads copies.
    """
    wide = network(COPIES * BASE, narrow[0].bias is not None)
    with torch.no_grad():
        for name, ours in wide.named_parameters():
            value = narrow.get_parameter(name)
            for dim, (size, grown) in enumerate(zip(value.shape, ours.shape, strict=True)):
                if grown > size:
                    value = value.repeat_interleave(COPIES, dim) / (COPIES if dim else 1)
            ours.copy_(value)
    return wide


def backward(model: nn.Module) -> Tensor:
    loss = (model(INPUTS) - TARGETS).square().mean()
    loss.backward()
    return loss.detach()


def norms(model: nn.Module) -> dict[str, float]:
    return {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}


def losses(model: nn.Module, base: str, clip: float | None) -> Tensor:
    optimizer = make_optimizer(model, base, lr=0.05, mup=MupSpec.from_factory(network, width=BASE))
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        seen.append(backward(model))
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return torch.stack(seen)


def test_by_hand_the_norm_grows_where_the_function_is_the_same() -> None:
    """Each entry of a readout's gradient stays, and there are more; of M = G (A + damping tr A)^-1 it falls."""
    models = network(BASE, bias=False), copied(network(BASE, bias=False))
    preconditioners = [ActivationPreconditioner(model, damping=0.01) for model in models]
    assert backward(models[0]) == pytest.approx(backward(models[1]).item(), rel=1e-12)

    def growth() -> dict[str, float]:
        narrow, wide = (norms(model) for model in models)
        return {name: wide[name] / narrow[name] for name in narrow}

    of_gradients = {"0.weight": COPIES**-0.5, "2.weight": 1, "4.weight": COPIES**0.5}
    assert growth() == pytest.approx(of_gradients, rel=1e-9)
    for preconditioner in preconditioners:
        preconditioner.step()
    # Through A and its trace, which the copies multiply where they are inputs.
    assert growth() == pytest.approx(
        {"0.weight": COPIES**-0.5, "2.weight": 1 / COPIES, "4.weight": COPIES**-0.5}, rel=1e-6
    )


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_unclipped_training_is_that_of_the_base_width_and_clipped_is_not(base: str) -> None:
    narrow = network(BASE)
    backward(narrow)
    clip = 0.5 * math.hypot(*norms(narrow).values())

    def apart(clip: float | None) -> float:
        models = network(BASE), copied(network(BASE))
        ours, theirs = (losses(model, base, clip) for model in models)
        return ((ours - theirs).abs() / ours).max().item()

    assert apart(None) < 1e-5  # not 0 for eps alone
    assert apart(clip) > 1e-3


@pytest.mark.parametrize(("preconditioned", "expected"), [(False, 0.5), (True, -0.5)])
def test_norms_of_initialised_networks_follow_the_width(preconditioned: bool, expected: float) -> None:
    """Global norms of a first step from readouts of zero; without their bias, whose gradient is the same at all."""
    factory = functools.partial(ResidualMLP, observation_dim=5, action_dim=3, observe=1, horizon=1, denoise=False)
    spec = MupSpec.from_factory(factory, width=128)
    found = []
    for width in (128, 256, 512, 1024):
        torch.manual_seed(0)
        model = spec.initialize(factory(width=width), zero_readouts=True).double()
        preconditioner = ActivationPreconditioner(model, damping=0.01)
        (model(None, None, INPUTS[:, None]) - TARGETS[:, None]).square().mean().backward()
        if preconditioned:
            preconditioner.step()
        found.append(math.hypot(*(norm for name, norm in norms(model).items() if name != "readout.bias")))
    assert math.log2(found[-1] / found[0]) / 3 == pytest.approx(expected, abs=0.1)


# What is said of it ------------------------------------------------------------------------------------------------


class Clipped(L.LightningModule):
    def __init__(self, width: int, base: str, spec: MupSpec | None) -> None:
        super().__init__()
        self.network = network(width)
        self.base, self.spec = base, spec

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader([INPUTS] * 3, batch_size=None)

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.base, lr=0.01, mup=self.spec)


SPEC = MupSpec.from_factory(network, width=BASE)
WIDER = COPIES * BASE


@pytest.fixture
def fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Trains; what was said of clipping."""

    def run(width: int, base: str, spec: MupSpec | None = SPEC, **options: Any) -> list[str]:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        with caplog.at_level(logging.WARNING, "dopr_lightning"):
            trainer.fit(Clipped(width, base, spec))
        assert trainer.global_step == 3
        return [record.getMessage() for record in caplog.records if "clip" in record.getMessage()]

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", [None, "norm"])
@pytest.mark.parametrize("callbacks", [[], [DoPr()]], ids=["plain", "dopr"])
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_clipping_by_norm_beyond_the_base_width_is_pointed_out_once(
    fit: Callable[..., list[str]], base: str, callbacks: list[L.Callback], algorithm: str | None
) -> None:
    (said,) = fit(WIDER, base, gradient_clip_val=10.0, gradient_clip_algorithm=algorithm, callbacks=callbacks)
    assert said == (
        "gradient_clip_val=10.0 under muP, in a model wider than its base {'width': 6}: the norm that it is compared "
        "with changes with the width (that of all gradients grows, in the end like sqrt(width); that of DoPr's M "
        "falls), so that clipping acts differently at each width. Where it only catches outliers, as a bound well "
        "above the usual norms does, all is well; one that acts in usual steps should be left out, here and in the "
        "sweep. Clipping by value is no way out: entries change with the width too."
    )


@pytest.mark.filterwarnings("ignore")
def test_sgd_is_refused_clipping_by_norm_beyond_the_base_width(
    fit: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"^gradient_clip_val=1\.0 under muP.*a step of {} is as long as the clipped.*Leave gradient_clip_val out"
    monkeypatch.setitem(BASES, "own", Base(torch.optim.SGD, growth=gradient))
    for base in ("sgd", "own"):
        with pytest.raises(ValueError, match=message.replace("{}", base)):
            fit(WIDER, base, gradient_clip_val=1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (BASE, {"gradient_clip_val": 1.0}),
        (WIDER, {"gradient_clip_val": 1.0, "spec": None}),
        (WIDER, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}),
        (WIDER, {"gradient_clip_val": 0.0}),
        (WIDER, {}),
    ],
    ids=["base width", "no muP", "by value", "zero", "unclipped"],
)
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_nothing_is_said_else(fit: Callable[..., list[str]], base: str, width: int, options: dict[str, Any]) -> None:
    assert fit(width, base, **options) == []


def test_a_module_without_a_trainer_may_have_optimizers() -> None:
    assert Clipped(WIDER, "sgd", SPEC).configure_optimizers().param_groups
