"""A task that trains in a second: demonstrations for the toy environment, and a configuration for ``dopr``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from toy_environment import SPEC

from dopr_lightning.data import Demonstrations, EnvironmentSpec, Source

CONFIG = str(Path(__file__).with_name("toy_task.yaml"))


class ToyTask(Source):
    """Somebody walks x to 0: 6 episodes of 12 steps. Observes (x, steps since reset).

    Args:
        observation_dim: More than 2 appends zeros, which the environment does not have.
    """

    def __init__(self, observation_dim: int = 2) -> None:
        self.observation_dim = observation_dim

    @property
    def environment(self) -> EnvironmentSpec:
        return replace(SPEC, first_seed=40)

    def load(self) -> Demonstrations:
        observations, actions = [], []
        for start in np.linspace(-3, 3, 6):
            x = start
            for t in range(12):
                action = np.clip(-x / 2, -1, 1)
                observations.append([x, t, *[0.0] * (self.observation_dim - 2)])
                actions.append([action])
                x += action
        return Demonstrations(
            np.array(observations, np.float32), np.array(actions, np.float32), np.arange(12, 73, 12), "toy", "abc"
        )
