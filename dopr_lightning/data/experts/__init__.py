"""Demonstrations with no download: an expert that ships with the package acts on the spot."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dopr_lightning.data.convention import Convention, bounds
from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.experts.expert import Expert, play
from dopr_lightning.data.opengl import mujoco_loads
from dopr_lightning.data.source import Source
from dopr_lightning.errors import UserError

DIRECTORY = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """The experts of this package: environment id -> safetensors file."""
    return {file.stem: file for file in sorted(DIRECTORY.glob("*.safetensors"))}


class BuiltinExpert(Source):
    """Whole episodes of a shipped expert, acting deterministically.

    Args:
        env_id: Which environment; one of `shipped`.
        episodes: How many to roll out; a thousand steps take a fraction of a second.
        seed: Episode i resets with ``seed + i``.
    """

    def __init__(self, env_id: str = "Walker2d-v5", episodes: int = 10, seed: int = 0) -> None:
        self.env_id = env_id
        self.episodes = episodes
        self.seed = seed

    @property
    def environment(self) -> EnvironmentSpec:
        """The expert's environment, with the episode length Gymnasium registered."""
        import gymnasium

        self._expert_file()
        max_steps = gymnasium.spec(self.env_id).max_episode_steps
        assert max_steps is not None, "experts ship for environments with a time limit"
        return EnvironmentSpec(id=self.env_id, max_steps=max_steps, metric="return", simulators=("mujoco",))

    def load(self) -> Demonstrations:
        """Roll the episodes out.

        Raises:
            UserError: No expert ships for this environment, or no episode is asked for.
        """
        import gymnasium

        if self.episodes < 1:
            raise UserError(f"episodes={self.episodes}: ask for at least 1 demonstration")
        file = self._expert_file()
        with mujoco_loads():
            env = gymnasium.make(self.env_id)
        try:
            expert = Expert.load(file, env.action_space)
            episodes = [play(expert, env, self.seed + i) for i in range(self.episodes)]
        finally:
            env.close()
        observations = np.concatenate([episode.observations for episode in episodes])
        actions = np.concatenate([episode.actions for episode in episodes])
        # What decides the episodes, not their numbers, which another processor rounds otherwise: the same checkpoint is
        # judged there too. The simulator's version has a place of its own, `EnvironmentSpec.simulators`.
        digest = hashlib.sha256(file.read_bytes())
        digest.update(f"{self.env_id} {self.episodes} {self.seed}".encode())
        return Demonstrations(
            observations,
            actions,
            np.cumsum([len(episode.actions) for episode in episodes]),
            source=f"expert:{self.env_id}",
            sha256=digest.hexdigest(),
        )

    def convention(self) -> Convention:
        """Torques, within the environment's bounds."""
        import gymnasium

        self._expert_file()
        env = gymnasium.make(self.env_id)
        low, high = bounds(env.action_space)
        env.close()
        return Convention(low=low, high=high)

    def _expert_file(self) -> Path:
        experts = shipped()
        if self.env_id not in experts:
            raise UserError(
                f"no expert ships for {self.env_id!r}; choose one of: {', '.join(experts) or '(none)'}, or train one "
                "with dopr_lightning.data.experts.recipe"
            )
        return experts[self.env_id]
