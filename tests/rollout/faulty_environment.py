"""A random walk that observes, renders and fails as it is told; made in worker processes too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from dopr_lightning.data.environment import EnvironmentSpec

SPEC = EnvironmentSpec("DoprFaulty-v0", max_steps=20, metric="return", module="faulty_environment")


class Faulty(gymnasium.Env[Any, Any]):
    """x <- x + a / 10 + noise; observes (x, steps); the reward is x.

    All its randomness is of the episode's generator, which a reset without a seed would let run on. Observations are
    always the same arrays, overwritten. Episodes last 5 + seed % 3 steps; those of multiples of 3 succeed.

    Args:
        fault: What goes wrong: ``raise``, ``die``, ``exit`` or ``hang``, at step 3, after which it is of no more use;
            ``reset``: it dies there; ``make``: when made; ``drift``: each episode starts elsewhere; ``blind``: nothing
            is rendered; ``close``: it cannot be closed.
        seeds: In which episodes.
        times: How often in each.
        folder: Where to count that, over processes.
        cameras: To observe, each of another colour.
        size: Height and width of frames.
        render_mode: As Gymnasium has it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012  # as Gymnasium wants it
    episodes = closed = 0

    def __init__(
        self,
        fault: str = "",
        seeds: Sequence[int] = (),
        times: int = 1,
        folder: str = "",
        cameras: Sequence[str] = (),
        size: tuple[int, int] = (15, 22),
        render_mode: str | None = None,
    ) -> None:
        self.fault, self.bad_seeds, self.times, self.folder = fault, seeds, times, folder
        self.size, self.render_mode = size, render_mode
        self.action_space = Box(-1, 1, (1,), np.float32)
        state = Box(-np.inf, np.inf, (2,), np.float32)
        images = Dict({camera: Box(0, 255, (4, 6, 3), np.uint8) for camera in cameras})
        self.observation_space = Dict({"state": state, "images": images}) if cameras else state
        self.broken = False
        self.state = np.zeros(2, np.float32)
        self.images = {camera: np.zeros((4, 6, 3), np.uint8) for camera in cameras}
        if fault == "make":
            os._exit(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        assert not self.broken
        super().reset(seed=seed)
        if self.fault == "reset" and seed in self.bad_seeds:
            self.seed = seed
            self._fail()
        self.seed, self.t, self.x = seed or 0, 0, self.np_random.normal()
        Faulty.episodes += 1
        if self.fault == "drift":
            self.x += Faulty.episodes
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.t == 3 and self.seed in self.bad_seeds:
            self._fail()
        self.t += 1
        self.x += float(action[0]) / 10 + self.np_random.normal() / 10
        over = self.t == 5 + self.seed % 3
        return self._observe(), self.x, over, False, {"is_success": self.t == 4 and self.seed % 3 == 0}

    def render(self) -> Any:
        """The number of steps, as grey."""
        return None if self.fault == "blind" else np.full((*self.size, 3), 10 * self.t, np.uint8)

    def close(self) -> None:
        Faulty.closed += 1
        if self.fault == "close":
            raise RuntimeError("the display\nis gone")

    def _observe(self) -> Any:
        self.state[:] = self.x, self.t
        for number, image in enumerate(self.images.values()):
            image[1, 2] = self.t, number, 255
        return {"state": self.state, "images": self.images} if self.images else self.state

    def _fail(self) -> None:
        attempts = Path(self.folder)
        number = len(list(attempts.glob(f"{self.seed}-*")))
        if number == self.times:
            return
        (attempts / f"{self.seed}-{number}").touch()
        self.broken = True
        match self.fault:
            case "raise":
                raise RuntimeError("the simulator\nfell over")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit" | "reset":
                os._exit(3)
            case "hang":
                time.sleep(600)


gymnasium.register("DoprFaulty-v0", entry_point="faulty_environment:Faulty")
