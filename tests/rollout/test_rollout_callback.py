from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faulty_environment
import lightning as L
import numpy as np
import pytest
import torch
import toy_views
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from scipy.stats import binomtest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from toy_environment import SPEC, Toy, forget, length

from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source
from dopr_lightning.data.module import DemonstrationData
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.callback import SELECTION_OFFSET, RolloutEvaluation
from dopr_lightning.rollout.statistics import bootstrap_interval
from dopr_lightning.saving import LastCheckpoint


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
        return Demonstrations(rng.normal(size=(40, 2)), rng.normal(size=(40, 1)), np.array([20, 40]), "toy")  # type: ignore[arg-type]


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


def test_success_is_a_rate_beside_the_metric(tmp_path: Path) -> None:
    """Reported of seeds 3 n: 3 of the 11 from 40 on."""
    run = trainer(tmp_path, [RolloutEvaluation(report_episodes=11, num_envs=4)])
    run.test(Constant(), datamodule=data(faulty_environment.SPEC), verbose=False)
    metrics = {name: value.item() for name, value in run.callback_metrics.items()}
    assert metrics["rollout/success"] == pytest.approx(3 / 11)
    wilson = binomtest(3, 11).proportion_ci(method="wilson")
    assert metrics["rollout/success_low"] == pytest.approx(wilson.low)
    assert metrics["rollout/success_high"] == pytest.approx(wilson.high)
    returns = [line["return"] for line in records(tmp_path)]
    assert metrics["rollout/return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics["rollout/ci95_low"] == pytest.approx(bootstrap_interval(returns)[0], rel=1e-5)

    spec = replace(faulty_environment.SPEC, metric="success")
    run = trainer(tmp_path / "as_metric", [RolloutEvaluation(report_episodes=11, num_envs=4)])
    run.test(Constant(), datamodule=data(spec), verbose=False)
    again = {name: value.item() for name, value in run.callback_metrics.items()}
    assert [again[f"rollout/{name}"] for name in ("success", "ci95_low", "ci95_high")] == [
        metrics[f"rollout/{name}"] for name in ("success", "success_low", "success_high")
    ]
    assert "rollout/return" not in again


def test_where_success_is_never_reported_there_is_no_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, [RolloutEvaluation(report_episodes=1, first_seed=41)])
    run.test(Constant(), datamodule=data(), verbose=False)
    assert {name for name in run.callback_metrics if name.startswith("rollout/")} == {
        f"rollout/{name}" for name in ("return", "ci95_low", "ci95_high", "episodes")
    }


def test_success_as_the_metric_is_decided_over_all_episodes(tmp_path: Path) -> None:
    """Reported of even seeds, and one of the three from 41 on is."""
    spec = replace(SPEC, metric="success")
    run = trainer(tmp_path, [RolloutEvaluation(report_episodes=3, first_seed=41, num_envs=1)])
    run.test(Constant(), datamodule=data(spec), verbose=False)
    assert run.callback_metrics["rollout/success"].item() == pytest.approx(1 / 3)
    run = trainer(tmp_path / "none", [RolloutEvaluation(report_episodes=1, first_seed=41)])
    with pytest.raises(UserError, match="DoprToy-v0 reports no 'is_success' in any of 1 episodes"):
        run.test(Constant(), datamodule=data(spec), verbose=False)


@pytest.mark.parametrize("fitted", [False, True], ids=["test alone", "test after a fit"])
def test_the_best_and_the_worst_are_filmed(tmp_path: Path, fitted: bool) -> None:
    pytest.importorskip("imageio_ffmpeg")
    tensorboard = TensorBoardLogger(tmp_path, name="", version="")
    callback = RolloutEvaluation(episodes=0, report_episodes=5, videos=2)
    run, model, task = trainer(tmp_path, [callback], logger=tensorboard), Constant(), data(faulty_environment.SPEC)
    if fitted:
        run.fit(model, datamodule=task)
    run.test(model, datamodule=task, verbose=False)
    ranked = sorted(records(tmp_path), key=lambda line: line["return"])
    shown = {"best": ranked[-1], "worst": ranked[0]}
    names = {path.name for path in (tmp_path / "videos").iterdir()}
    step = run.global_step
    assert names == {f"step-{step}-seed-{e['seed']}-return-{e['return']:.3g}.mp4" for e in shown.values()}

    events = EventAccumulator(str(tmp_path), {"images": 0})
    events.Reload()
    assert sorted(events.Tags()["images"]) == ["rollout/best", "rollout/worst"]
    for name, line in shown.items():
        (image,) = events.Images(f"rollout/{name}")
        gif = Image.open(io.BytesIO(image.encoded_image_string))
        assert gif.n_frames == 1 + -(-line["length"] // 2)  # type: ignore[attr-defined]  # 25 of 50 frames a second


def test_training_goes_on_without_films(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("imageio_ffmpeg")
    run = trainer(tmp_path, [RolloutEvaluation(episodes=3, videos=2)])
    with caplog.at_level(logging.WARNING):
        run.fit(Constant(), datamodule=data())
    warned = [message for message in caplog.messages if "no video" in message]
    assert len(warned) == 1
    assert "DoprToy-v0 cannot be made to render" in warned[0]
    assert len(records(tmp_path)) == 6


def test_no_encoder_for_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install 'dopr-lightning\[video\]'"):
        trainer(tmp_path, [RolloutEvaluation(videos=1)]).fit(Constant(), datamodule=data())
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_an_encoder_without_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on platforms whose wheels hold none: it was noticed by the first film, whose error ended the training."""
    utils = pytest.importorskip("imageio_ffmpeg._utils")
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    monkeypatch.setattr(utils, "_get_ffmpeg_exe", lambda: None)
    with pytest.raises(UserError, match="no films: No ffmpeg exe could be found"):
        trainer(tmp_path, [RolloutEvaluation(videos=1)]).fit(Constant(), datamodule=data(faulty_environment.SPEC))
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_workers(tmp_path: Path) -> None:
    """A failure on the way is in the record."""
    fault = {"fault": "raise", "seeds": [42], "folder": str(tmp_path / "attempts")}
    (tmp_path / "attempts").mkdir()
    run = trainer(tmp_path, [RolloutEvaluation(report_episodes=4, num_envs=2, workers=1)])
    spec = replace(faulty_environment.SPEC, kwargs=fault)
    run.test(Constant(), datamodule=data(spec), verbose=False)
    lines = records(tmp_path)
    assert {line["seed"]: line["restarts"] for line in lines} == {40: 0, 41: 0, 42: 1, 43: 0}
    calm = trainer(tmp_path / "calm", [RolloutEvaluation(report_episodes=4)])
    calm.test(Constant(), datamodule=data(faulty_environment.SPEC), verbose=False)
    assert [line | {"restarts": 0} for line in lines] == records(tmp_path / "calm")


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


@pytest.mark.parametrize("workers", [0, 1])
def test_sizes_are_compared_before_anything_is_trained(tmp_path: Path, workers: int) -> None:
    model = Constant()
    model.observation_dim = 3
    run = trainer(tmp_path, [RolloutEvaluation(episodes=0, report_episodes=1, workers=workers)])
    with pytest.raises(UserError, match=r"observations of shape \(3,\) .* but \S+ has \(2,\) and \(1,\)"):
        run.fit(model, datamodule=data(faulty_environment.SPEC))
    assert model.weight == 0
    run = trainer(tmp_path, [RolloutEvaluation(episodes=0, report_episodes=0)])
    run.fit(model, datamodule=data())  # there are no rollouts to fit
    assert model.weight == 8


def test_sizes_of_images_are_compared_before_anything_is_trained(tmp_path: Path) -> None:
    class Larger(toy_views.ToyViews):
        def load(self) -> Demonstrations:
            whole = super().load()
            return replace(whole, images={"front": whole.images["front"].repeat(2, axis=1)})  # type: ignore[index]

    model = Constant()
    with pytest.raises(UserError, match=r"camera 'front' are 24 x 12 in the data and 12 x 12 in DoprToyViews-v0"):
        trainer(tmp_path, [RolloutEvaluation()]).fit(model, datamodule=DemonstrationData(Larger(), batch_size=5))
    assert model.weight == 0


def test_cameras_are_compared_before_anything_is_trained(tmp_path: Path) -> None:
    model = Constant()
    model.cameras = ("front", "wrist")  # type: ignore[assignment]
    with pytest.raises(UserError, match="camera 'wrist', and DoprToyViews-v0 has front; name it in the cameras"):
        trainer(tmp_path, [RolloutEvaluation()]).fit(
            model, datamodule=DemonstrationData(toy_views.ToyViews(), batch_size=5)
        )
    assert model.weight == 0


@pytest.mark.parametrize(("saved", "validated"), [(None, 1), (3, 1), (4, 1), (None, 2)])
def test_checkpoints_by_rollouts_are_where_rollouts_are(tmp_path: Path, saved: int | None, validated: int) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="rollout/return", every_n_epochs=saved)
    run = trainer(
        tmp_path,
        [RolloutEvaluation(episodes=1, every_n_epochs=2), checkpoint],
        max_epochs=4,
        enable_checkpointing=True,
        check_val_every_n_epoch=validated,
    )
    model = Constant()
    if saved == 4 or validated == 2:
        run.fit(model, datamodule=data())
        assert checkpoint.best_model_path
    else:
        with pytest.raises(
            UserError, match=r"every \d epochs, and rollouts are every 2; set checkpoint.every_n_epochs"
        ):
            run.fit(model, datamodule=data())
        assert model.weight == 0


@pytest.mark.parametrize(
    ("episodes", "spec", "why"),
    [(0, SPEC, "rollout.episodes is 0"), (1, None, "the data name no environment")],
)
def test_no_checkpoint_is_chosen_by_rollouts_that_are_not(
    episodes: int, spec: EnvironmentSpec | None, why: str, tmp_path: Path
) -> None:
    class Source(ToySource):
        @property
        def environment(self) -> EnvironmentSpec | None:  # type: ignore[override]
            return spec

    checkpoint = ModelCheckpoint(tmp_path, monitor="rollout/return")
    run = trainer(tmp_path, [RolloutEvaluation(episodes=episodes), checkpoint], enable_checkpointing=True)
    model = Constant()
    with pytest.raises(UserError, match=f"chosen by 'rollout/return', and there are no rollouts: {why}; .*val/loss"):
        run.fit(model, datamodule=DemonstrationData(Source(), batch_size=5))
    assert model.weight == 0  # nothing was trained


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("episodes", -1),
        ("report_episodes", -1),
        ("first_seed", -1),
        ("every_n_epochs", 0),
        ("num_envs", 0),
        ("workers", -1),
        ("timeout_s", 0),
        ("videos", -1),
    ],
)
def test_counts_have_a_least(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name}={value}; must be at least {value + 1}"):
        RolloutEvaluation(**{name: value})


def test_no_episodes_are_no_rollouts(tmp_path: Path) -> None:
    """Neither on the way nor at the end; and nothing of an earlier evaluation is left to be taken for one."""
    callback = RolloutEvaluation(episodes=2, report_episodes=0)
    run = trainer(tmp_path, [callback])
    run.fit(Constant(), datamodule=data())
    seen = list(Toy.resets)
    assert len(callback.latest) == 2
    run.test(Constant(), datamodule=data(), verbose=False)
    assert Toy.resets == seen
    assert callback.latest == []
    run = trainer(tmp_path / "none", [RolloutEvaluation(episodes=0)])
    run.fit(Constant(), datamodule=data())
    assert Toy.resets == seen
    assert not any(name.startswith("rollout/") for name in run.callback_metrics)


@pytest.mark.parametrize(("processes", "episodes"), [(2, 5), (2, 1), (3, 7)])
def test_processes_share_the_seeds(tmp_path: Path, processes: int, episodes: int) -> None:
    """Also unequally, or when there are more processes than seeds."""

    class Note(Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            noted = {name: value.item() for name, value in trainer.callback_metrics.items()}
            (tmp_path / f"rank{trainer.global_rank}.json").write_text(json.dumps([Toy.resets, noted]))

    callbacks: list[Callback] = [RolloutEvaluation(episodes=episodes, num_envs=2), Note()]
    run = trainer(tmp_path, callbacks, devices=processes, strategy="ddp_fork", max_epochs=1, num_sanity_val_steps=0)
    run.fit(Constant(), datamodule=data())
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]
    seeds = [40 + SELECTION_OFFSET + i for i in range(episodes)]
    steps = -(-4 // processes)  # an epoch's, of which each raises the action by 0.01
    for rank, (run_here, noted) in enumerate(ranks):
        assert sorted(run_here) == seeds[rank::processes]
        assert str(noted) == str(ranks[0][1])  # as text: one episode's interval is nan
        assert noted["rollout/episodes"] == episodes
        wanted = np.mean([toy_return(s, steps / 100) for s in seeds])
        assert noted["rollout/return"] == pytest.approx(wanted, rel=1e-5)
    assert [line["seed"] for line in records(tmp_path)] == seeds


def test_a_failure_on_one_process_stops_both(tmp_path: Path) -> None:
    broken = replace(SPEC, kwargs={"fault": ("raise", 41 + SELECTION_OFFSET)})  # a seed of rank 1
    saver = LastCheckpoint(dirpath=tmp_path, save_last=True)
    callbacks: list[Callback] = [RolloutEvaluation(episodes=4), saver]
    options = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 1, "num_sanity_val_steps": 0}
    run = trainer(tmp_path, callbacks, **options | {"enable_checkpointing": True})
    with pytest.raises(Exception, match=rf"seed {41 + SELECTION_OFFSET}.*--ckpt_path .*last\.ckpt"):
        run.fit(Constant(), datamodule=data(broken))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
