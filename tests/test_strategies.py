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
from same import assert_same
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dopr_lightning import DoPr, configure_optimizers

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"ema": 0.5},
    "lowrank": {"ema": 0.5, "solver": "lowrank", "overlap": True},
    "woodbury": {"ema": 0.0},  # for few rows and one process; two have covariances
}
WIDTH = 73
"""Of the widest layer, more than one process has rows: what the low-rank and the Woodbury solver are for."""

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
        self.hidden = nn.Linear(6, WIDTH)
        self.readout = nn.Linear(WIDTH, 1)

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
    folder: Path,
    strategy: Strategy | str,
    *,
    ranks: int,
    epochs: int,
    checkpoint: Path | None,
    kill: int | None = None,
    setting: str = "exact",
) -> dict[str, Any]:
    """Train, and keep the weights, the preconditioner's state at the start and at the end, and a checkpoint.

    There is a checkpoint per epoch; ``kill`` is the step before which the last rank dies.
    """
    dopr = DoPr(damping=0.1, update_every=4, **SETTINGS[setting])
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


def ddp(
    folder: Path, *, checkpoint: Path | None = None, kill: int | None = None, setting: str = "exact"
) -> dict[str, Any]:
    strategy = DDPStrategy(timeout=timedelta(seconds=PATIENCE))
    return fit(folder, strategy, ranks=RANKS, epochs=2, checkpoint=checkpoint, kill=kill, setting=setting)


def fsdp(folder: Path, *, distributed: bool, epochs: int = 2, checkpoint: Path | None = None) -> dict[str, Any]:
    strategy = ModelParallelStrategy(
        data_parallel_size=RANKS, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    return fit(folder, strategy, ranks=RANKS, epochs=epochs, checkpoint=checkpoint)


def one_process(folder: Path, *, epochs: int, setting: str, checkpoint: Path | None = None) -> dict[str, Any]:
    return fit(folder, "auto", ranks=1, epochs=epochs, checkpoint=checkpoint, setting=setting)


def strategies(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    first = "epoch=0.ckpt"
    whole = {f"ddp, {name}": lambda name=name: ddp(folder / f"ddp, {name}", setting=name) for name in SETTINGS}
    resumed = {
        f"resumed from one process, {name}": lambda name=name: ddp(
            folder / "resumed", checkpoint=folder / f"one, {name}" / first, setting=name
        )
        for name in SETTINGS
    }
    sharded = {
        "fsdp": lambda: fsdp(folder / "shards", distributed=True),
        "fsdp, one file": lambda: fsdp(folder / "file", distributed=False, epochs=1),
        "fsdp, resumed from shards": lambda: fsdp(
            folder / "resumed", distributed=True, checkpoint=folder / "shards" / first
        ),
        "fsdp, resumed from one file": lambda: fsdp(
            folder / "resumed", distributed=False, checkpoint=folder / "file" / first
        ),
    }
    return whole | resumed | sharded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What a run on several processes brought, per process."""
    for name in SETTINGS:
        one_process(folder / f"one, {name}", epochs=1, setting=name)
    return outcomes_of(folder, strategies)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["steps"] == expected["steps"] == 12
    for name, initial in Model().named_parameters():
        value = expected["weights"][name]
        difference = (found["weights"][name] - value).norm()
        assert difference <= 1e-5 * value.norm(), name
        assert difference < 1e-3 * (value - initial).norm(), name


def saved(folder: Path) -> dict[str, Any]:
    """The preconditioner's state in the checkpoint after the first epoch."""
    return torch.load(folder / "epoch=0.ckpt", weights_only=True)["callbacks"]["DoPr"]


def of_layer(state: dict[str, Any], name: str) -> tuple[str, dict[str, Tensor]]:
    """Its solver, and what that keeps of it."""
    layer = state["preconditioners"][0]["layers"][name]
    return layer["solver"], layer["tensors"]


Outcome = Callable[[str], list[dict[str, Any]]]


def test_fsdp_equals_ddp(outcome: Outcome) -> None:
    expected, _ = outcome("ddp, exact")
    for found in outcome("fsdp"):
        assert_close(found, expected)


@pytest.mark.parametrize("form", ["shards", "one file"])
def test_fsdp_resumes_bit_for_bit(outcome: Outcome, form: str) -> None:
    for found, whole in zip(outcome(f"fsdp, resumed from {form}"), outcome("fsdp"), strict=True):
        assert found["steps"] == whole["steps"] == 12
        assert found["first"]["preconditioners"][0]["steps"] == 6
        assert_same(found["weights"], whole["weights"])
        assert_same(found["last"], whole["last"])


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_two_processes_go_on_from_one(outcome: Outcome, folder: Path, setting: str) -> None:
    uninterrupted, _ = outcome(f"ddp, {setting}")
    for found in outcome(f"resumed from one process, {setting}"):
        if setting != "woodbury":
            assert_same(found["first"], saved(folder / f"one, {setting}"))
        assert_close(found, uninterrupted)


def test_two_processes_make_an_inverse_of_the_rows_that_one_kept(outcome: Outcome, folder: Path) -> None:
    solver, kept = of_layer(saved(folder / "one, woodbury"), "readout.weight")
    factor = kept["factor"]
    assert (solver, factor.shape) == ("woodbury", (1, 8, WIDTH))
    for found in outcome("resumed from one process, woodbury"):
        solver, tensors = of_layer(found["first"], "readout.weight")
        assert solver == "exact"
        torch.testing.assert_close(tensors["inverse"], (torch.eye(WIDTH) - factor.mT @ factor) * kept["scale"])


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_one_process_goes_on_from_two(outcome: Outcome, folder: Path, tmp_path: Path, setting: str) -> None:
    uninterrupted, _ = outcome(f"ddp, {setting}")
    before = folder / f"ddp, {setting}"
    found = one_process(tmp_path, epochs=2, checkpoint=before / "epoch=0.ckpt", setting=setting)
    assert_same(found["first"], saved(before))
    assert_close(found, uninterrupted)


def test_the_low_rank_solver_left_directions_out(outcome: Outcome) -> None:
    for found in outcome("ddp, lowrank"):
        solver, tensors = of_layer(found["last"], "readout.weight")
        _, dim, tracked = tensors["basis"].shape
        assert solver == "lowrank"
        assert 0 < tensors["coefficients"].count_nonzero() <= tracked < dim == WIDTH


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
    for rank, whole in enumerate(outcome("ddp, exact")):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)["restarted"]
        assert_same(found["weights"], whole["weights"])
        assert_same(found["last"], whole["last"])
