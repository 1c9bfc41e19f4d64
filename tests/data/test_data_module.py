from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DistributedSampler

from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError


class Numbered(Source):
    """Ten episodes of twelve steps; row i observes (i, 0, -i) and acts (i,)."""

    def __init__(self) -> None:
        self.loads = 0

    @property
    def environment(self) -> EnvironmentSpec:
        return EnvironmentSpec("Hopper-v5", max_steps=10, metric="return")

    def load(self) -> Demonstrations:
        self.loads += 1
        rows = np.arange(120, dtype=np.float32)
        return Demonstrations(
            np.stack([rows, 0 * rows, -rows], 1), rows[:, None], np.arange(12, 132, 12), "numbered", "abc"
        )


class Recorder(L.LightningModule):
    """Notes the rows of every batch and draws noise from the global generator, as a flow policy does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[tuple[int, list[int]]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.trained.append((self.current_epoch, batch["action"][:, 0, 0].int().tolist()))
        return (self.weight - torch.randn(())) ** 2

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validated += batch["action"][:, 0, 0].int().tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "num_sanity_val_steps": 0,
}


def fit(folder: Path, epochs: int, resume: Path | None = None, seed: int = 0, workers: int = 0) -> Recorder:
    torch.manual_seed(123)
    model = Recorder()
    keep_all = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=keep_all, **QUIET)
    data = DemonstrationData(Numbered(), batch_size=16, seed=seed, num_workers=workers)
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return model


def test_every_training_row_once_per_epoch_in_a_new_order(tmp_path: Path) -> None:
    model = fit(tmp_path, epochs=3)
    epochs = [[row for epoch, rows in model.trained if epoch == e for row in rows] for e in range(3)]
    held_out = set(model.validated)
    for rows in epochs:
        assert len(rows) == len(set(rows)) == 96  # 108 windows, six whole batches of 16
        assert not held_out & set(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({min(held_out), max(held_out) - 11}) == 1  # one whole episode...
    assert len(held_out) == 12
    assert model.validated == sorted(held_out) * 3  # ... in order, each epoch


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", epochs=3).trained
    resumed = fit(tmp_path / "second", epochs=3, resume=tmp_path / "whole" / "epoch=0.ckpt").trained
    assert resumed == [step for step in whole if step[0] >= 1]
    assert fit(tmp_path / "other", epochs=1, seed=1).trained != [step for step in whole if step[0] == 0]


class BeforeTraining(Callback):
    """Saves when a batch has been read and not been trained on, as a preempted run does."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


def test_a_run_that_left_before_an_epochs_last_batch_goes_on_with_that(tmp_path: Path) -> None:
    data = DemonstrationData(Numbered(), batch_size=16)
    whole, resumed = Recorder(), Recorder()
    common: dict[str, Any] = {"max_epochs": 2, "default_root_dir": tmp_path, "enable_checkpointing": False, **QUIET}
    L.Trainer(callbacks=BeforeTraining(), **common).fit(whole, datamodule=data)
    L.Trainer(**common).fit(resumed, datamodule=data, ckpt_path=tmp_path / "5.ckpt", weights_only=True)
    assert resumed.trained == whole.trained[5:]


def test_loading_does_not_touch_the_global_generator() -> None:
    for workers in (0, 1):
        data = DemonstrationData(Numbered(), batch_size=16, num_workers=workers)
        loader = data.train_dataloader()
        before = torch.get_rng_state()
        list(loader)
        list(data.val_dataloader())
        assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_the_same_batches() -> None:
    batches = []
    for workers in (0, 2):
        loader = DemonstrationData(Numbered(), batch_size=16, num_workers=workers).train_dataloader()
        batches.append([batch["action"][:, 0, 0].tolist() for batch in loader])
    assert batches[0] == batches[1]


def test_fewer_training_episodes_keep_the_validation_set() -> None:
    def rows(data: DemonstrationData, which: int) -> set[float]:
        return set(data._split[which].actions[:, 0].tolist())

    everything = DemonstrationData(Numbered(), batch_size=4, validation_episodes=3)
    few = DemonstrationData(Numbered(), batch_size=4, validation_episodes=3, episodes=2, seed=5)
    assert rows(few, 1) == rows(everything, 1)
    assert len(rows(few, 0)) == 24
    assert rows(few, 0) < rows(everything, 0)
    assert rows(everything, 0) | rows(everything, 1) == set(range(120))
    chosen = [few._split[side].numbers.tolist() for side in (0, 1)]
    assert few.provenance == {
        "source": "numbered",
        "sha256": "abc",
        "train_episodes": 2,
        "train_steps": 24,
        "validation_episodes": 3,
        "validation_steps": 36,
        "split_sha256": hashlib.sha256(json.dumps(chosen).encode()).hexdigest(),
    }


def test_statistics_are_of_the_training_rows() -> None:
    data = DemonstrationData(Numbered(), validation_episodes=1, episodes=1)
    rows = torch.from_numpy(data._split[0].actions[:, 0])
    statistics = data.statistics()
    # Twelve consecutive numbers: variance (n^2 - 1) / 12.
    expected_std = ((144 - 1) / 12) ** 0.5
    first = rows.min().item()
    torch.testing.assert_close(statistics["action"]["mean"], torch.tensor([first + 5.5]))
    torch.testing.assert_close(statistics["action"]["std"], torch.tensor([expected_std]))
    torch.testing.assert_close(statistics["observation"]["min"], torch.tensor([first, 0, -first - 11]))
    torch.testing.assert_close(statistics["observation"]["max"], torch.tensor([first + 11, 0, -first]))
    torch.testing.assert_close(statistics["observation"]["std"], torch.tensor([expected_std, 0, expected_std]))
    assert {value.dtype for group in statistics.values() for value in group.values()} == {torch.float32}


def test_dimensions_and_environment_load_once() -> None:
    source = Numbered()
    data = DemonstrationData(source, batch_size=8)
    assert source.loads == 0
    assert data.environment.id == "Hopper-v5"
    assert source.loads == 0
    assert (data.observation_dim, data.action_dim) == (3, 1)
    data.train_dataloader(), data.val_dataloader(), data.statistics()
    assert source.loads == 1


def test_a_source_that_returns_no_demonstrations_is_named() -> None:
    class Forgetful(Numbered):
        def load(self) -> Demonstrations:
            return super().load().observations  # type: ignore[return-value]

    with pytest.raises(UserError, match=r"Forgetful\.load\(\) returned a ndarray, and must return Demonstrations"):
        DemonstrationData(Forgetful()).train_dataloader()


def test_a_held_out_episode_that_is_too_short_is_said_before_training() -> None:
    class Short(Numbered):
        def load(self) -> Demonstrations:
            whole = super().load()
            last = whole.split(1, 0)[1].numbers[0]  # type: ignore[index]
            parts = [whole._select(np.array([e])) for e in range(10)]
            cut = [part.actions[: 3 if e == last else None] for e, part in enumerate(parts)]
            return Demonstrations(np.concatenate(cut), np.concatenate(cut), np.cumsum([len(c) for c in cut]), "short")

    with pytest.raises(UserError, match="has 3 steps, too few for a window of horizon=4"):
        DemonstrationData(Short(), batch_size=8, horizon=4).train_dataloader()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DemonstrationData(Numbered(), batch_size=109).train_dataloader(), "108 training windows; use 108 or"),
        (lambda: DemonstrationData(Numbered(), batch_size=0), "batch_size=0"),
        (lambda: DemonstrationData(Numbered(), episodes=10).train_dataloader(), "10 episodes asked for, 9 there"),
        (lambda: DemonstrationData(Numbered(), validation_episodes=10).observation_dim, "cannot hold out 10"),
    ],
)
def test_mistakes(make: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_lightning_keeps_the_sampler_under_ddp(tmp_path: Path) -> None:
    """Two ranks share an epoch's rows without overlap, in the order a sampler of two replicas gives."""
    trainer = L.Trainer(
        max_epochs=2,
        strategy="ddp_fork",
        devices=2,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(Writer(tmp_path), datamodule=DemonstrationData(Numbered(), batch_size=16, seed=3))
    seen = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert sorted(seen) == ["0", "1"]
    for epoch in range(2):
        shares = [[row for e, rows in seen[rank] if e == epoch for row in rows] for rank in ("0", "1")]
        assert [len(share) for share in shares] == [48, 48]
        assert not set(shares[0]) & set(shares[1])
        reference: DistributedSampler[Any] = DistributedSampler(range(108), num_replicas=2, rank=1, seed=3)  # type: ignore[arg-type]
        reference.set_epoch(epoch)
        train_rows = DemonstrationData(Numbered())._split[0].actions[:, 0]
        assert shares[1] == [int(train_rows[i]) for i in list(reference)[:48]]


class Writer(Recorder):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.trained))
