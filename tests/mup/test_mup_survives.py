"""Whatever is done to a model, its parametrisation stays: the same numbers for the optimizer, the same losses.

All that needs two processes runs in one pair, since starting it takes longest. Each scenario returns its losses and
its groups; the tests compare them in the main process.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import join_group, outcomes_of
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from dopr_lightning.mup import MupSpec
from dopr_lightning.optim import make_optimizer
from dopr_lightning.policies.ema import EMA

BASE, WIDTH, STEPS = 4, 12, 6

Outcome = tuple[list[float], dict[str, tuple[float, ...]]]
"""Losses, and what the optimizer knows of each parameter."""


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.up = nn.ConvTranspose1d(width, width, 2)
        self.block = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.Linear(2 * width, width))
        self.readout = nn.Linear(width, 3)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.embedding(tokens).mT))
        return self.readout(torch.tanh(self.block(torch.tanh(self.up(h).mT))))


SPEC = MupSpec.from_factory(Net, width=BASE)


def made(width: int = WIDTH) -> Net:
    model = SPEC.initialize(Net(width))
    assert isinstance(model, Net)
    return model


def batch(step: int) -> Tensor:
    return torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(step))


def plain(name: str) -> str:
    for part in ("_orig_mod.", "_checkpoint_wrapped_module.", "network.", "module."):
        name = name.replace(part, "")
    return name


def train(model: nn.Module, part: slice = slice(None), base: str = "adamw") -> Outcome:
    optimizer = make_optimizer(model, base, lr=0.02, weight_decay=0.1, mup=SPEC)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (model(batch(step)[part]) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    numbers = {
        plain(name): (group["lr_mult"], group["lr"], group["weight_decay"], group["eps"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    return losses, numbers


@pytest.fixture(scope="module")
def alone() -> Outcome:
    """The model as the factory made it, in one process."""
    return train(made())


def test_the_losses_hang_on_the_parametrisation(alone: Outcome) -> None:
    """Or the tests below could not fail."""
    uninitialised, _ = train(Net(WIDTH))
    assert abs(uninitialised[0] - alone[0][0]) > 1e-3
    model = made()
    optimizer = make_optimizer(model, "adamw", lr=0.02, weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (model(batch(step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert abs(loss.item() - alone[0][-1]) > 1e-3


class Wrapped(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = made()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(tokens)

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return (self(tokens) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self, "adamw", lr=0.02, weight_decay=0.1, mup=SPEC)

    def train_dataloader(self) -> DataLoader:
        return DataLoader([batch(step) for step in range(STEPS)], batch_size=None)


def assigned() -> nn.Module:
    """Loaded into a model that was never initialised."""
    with torch.device("meta"):
        model = Net(WIDTH)
    model.load_state_dict(made().state_dict(), assign=True)
    return model


def emptied() -> nn.Module:
    model = made()
    state = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def unpickled() -> nn.Module:
    file = io.BytesIO()
    torch.save(made(), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def partly_compiled() -> nn.Module:
    model = made()
    model.block = torch.compile(model.block, backend="eager")
    return model


def recomputed() -> nn.Module:
    model = made()
    model.block = checkpoint_wrapper(model.block)
    model.conv = checkpoint_wrapper(model.conv)
    return model


def nested() -> nn.Module:
    """A Lightning module's network, compiled, with recomputation, averaged."""
    module = Wrapped()
    module.network = torch.compile(recomputed(), backend="eager")
    return AveragedModel(module)


JOURNEYS: dict[str, Callable[[], nn.Module]] = {
    "deepcopy": lambda: copy.deepcopy(made()),
    "averaged": lambda: AveragedModel(made()),
    "assigned": assigned,
    "emptied": emptied,
    "unpickled": unpickled,
    "compiled": lambda: torch.compile(made(), backend="eager"),
    "partly compiled": partly_compiled,
    "recomputed": recomputed,
    "Lightning": Wrapped,
    "data parallel": lambda: nn.DataParallel(made()),
    "nested": nested,
}


@pytest.mark.parametrize("journey", JOURNEYS)
def test_training_goes_on_as_if_nothing_had_happened(alone: Outcome, journey: str) -> None:
    assert train(JOURNEYS[journey]()) == alone


def test_the_order_of_wrapping_and_initialising_does_not_matter(alone: Outcome) -> None:
    for wrap in (nn.DataParallel, checkpoint_wrapper, torch.compile):
        model = Net(WIDTH)
        wrapper = wrap(model)
        assert SPEC.initialize(wrapper) is wrapper
        assert train(model) == alone
        with pytest.raises(ValueError, match="was initialised before"):
            SPEC.initialize(model)


def test_the_emas_copy_knows_its_widths(tmp_path: Path) -> None:
    module, ema = Wrapped(), EMA(decay=0.5)
    run = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=[ema],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(module)
    average = ema._average_model
    assert average is not None
    assert {plain(name): growth for name, growth in SPEC.growth(average).items()} == SPEC.growth(made())
    assert {plain(name): role for name, role in SPEC.roles(average).items()} == SPEC.roles(made())
    with pytest.raises(ValueError, match="was initialised before"):
        SPEC.initialize(average)


# Two processes -----------------------------------------------------------------------------------------------------


WHOLE = StateDictOptions(full_state_dict=True)


def mine() -> slice:
    return slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


def shard(model: Net) -> Net:
    """Some layers on their own, the rest with the root."""
    for module in (model.conv, model.block[0]):
        fully_shard(module)
    return fully_shard(model)


def fsdp_then_initialised() -> Outcome:
    model = shard(Net(WIDTH))
    assert isinstance(model.readout.weight, DTensor)
    SPEC.initialize(model)
    return train(model, mine())


def fsdp_from_meta() -> Outcome:
    """As large models are loaded: nothing whole is ever built, and nothing is rescaled."""
    with torch.device("meta"):
        model = Net(WIDTH)
    shard(model).to_empty(device="cpu")
    set_model_state_dict(model, made().state_dict(), options=WHOLE)
    return train(model, mine())


def fsdp_loaded() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was trained in shards, and what a model loaded from that holds."""
    model, again = shard(made()), shard(Net(WIDTH))
    train(model, mine())
    set_model_state_dict(again, get_model_state_dict(model, options=WHOLE), options=WHOLE)
    trained, loaded = (
        {name: p.full_tensor().detach().clone() for name, p in m.named_parameters()} for m in (model, again)
    )
    return trained, loaded


SCENARIOS: dict[str, Callable[[], Any]] = {
    "ddp": lambda: train(DistributedDataParallel(Wrapped()), mine()),
    "fsdp": lambda: train(shard(made()), mine()),
    "fsdp, then initialised": fsdp_then_initialised,
    "fsdp, from meta": fsdp_from_meta,
    "fsdp, loaded": fsdp_loaded,
}


def runs(folder: Path) -> dict[str, Callable[[], Any]]:
    join_group()
    return SCENARIOS


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What a scenario returned on each rank."""
    return outcomes_of(tmp_path_factory.mktemp("mup"), runs)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp, then initialised", "fsdp, from meta"])
def test_two_processes_train_like_one(outcome: Callable[[str], list[Any]], alone: Outcome, name: str) -> None:
    (one, numbers), (other, others) = outcome(name)
    assert numbers == others == alone[1]
    assert [(a + b) / 2 for a, b in zip(one, other, strict=True)] == pytest.approx(alone[0], rel=1e-9)


def test_a_sharded_checkpoint_is_not_rescaled(outcome: Callable[[str], list[Any]]) -> None:
    for trained, loaded in outcome("fsdp, loaded"):
        assert trained.keys() == loaded.keys() == dict(Net(WIDTH).named_parameters()).keys()
        assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
