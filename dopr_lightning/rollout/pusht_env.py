"""gym-pusht with images, observed as policies with cameras observe: what PushT's image policies are judged in."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gym_pusht.envs.pusht import PushTEnv
from gymnasium.spaces import Box, Dict

from dopr_lightning.data.pusht_archive import CAMERA, SIZE


class PushTImages(gymnasium.ObservationWrapper[dict[str, Any], Any, dict[str, Any]]):
    """Observes the agent's place and the scene, as Diffusion Policy's image task does.

    Args:
        env: gym-pusht's environment with ``obs_type="pixels_agent_pos"``.
    """

    def __init__(self, env: gymnasium.Env[dict[str, Any], Any]) -> None:
        super().__init__(env)
        frames = Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.observation_space = Dict({"state": Box(0, 512, (2,), np.float32), "images": Dict({CAMERA: frames})})

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Give gym-pusht's observation the names and types that all our environments with cameras have."""
        state = np.asarray(observation["agent_pos"], dtype=np.float32)
        return {"state": state, "images": {CAMERA: observation["pixels"]}}


def _make(**kwargs: Any) -> PushTImages:
    return PushTImages(PushTEnv(obs_type="pixels_agent_pos", **kwargs))


gymnasium.register(id="dopr/PushTImages-v0", entry_point=_make)
