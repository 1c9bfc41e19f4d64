"""A task that trains in a second: demonstrations for the toy environment, its configuration, and a way to run it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from toy_environment import SPEC

from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source
from dopr_lightning.training import CLI, quiet

CONFIG = str(Path(__file__).with_name("toy_task.yaml"))
DOPR = ("--trainer.callbacks+=dopr_lightning.DoPr", "--trainer.callbacks.update_every=3", "--trainer.callbacks.ema=0.5")
FIRST_SEED = 40
STEPS = 4  # an epoch: 5 training episodes of 11 windows, 12 to a batch

torch.set_num_threads(1)  # at these sizes threads only wait for each other, in worker processes too


class ToyTask(Source):
    """Somebody walks x to 0: 6 episodes of 12 steps. Observes (x, steps since reset).

    Args:
        observation_dim: More than 2 appends zeros, which the environment does not have.
    """

    def __init__(self, observation_dim: int = 2) -> None:
        self.observation_dim = observation_dim

    @property
    def environment(self) -> EnvironmentSpec:
        return replace(SPEC, first_seed=FIRST_SEED)

    def load(self) -> Demonstrations:
        observations, actions = [], []
        for x in np.linspace(-3, 3, 6):
            for t in range(12):
                action = np.clip(-x / 2, -1, 1)
                observations.append([x, t, *[0.0] * (self.observation_dim - 2)])
                actions.append([action])
                x += action
        ends = np.arange(12, 73, 12)
        return Demonstrations(np.array(observations), np.array(actions), ends, "toy", "abc")  # type: ignore[arg-type]


class Nowhere(ToyTask):
    """The same demonstrations, and no environment yet."""

    @property
    def environment(self) -> None:
        return None


class Killer(ToyTask):
    """Ends the process that loads it, as the kernel does when memory runs out."""

    def load(self) -> Demonstrations:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def arguments(folder: Path, *overrides: str) -> list[str]:
    """Of ``dopr fit``: checkpoints go to ``folder``, and nothing is printed."""
    return [
        f"--config={CONFIG}",
        f"--checkpoint.dirpath={folder}",
        f"--trainer.default_root_dir={folder}",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        *overrides,
    ]


def train(folder: Path, *overrides: str, callbacks: list[Callback] | None = None, resume: Path | None = None) -> Any:
    """What ``dopr fit`` does, in this process; returns its CLI. The last checkpoint is ``folder / "last.ckpt"``."""
    quiet()
    cli: Any = CLI(arguments(folder, *overrides), run=False)
    cli.trainer.callbacks += callbacks or []
    torch.rand(torch.seed() % 7)  # whatever the global generator holds now must not matter
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume)
    return cli
