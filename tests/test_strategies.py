"""DoPr under Lightning's strategies, with real processes: FSDP2 equals DDP, resuming on other ranks, a killed rank."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from ranks import RANKS, outcomes_of, start
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dopr_lightning import DoPr, configure_optimizers

PATIENCE = 30
"""Seconds in which a process must notice that another is gone."""


class Model(L.LightningModule):
    """An embedding, a convolution, and Linear layers whose rows two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 7)
        self.readout = nn.Linear(7, 1)

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) or isinstance(self.hidden.weight, DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for module in (self.conv, self.hidden, self.readout, self):
            fully_shard(module, mesh=mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.conv(self.embedding(tokens).mT).mT)
        return self.readout(torch.tanh(self.hidden(self.norm(h)).mean(1)))[:, 0]

    def training_step(self, batch: list[Tensor]) -> Tensor:
        tokens, y = batch
        return (self(tokens) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, base="sgd", lr=0.01)

    def train_dataloader(self) -> DataLoader:
        """Six batches of 8, the same ones whether one process takes 8 samples or each of two takes 4."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(5, (48, 7), generator=generator)
        samples = TensorDataset(tokens, tokens.float().mean(1))
        ranks = self.trainer.world_size
        sampler = DistributedSampler(samples, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(samples, batch_size=8 // ranks, sampler=sampler)


class Recorder(L.Callback):
    """The preconditioner's state as training goes on from a checkpoint."""

    def __init__(self, callback: DoPr) -> None:
        self.callback = callback

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = self.callback.state_dict()


class KillOneRank(L.Callback):
    """As the out-of-memory killer does it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == RANKS - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(
    folder: Path, strategy: Strategy | str, *, ranks: int, epochs: int, checkpoint: Path | None, kill: int | None = None
) -> dict[str, Any]:
    """Train, and keep the weights, the preconditioner's state at the start and at the end, and a checkpoint.

    There is a checkpoint per epoch; ``kill`` is the step before which the last rank dies.
    """
    dopr = DoPr(damping=0.1, update_every=4, ema=0.5)
    recorder = Recorder(dopr)
    saver = L.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    model = Model()
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[dopr, recorder, saver, *([] if kill is None else [KillOneRank(kill)])],
        use_distributed_sampler=False,  # Lightning's shuffles
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=checkpoint)
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return {"weights": weights, "first": recorder.state, "last": dopr.state_dict(), "steps": trainer.global_step}


def ddp(folder: Path, *, epochs: int = 2, checkpoint: Path | None = None, kill: int | None = None) -> dict[str, Any]:
    strategy = DDPStrategy(timeout=timedelta(seconds=PATIENCE))
    return fit(folder, strategy, ranks=RANKS, epochs=epochs, checkpoint=checkpoint, kill=kill)


def fsdp(folder: Path, *, distributed: bool, epochs: int = 2, checkpoint: Path | None = None) -> dict[str, Any]:
    strategy = ModelParallelStrategy(
        data_parallel_size=RANKS, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    return fit(folder, strategy, ranks=RANKS, epochs=epochs, checkpoint=checkpoint)


def one_process(folder: Path, *, epochs: int, checkpoint: Path | None = None) -> dict[str, Any]:
    return fit(folder, "auto", ranks=1, epochs=epochs, checkpoint=checkpoint)


def strategies(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    first = "epoch=0.ckpt"
    return {
        "ddp": lambda: ddp(folder / "ddp"),
        "fsdp": lambda: fsdp(folder / "shards", distributed=True),
        "fsdp, one file": lambda: fsdp(folder / "file", distributed=False, epochs=1),
        "fsdp, resumed from shards": lambda: fsdp(
            folder / "resumed", distributed=True, checkpoint=folder / "shards" / first
        ),
        "fsdp, resumed from one file": lambda: fsdp(
            folder / "resumed", distributed=False, checkpoint=folder / "file" / first
        ),
        "resumed from one process": lambda: ddp(folder / "resumed", checkpoint=folder / "one" / first),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What a run on several processes brought, per process."""
    one_process(folder / "one", epochs=1)
    return outcomes_of(folder, strategies)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["steps"] == expected["steps"] == 12
    for name, initial in Model().named_parameters():
        value = expected["weights"][name]
        difference = (found["weights"][name] - value).norm()
        assert difference <= 1e-5 * value.norm(), name
        assert difference < 1e-3 * (value - initial).norm(), name


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def saved(checkpoint: Path) -> dict[str, Any]:
    """The preconditioner's state in a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["callbacks"]["DoPr"]


Outcome = Callable[[str], list[dict[str, Any]]]


def test_fsdp_equals_ddp(outcome: Outcome) -> None:
    expected, _ = outcome("ddp")
    for found in outcome("fsdp"):
        assert_close(found, expected)


@pytest.mark.parametrize("form", ["shards", "one file"])
def test_fsdp_resumes_bit_for_bit(outcome: Outcome, form: str) -> None:
    for found, whole in zip(outcome(f"fsdp, resumed from {form}"), outcome("fsdp"), strict=True):
        assert found["steps"] == whole["steps"] == 12
        assert found["first"]["preconditioners"][0]["steps"] == 6
        assert_same(found["weights"], whole["weights"])
        assert_same(found["last"], whole["last"])


def test_two_processes_go_on_from_one(outcome: Outcome, folder: Path) -> None:
    uninterrupted, _ = outcome("ddp")
    for found in outcome("resumed from one process"):
        assert_same(found["first"], saved(folder / "one" / "epoch=0.ckpt"))
        assert_close(found, uninterrupted)


def test_one_process_goes_on_from_two(outcome: Outcome, folder: Path, tmp_path: Path) -> None:
    uninterrupted, _ = outcome("ddp")
    found = one_process(tmp_path, epochs=2, checkpoint=folder / "ddp" / "epoch=0.ckpt")
    assert_same(found["first"], saved(folder / "ddp" / "epoch=0.ckpt"))
    assert_close(found, uninterrupted)


def interrupted(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    return {"killed": lambda: ddp(folder / "killed", kill=9)}


def restarted(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    return {"restarted": lambda: ddp(folder / "restarted", checkpoint=folder / "killed" / "epoch=0.ckpt")}


def test_a_killed_rank_ends_the_job_and_a_restart_completes_it(outcome: Outcome, folder: Path, tmp_path: Path) -> None:
    processes = start(tmp_path, interrupted)
    deadline = time.monotonic() + PATIENCE + 30
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [1, -signal.SIGKILL]  # None: the survivor waits for ever
    with pytest.raises(RuntimeError, match=r"(?i)connection (closed|reset)|timed out"):
        raise torch.load(tmp_path / "0.pt", weights_only=False)["killed"]

    for process in start(tmp_path, restarted):
        process.join()
    for rank, whole in enumerate(outcome("ddp")):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)["restarted"]
        assert_same(found["weights"], whole["weights"])
        assert_same(found["last"], whole["last"])
