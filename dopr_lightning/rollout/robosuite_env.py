"""robosuite as a Gymnasium environment: what a policy on robomimic's demonstrations is judged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict, Space

from dopr_lightning.data.robomimic.controllers import action_bounds
from dopr_lightning.data.robomimic.rotations import actions_from_six
from dopr_lightning.data.robomimic.simulator import Simulator
from dopr_lightning.errors import UserError

Array = npt.NDArray[Any]

FILM_CAMERA = "agentview"
FILM_SIZE = 256


class RobosuiteEnv(gymnasium.Env[Any, Array]):
    """A robomimic task.

    The reward is 1 where the task is solved, and ends the episode; ``info["is_success"]`` says the same.

    Args:
        env_args: What the demonstrations' file says of its environment.
        keys: Low-dimensional observations, concatenated in this order.
        absolute: Actions are poses with 6-D rotations, 10 numbers per arm; else the offsets of the file.
        images: Cameras to observe, with the side of their images. With any, an observation is
            ``{"state": ..., "images": {camera: (side, side, 3) uint8}}``. Needs off-screen OpenGL.
        render_mode: ``"rgb_array"`` to film, which needs it too.

    Raises:
        UserError: The simulator cannot be made, or does not observe one of the keys.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  # as Gymnasium wants it

    def __init__(
        self,
        env_args: Mapping[str, Any],
        keys: Sequence[str],
        absolute: bool = False,
        images: Mapping[str, int] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self._absolute = absolute
        self._keys = tuple(keys)
        self._images = dict(images or {})
        film = [FILM_CAMERA] if render_mode == "rgb_array" else []
        self._simulator = Simulator(env_args, absolute, [*self._images, *film])
        seen = self._simulator.observe()
        for key in self._keys:
            if key not in seen:
                self.close()
                raise UserError(f"robosuite observes no {key!r}; choose keys from: {', '.join(sorted(seen))}")
        size = sum(len(seen[key]) for key in self._keys)
        state = Box(-np.inf, np.inf, (size,), np.float32)
        views: dict[str, Space[Any]] = {
            camera: Box(0, 255, (side, side, 3), np.uint8) for camera, side in self._images.items()
        }
        self.observation_space = Dict({"state": state, "images": Dict(views)}) if views else state
        low, high = action_bounds(env_args, absolute)
        self.action_space = Box(low.astype(np.float32), high.astype(np.float32), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode whose initial state is a function of the seed."""
        super().reset(seed=seed)
        self._simulator.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self._observe(), {}

    def step(self, action: Array) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act for 1/20 s."""
        wide = np.asarray(action, dtype=np.float64)
        solved = self._simulator.step(actions_from_six(wide) if self._absolute else wide)
        return self._observe(), float(solved), solved, False, {"is_success": solved}

    def render(self) -> Array:
        """The scene, (256, 256, 3) uint8."""
        return self._simulator.render(FILM_CAMERA, FILM_SIZE)

    def close(self) -> None:
        """Free the simulator."""
        self._simulator.close()

    def _observe(self) -> Any:
        seen = self._simulator.observe()
        state = np.concatenate([seen[key] for key in self._keys]).astype(np.float32)
        if not self._images:
            return state
        images = {camera: self._simulator.render(camera, side) for camera, side in self._images.items()}
        return {"state": state, "images": images}


gymnasium.register(id="dopr/Robosuite-v0", entry_point=f"{__name__}:RobosuiteEnv")
