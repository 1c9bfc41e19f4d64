"""``dopr fit`` under the configurations of ``trainer/``, with real processes: DDP and FSDP2 train as one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from ranks import RANKS, outcomes_of
from test_training import Kill, KilledError, assert_same, saved
from toy_task import DOPR, STEPS, train
from toy_views import VIEWS

from dopr_lightning import load_policy
from dopr_lightning.cli import main
from dopr_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

REGRESSION = "--model.algorithm=dopr_lightning.policies.algorithms.Regression"  # draws no noise, which ranks do apart
# AdamW would hide a gradient's scale, and it and little damping would show how gradients of 0 are rounded.
SGD = ("--trainer.callbacks.damping=1.0", "--model.optimizer.base=sgd", "--model.optimizer.lr=1e-4")
BUDGET = (*DOPR, "--trainer.max_steps=8", "--rollout.episodes=3")
ON_CPU = ("--trainer.accelerator=cpu", f"--trainer.devices={RANKS}", "--data.batch_size=6")
DDP = ("--config=trainer/ddp.yaml", *ON_CPU)
FSDP2 = ("--config=trainer/fsdp2.yaml", *ON_CPU)
# With one channel to a group and two steps in time, GroupNorm leaves but signs, and of gradients but their rounding.
UNET = (
    "--model.network=dopr_lightning.policies.networks.ConditionalUnet1d",
    "--model.network.channels=[8,16]",
    "--model.network.groups=1",
)


class Held(Callback):
    """How much of the network, and of its average, this process holds while it trains."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        average = next(c for c in trainer.callbacks if type(c).__name__ == "EMA")._average_model.module
        for which, module in (("trained", pl_module), ("average", average)):
            tensors = [getattr(p, "to_local", lambda p=p: p)() for p in module.network.parameters()]
            setattr(self, which, sum(t.numel() for t in tensors))


def held(folder: Path, *options: str) -> tuple[int, int]:
    held = Held()
    train(folder, *BUDGET, *options, callbacks=[held])
    return held.trained, held.average  # type: ignore[attr-defined]


def interrupted(folder: Path, *options: str) -> None:
    with pytest.raises(KilledError):
        train(folder, *BUDGET, *options, callbacks=[Kill(STEPS + 1)])
    train(folder, *BUDGET, *options, resume=folder / "last.ckpt")


def refusal(folder: Path, *options: str) -> str:
    with pytest.raises(UserError) as refused:
        train(folder, *options)
    return str(refused.value)


def runs(folder: Path) -> dict[str, Callable[[], Any]]:
    def run(name: str, *options: str) -> Callable[[], Any]:
        return lambda: held(folder / name, *options)

    shards = '--trainer.strategy={"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
    return {
        "shards": lambda: refusal(folder / "shards", *ON_CPU, shards),
        "ddp": run("ddp", *DDP, *SGD, REGRESSION),
        "fsdp2": run("fsdp2", *FSDP2, *SGD, REGRESSION),
        "ddp flow": run("ddp flow", *DDP),
        "fsdp2 flow": run("fsdp2 flow", *FSDP2),
        "fsdp2 resumed": lambda: interrupted(folder / "fsdp2 resumed", *FSDP2),
        "ddp unet": run("ddp unet", *DDP, *SGD, *UNET),
        "fsdp2 unet": run("fsdp2 unet", *FSDP2, *SGD, *UNET),
        "ddp views": run("ddp views", *DDP, *SGD, *VIEWS),
        "fsdp2 views": run("fsdp2 views", *FSDP2, *SGD, *VIEWS),
        "ddp muon": run("ddp muon", *DDP, "--model.optimizer.base=muon"),
        "fsdp2 muon": run("fsdp2 muon", *FSDP2, "--model.optimizer.base=muon"),
        "fsdp2 bf16, clipped": run(
            "bf16", *FSDP2, "--config=trainer/bf16.yaml", "--trainer.gradient_clip_val=10", "--trainer.max_steps=4"
        ),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scale")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Callable[[str], list[Any]]:
    return outcomes_of(folder, runs)


def episodes(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    return [(line["seed"], line["return"]) for line in map(json.loads, lines)]


PARTS = ("current_model_state", "state_dict")


def assert_close(one: Path, other: Path) -> None:
    """Trained weights and their average, as far as they have moved; and what it earns in rollouts."""
    a, b = saved(one), saved(other)
    assert a["global_step"] == b["global_step"]
    trained, average = (torch.cat([value.flatten() for value in a[part].values()]) for part in PARTS)
    moved = (trained - average).norm()
    for part in PARTS:
        assert a[part].keys() == b[part].keys()
        off = torch.cat([(value - b[part][name]).flatten() for name, value in a[part].items()])
        assert off.norm() <= 1e-3 * moved, part
    assert [seed for seed, _ in episodes(one)] == [seed for seed, _ in episodes(other)]
    for (_, mine), (_, its) in zip(episodes(one), episodes(other), strict=True):
        assert mine == pytest.approx(its, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_on_the_same_batches(
    strategy: str, outcome: Callable[[str], list[Any]], folder: Path, tmp_path: Path
) -> None:
    outcome(strategy)
    train(tmp_path, *BUDGET, REGRESSION, *SGD)
    assert_close(tmp_path, folder / strategy)
    assert len(episodes(tmp_path)) == 6


@pytest.mark.parametrize("what", ["flow", "unet", "views", "muon"])
def test_fsdp2_trains_as_ddp(what: str, outcome: Callable[[str], list[Any]], folder: Path) -> None:
    """Three episodes on two processes: one of them predicts more often than the other."""
    whole, parts = outcome(f"ddp {what}"), outcome(f"fsdp2 {what}")
    assert_close(folder / f"ddp {what}", folder / f"fsdp2 {what}")
    for kind in (0, 1):  # trained, and its average
        assert whole[0][kind] == whole[1][kind] == sum(part[kind] for part in parts)
        assert max(part[kind] for part in parts) < 0.8 * whole[0][kind]


def test_fsdp2_resumes_bit_for_bit(outcome: Callable[[str], list[Any]], folder: Path) -> None:
    outcome("fsdp2 flow"), outcome("fsdp2 resumed")
    assert_same(saved(folder / "fsdp2 flow"), saved(folder / "fsdp2 resumed"))


def test_bf16_and_clipping_stack_on_fsdp2(outcome: Callable[[str], list[Any]], folder: Path) -> None:
    outcome("fsdp2 bf16, clipped")
    held = saved(folder / "bf16")
    assert held["dopr"]["config"]["trainer"]["precision"] == "bf16-mixed"
    assert all(v.dtype == torch.float32 for k, v in held["state_dict"].items() if k.startswith("network."))


def test_a_checkpoint_of_fsdp2_is_like_any_other(
    outcome: Callable[[str], list[Any]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is judged and deployed by one process, and resumed by one."""
    outcome("fsdp2 flow")
    path = folder / "fsdp2 flow" / "last.ckpt"
    one, other = load_policy(path), load_policy(folder / "ddp flow" / "last.ckpt")
    for step in range(3):
        look = np.array([1.0, step])
        np.testing.assert_allclose(one.act(look), other.act(look), atol=1e-3)
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "--ckpt", str(path), "--trainer.enable_progress_bar=false"]) == 0
    assert "rollout/return" in capsys.readouterr().out
    train(tmp_path / "on", *DOPR, "--trainer.max_steps=12", resume=path)
    assert saved(tmp_path / "on")["global_step"] == 12


def test_shards_that_are_not_one_file_are_refused(outcome: Callable[[str], list[Any]]) -> None:
    for said in outcome("shards"):
        assert "save_distributed_checkpoint=False" in said
        assert "dopr_lightning.policies.sharding.FSDP2, which does" in said
