"""The policy learns, goes on from a checkpoint, and missing data is named."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from {{ cookiecutter.package }}.train import CLI, main

Train = Callable[[str], CLI]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """What `make train` runs, on 256 steps (one batch) of a known expert."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((256, 6))
    actions = np.tanh(observations @ rng.standard_normal((6, 2)))
    np.savez(tmp_path / "demos.npz", observations=observations, actions=actions)
    monkeypatch.chdir(tmp_path)

    def run(options: str) -> CLI:
        command = "train fit --data.path demos.npz --trainer.max_epochs 40"
        fixed_order = "--trainer.overfit_batches 1 --trainer.accelerator cpu"
        monkeypatch.setattr(sys, "argv", f"{command} {fixed_order} {options}".split())
        return main()

    return run


def test_the_loss_falls_and_training_resumes(train: Train) -> None:
    whole = train(
        "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.dirpath=. "
        "--trainer.callbacks.every_n_epochs=20 --trainer.callbacks.save_top_k=-1"
    )
    idle = whole.datamodule.actions.square().mean()  # the loss of doing nothing
    assert whole.trainer.callback_metrics["loss"] < idle / 2

    resumed = train("--ckpt_path epoch=19-step=20.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 40
    for name, weight in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name


def test_missing_data_is_named(train: Train) -> None:
    with pytest.raises(SystemExit, match=r"absent\.npz: no such file"):
        train("--data.path absent.npz")
