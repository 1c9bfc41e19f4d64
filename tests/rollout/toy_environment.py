"""An environment whose returns are known in closed form, and that watches how it is used."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import gymnasium
import numpy as np

from dopr_lightning.data.environment import EnvironmentSpec

SPEC = EnvironmentSpec("DoprToy-v0", max_steps=8, metric="return")


class Toy(gymnasium.Env[Any, Any]):
    """x <- x + a, a in [-1, 1]; observes (x, steps since reset); the reward is x.

    x starts at seed / 2, and episodes end after 3 + seed % 4 steps.
    """

    resets: ClassVar[list[int]] = []
    steps: ClassVar[Counter[int]] = Counter()
    open_environments: ClassVar[int] = 0

    def __init__(self, fault: tuple[str, int] | None = None) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
        self.fault = fault  # what goes wrong at step 1 of which seed
        self.over = True
        Toy.open_environments += 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        assert seed is not None
        assert self.over, "reset in the middle of an episode"
        self.seed, self.x, self.t, self.over = seed, seed / 2, 0, False
        Toy.resets.append(seed)
        return np.array([self.x, 0.0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert not self.over, "stepped after its end"
        assert self.action_space.contains(action)
        if self.fault == ("raise", self.seed) and self.t == 1:
            raise RuntimeError("the simulator\nfell over")
        self.x += float(action[0])
        self.t += 1
        Toy.steps[self.seed] += 1
        self.over = self.t == length(self.seed)
        if self.fault == ("nan", self.seed):
            return np.array([np.nan, self.t]), 0.0, self.over, False, {}
        info = {"is_success": self.t == 2} if self.seed % 2 == 0 else {}
        return np.array([self.x, self.t]), self.x, self.over, False, info

    def close(self) -> None:
        Toy.open_environments -= 1


def length(seed: int) -> int:
    return 3 + seed % 4


def forget() -> None:
    Toy.resets.clear()
    Toy.steps.clear()
    Toy.open_environments = 0


gymnasium.register("DoprToy-v0", entry_point="toy_environment:Toy")
