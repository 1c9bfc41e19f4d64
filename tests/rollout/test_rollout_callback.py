from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from toy_environment import SPEC, Toy, forget, length

from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.callback import SELECTION_OFFSET, RolloutEvaluation
from dopr_lightning.rollout.statistics import bootstrap_interval


@pytest.fixture(autouse=True)
def watch() -> None:
    forget()


class ToySource(Source):
    def __init__(self, spec: EnvironmentSpec = SPEC) -> None:
        self.spec = replace(spec, first_seed=40)

    @property
    def environment(self) -> EnvironmentSpec:
        return self.spec

    def load(self) -> Demonstrations:
        rng = np.random.default_rng(0)
        return Demonstrations(rng.normal(size=(40, 2)), rng.normal(size=(40, 1)), np.array([20, 40]), "toy", "")  # type: ignore[arg-type]


class Constant(L.LightningModule):
    """A policy whose action is its one weight; each step raises the weight by one, and it starts at 0."""

    observe, act, observation_dim, action_dim = 1, 1, 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.dropout = torch.nn.Dropout()
        self.acted: list[float] = []

    def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        assert not self.dropout.training
        assert not torch.is_grad_enabled()
        self.acted.append(self.weight.item())
        return (self.weight / 100).expand(len(observations), 1, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.dropout.training
        return -self.weight

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("seen", self.weight.detach())

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(folder: Path, callbacks: list[Callback], **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": CSVLogger(folder, name="", version=""),
        "default_root_dir": folder,
        "callbacks": callbacks,
    }
    return L.Trainer(**(settings | kwargs))


def data(spec: EnvironmentSpec = SPEC) -> DemonstrationData:
    return DemonstrationData(ToySource(spec), batch_size=5)  # 20 windows, 4 steps an epoch


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def toy_return(seed: int, action: float) -> float:
    """x_t = seed/2 + t a, summed over t = 1 .. n."""
    n = length(seed)
    return n * seed / 2 + action * n * (n + 1) / 2


def test_validation_and_test(tmp_path: Path) -> None:
    model = Constant()
    run = trainer(tmp_path, [RolloutEvaluation(episodes=6, report_episodes=9, num_envs=4)])
    run.fit(model, datamodule=data())
    selection = list(range(40 + SELECTION_OFFSET, 46 + SELECTION_OFFSET))
    assert sorted(Toy.resets) == sorted(selection * 2)  # two epochs, and none in the sanity check
    metrics = dict(run.callback_metrics)
    values = [toy_return(seed, 0.08) for seed in selection]  # after 8 steps
    assert metrics["rollout/return"].item() == pytest.approx(np.mean(values), rel=1e-6)
    low, high = bootstrap_interval(values)
    assert metrics["rollout/ci95_low"].item() == pytest.approx(low, rel=1e-6)
    assert metrics["rollout/ci95_high"].item() == pytest.approx(high, rel=1e-6)
    assert metrics["rollout/episodes"].item() == 6

    run.test(model, datamodule=data(), verbose=False)
    lines = records(tmp_path)
    assert [line["seed"] for line in lines] == selection * 2 + list(range(40, 49))
    assert [line["stage"] for line in lines] == ["validate"] * 12 + ["test"] * 9
    assert [line["step"] for line in lines[:12]] == [4] * 6 + [8] * 6
    assert all(line["environment"] == "DoprToy-v0" for line in lines)
    for line in lines[12:]:
        assert line["value"] == line["return"] == pytest.approx(toy_return(line["seed"], 0.08), rel=1e-6)
        assert line["length"] == length(line["seed"])
    assert run.callback_metrics["rollout/episodes"].item() == 9
    logged = (tmp_path / "metrics.csv").read_text()
    assert "rollout/return" in logged.splitlines()[0]


def test_a_chosen_first_seed(tmp_path: Path) -> None:
    run = trainer(tmp_path, [RolloutEvaluation(report_episodes=2, first_seed=7)])
    run.test(Constant(), datamodule=data(), verbose=False)
    assert [line["seed"] for line in records(tmp_path)] == [7, 8]


def test_the_averaged_weights_are_rolled_out(tmp_path: Path) -> None:
    model = Constant()
    run = trainer(tmp_path, [EMAWeightAveraging(decay=0.5), RolloutEvaluation(episodes=2)])
    run.fit(model, datamodule=data())
    # The first update copies; each later one goes half the way: 1, 1.5, 2.25, 3.125, and so on to 7.0...
    average, averages = 0.0, []
    for step in range(1, 9):
        average = float(step) if step == 1 else (average + step) / 2
        averages.append(average)
    rolled_out = list(dict.fromkeys(model.acted))
    assert rolled_out == [averages[3], averages[7]]
    assert run.callback_metrics["seen"].item() == averages[7]  # what validation saw, too


def test_averaging_listed_last_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, [RolloutEvaluation(), EMAWeightAveraging()])
    with pytest.raises(UserError, match="list EMAWeightAveraging before it"):
        run.fit(Constant(), datamodule=data())


def test_averaging_that_swaps_early_may_be_listed_last(tmp_path: Path) -> None:
    class Early(EMAWeightAveraging):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self._swap_models(pl_module)

        def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pass

    model = Constant()
    run = trainer(tmp_path, [RolloutEvaluation(episodes=2), Early(decay=0.5)], max_epochs=1, num_sanity_val_steps=0)
    run.fit(model, datamodule=data())
    assert set(model.acted) == {3.125}


def test_every_other_epoch(tmp_path: Path) -> None:
    run = trainer(tmp_path, [RolloutEvaluation(episodes=3, every_n_epochs=2)], max_epochs=5)
    run.fit(Constant(), datamodule=data())
    assert [line["epoch"] for line in records(tmp_path)] == [1] * 3 + [3] * 3
    run = trainer(tmp_path / "alone", [RolloutEvaluation(episodes=3, every_n_epochs=2)])
    run.validate(Constant(), datamodule=data(), verbose=False)  # asked for: always
    assert len(records(tmp_path / "alone")) == 3


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    """The global generator after a fit is the same with and without rollouts."""
    after = []
    for callbacks in ([], [RolloutEvaluation(episodes=2)]):
        torch.manual_seed(0)
        trainer(tmp_path, list(callbacks)).fit(Constant(), datamodule=data())
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_no_environment(tmp_path: Path) -> None:
    loader = data().train_dataloader()
    with pytest.raises(UserError, match="data module with an 'environment'"):
        trainer(tmp_path, [RolloutEvaluation()]).fit(Constant(), train_dataloaders=loader)


@pytest.mark.parametrize("name", ["episodes", "report_episodes", "every_n_epochs", "num_envs"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0"):
        RolloutEvaluation(**{name: 0})


@pytest.mark.parametrize("episodes", [5, 1])
def test_two_processes_share_the_seeds(tmp_path: Path, episodes: int) -> None:
    """Also when there are more processes than seeds."""

    class Note(Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            noted = {name: value.item() for name, value in trainer.callback_metrics.items()}
            (tmp_path / f"rank{trainer.global_rank}.json").write_text(json.dumps([Toy.resets, noted]))

    callbacks: list[Callback] = [RolloutEvaluation(episodes=episodes, num_envs=2), Note()]
    run = trainer(tmp_path, callbacks, devices=2, strategy="ddp_fork", max_epochs=1, num_sanity_val_steps=0)
    run.fit(Constant(), datamodule=data())
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    seeds = [40 + SELECTION_OFFSET + i for i in range(episodes)]
    assert sorted(first[0]) == seeds[::2]
    assert sorted(second[0]) == seeds[1::2]
    assert str(first[1]) == str(second[1])  # as text: one episode's interval is nan
    assert first[1]["rollout/episodes"] == episodes
    assert first[1]["rollout/return"] == pytest.approx(np.mean([toy_return(s, 0.02) for s in seeds]), rel=1e-5)
    assert [line["seed"] for line in records(tmp_path)] == seeds


def test_a_failure_on_one_process_stops_both(tmp_path: Path) -> None:
    broken = replace(SPEC, kwargs={"fault": ("raise", 41 + SELECTION_OFFSET)})  # a seed of rank 1
    callbacks: list[Callback] = [RolloutEvaluation(episodes=4)]
    run = trainer(tmp_path, callbacks, devices=2, strategy="ddp_fork", max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(Exception, match=f"seed {41 + SELECTION_OFFSET}"):
        run.fit(Constant(), datamodule=data(broken))
