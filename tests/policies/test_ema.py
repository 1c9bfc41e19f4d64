from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dopr_lightning.errors import UserError
from dopr_lightning.policies.ema import EMA, ema_decay, ema_update
from dopr_lightning.policies.normalizer import Normalizer

STEPS = 5  # per epoch


class Model(pl.LightningModule):
    """A line through noise, in float64, with a normaliser fitted in ``setup`` and a counter."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.normalizer = Normalizer(3, "standard")
        self.line = nn.Linear(3, 1, dtype=torch.float64)
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        nn.init.constant_(self.line.weight, 5.0)
        nn.init.zeros_(self.line.bias)
        self.trained: list[np.ndarray] = []
        self.validated: list[np.ndarray] = []

    def setup(self, stage: str) -> None:
        self.normalizer.fit({"mean": torch.full((3,), 0.1), "std": torch.full((3,), 0.3)})

    def weight(self) -> np.ndarray:
        return self.line.weight.detach().numpy().copy()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.counter += 1
        x, y = batch
        return (self.line(self.normalizer(x)) - y).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.trained.append(self.weight())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        assert self.normalizer(batch[0]).isfinite().all()  # the averaged copy has the fitted statistics too

    def on_validation_epoch_end(self) -> None:  # Lightning calls this after every callback's
        self.validated.append(self.weight())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.3)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS * 4, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(STEPS * 4, 1, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(epochs: int, folder: Path, *callbacks: Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(trainer: pl.Trainer, model: Model, **kwargs: Any) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader(), loader(), **kwargs)
    return model


def recursion(weights: list[np.ndarray], decay: float, power: float) -> list[np.ndarray]:
    """The definition, in float64 numpy: the average after each update."""
    averages = [weights[0]]
    for n, weight in enumerate(weights[1:], start=1):
        d = min(decay, 1 - (1 + n) ** -power)
        averages.append(d * averages[-1] + (1 - d) * weight)
    return averages


@pytest.mark.parametrize(("decay", "power"), [(0.999, 0.75), (0.5, 0.75), (0.9, 2.0)])
def test_average_is_the_recursion_and_what_validation_sees(tmp_path: Path, decay: float, power: float) -> None:
    model = fit(trainer(3, tmp_path, EMA(decay, power)), Model())
    averages = recursion(model.trained, decay, power)
    np.testing.assert_allclose(model.weight(), averages[-1], rtol=1e-12)
    assert np.abs(model.weight() - model.trained[-1]).max() > 1e-3
    sanity_check, *epochs = model.validated
    np.testing.assert_array_equal(sanity_check, np.full((1, 3), 5.0))
    np.testing.assert_allclose(epochs, averages[STEPS - 1 :: STEPS], rtol=1e-12)


def test_the_average_is_as_precise_as_the_trainers_weights(tmp_path: Path) -> None:
    options = {"precision": "64-true", "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False}
    run = pl.Trainer(**options, callbacks=[EMA()], default_root_dir=tmp_path)  # type: ignore[arg-type]
    model = fit(run, Model().float())
    assert model.weight().dtype == np.float64
    np.testing.assert_allclose(model.weight(), recursion(model.trained, 0.999, 0.75)[-1], rtol=1e-12)


def test_agrees_with_diffusers() -> None:
    weights = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = EMAModel([nn.Parameter(weights[0])], decay=0.9, use_ema_warmup=True, power=0.75)
    ours = weights[0].clone()
    for n, weight in enumerate(weights):
        theirs.step([nn.Parameter(weight)])
        ema_update([ours], [weight], n, decay=0.9, warmup_power=0.75)
        torch.testing.assert_close(ours, theirs.shadow_params[0])


def test_warm_up_reaches_the_limit() -> None:
    assert ema_decay(0, 0.999, 0.75) == 0
    assert ema_decay(1, 0.999, 0.75) == pytest.approx(1 - 2**-0.75)
    assert ema_decay(9_000, 0.999, 0.75) < 0.999
    assert ema_decay(10_001, 0.999, 0.75) == 0.999


def test_training_does_not_notice(tmp_path: Path) -> None:
    plain = fit(trainer(3, tmp_path), Model())
    averaged = fit(trainer(3, tmp_path, EMA()), Model())
    np.testing.assert_array_equal(averaged.trained, plain.trained)


def test_buffers_do_not_drift_and_counters_are_copied(tmp_path: Path) -> None:
    model = fit(trainer(40, tmp_path, EMA()), Model())
    assert torch.equal(model.normalizer.offset, torch.full((3,), 0.1))
    assert torch.equal(model.normalizer.scale, torch.full((3,), 0.3))
    assert model.normalizer.fitted
    assert model.counter == 40 * STEPS


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), (part, name)


@pytest.mark.parametrize("saved", ["end of epoch", "end of validation", "after fit"])
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, saved: str) -> None:
    whole = trainer(4, tmp_path, EMA(0.9))
    fit(whole, Model())
    whole.save_checkpoint(tmp_path / "whole.ckpt")

    keep = ModelCheckpoint(tmp_path / "part", save_last=True, save_on_train_epoch_end=saved == "end of epoch")
    first = trainer(2, tmp_path, EMA(0.9), keep)
    fit(first, Model())
    path = tmp_path / "part" / "last.ckpt"
    if saved == "after fit":
        path = tmp_path / "after.ckpt"
        first.save_checkpoint(path)
    second = trainer(4, tmp_path, EMA(0.9))
    fit(second, Model(), ckpt_path=path)
    second.save_checkpoint(tmp_path / "resumed.ckpt")
    assert_same(*(torch.load(tmp_path / f, weights_only=True) for f in ("whole.ckpt", "resumed.ckpt")))


def test_a_finished_run_that_is_resumed_ends_with_the_average(tmp_path: Path) -> None:
    first = trainer(2, tmp_path, EMA(0.9))
    average = fit(first, Model()).weight()
    first.save_checkpoint(tmp_path / "finished.ckpt")
    again = fit(trainer(2, tmp_path, EMA(0.9)), Model(), ckpt_path=tmp_path / "finished.ckpt")
    np.testing.assert_array_equal(again.weight(), average)


def test_checkpoint_holds_the_average_for_whoever_loads_it(tmp_path: Path) -> None:
    run = trainer(2, tmp_path, EMA())
    model = fit(run, Model())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    np.testing.assert_array_equal(checkpoint["state_dict"]["line.weight"], model.weight())
    np.testing.assert_array_equal(checkpoint["current_model_state"]["line.weight"], model.trained[-1])
    loaded = Model()
    loaded.load_state_dict(checkpoint["state_dict"])
    assert loaded.normalizer.fitted
    np.testing.assert_array_equal(loaded.weight(), model.weight())


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_validating_after_fit_sees_the_average(tmp_path: Path, from_checkpoint: bool) -> None:
    run = trainer(2, tmp_path, EMA())
    model = fit(run, Model())
    average = model.weight()
    run.save_checkpoint(tmp_path / "a.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.validate(model, loader(), ckpt_path=tmp_path / "a.ckpt" if from_checkpoint else None, verbose=False)
    np.testing.assert_array_equal(model.validated[-1], average)
    np.testing.assert_array_equal(model.weight(), average)


def test_checkpoint_saved_while_the_average_is_in_place(tmp_path: Path) -> None:
    class SaveDuringValidation(Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    model = fit(trainer(2, tmp_path, SaveDuringValidation(), EMA()), Model())
    checkpoint = torch.load(tmp_path / "during.ckpt", weights_only=True)
    np.testing.assert_array_equal(checkpoint["current_model_state"]["line.weight"], model.trained[-1])
    np.testing.assert_array_equal(checkpoint["state_dict"]["line.weight"], model.validated[-1])


def test_the_same_callback_serves_a_second_fit(tmp_path: Path) -> None:
    ema = EMA()
    fit(trainer(2, tmp_path, ema), Model())
    model = fit(trainer(2, tmp_path, ema), Model())
    np.testing.assert_allclose(model.weight(), recursion(model.trained, 0.999, 0.75)[-1], rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"decay": 1.0}, "decay must be at least 0 and below 1, got 1.0"), ({"warmup_power": 0}, "must be positive")],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EMA(**arguments)


def test_weights_of_half_precision_are_refused(tmp_path: Path) -> None:
    run = pl.Trainer(
        precision="bf16-true", accelerator="cpu", devices=1, callbacks=[EMA()], logger=False, default_root_dir=tmp_path
    )
    with pytest.raises(UserError, match=r"precision=bf16-true the average would stand still.*use bf16-mixed"):
        fit(run, Model())
