"""The toy task seen by a camera: the shade of a small picture says where x is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict
from toy_environment import Toy
from toy_task import ToyTask

from dopr_lightning.data import Demonstrations, EnvironmentSpec

SIDE = 12
# Of ``dopr fit``, to follow the toy task's configuration.
VIEWS = (
    "--data.source=toy_views.ToyViews",
    "--model.network=dopr_lightning.policies.networks.VisionMLP",
    "--model.network.cameras=[front]",
    "--model.network.encoder_width=8",
    "--model.network.crop=10",
    "--model.network.width=8",
    "--model.network.depth=1",
)


def picture(x: float) -> Any:
    frame = np.full((SIDE, SIDE, 3), np.clip(128 + 30 * x, 0, 255), np.uint8)
    frame[::3, :, 1] = 255
    return frame


class Seen(gymnasium.ObservationWrapper[Any, Any, Any]):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        front = Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.observation_space = Dict({"state": env.observation_space, "images": Dict({"front": front})})

    def observation(self, observation: Any) -> Any:
        return {"state": observation, "images": {"front": picture(observation[0])}}


class ToyViews(ToyTask):
    @property
    def environment(self) -> EnvironmentSpec:
        return replace(super().environment, id="DoprToyViews-v0", module="toy_views", cameras=("front",))

    def load(self) -> Demonstrations:
        data = super().load()
        return replace(data, images={"front": np.stack([picture(x) for x in data.observations[:, 0]])})


gymnasium.register("DoprToyViews-v0", entry_point=lambda **kwargs: Seen(Toy(**kwargs)))
