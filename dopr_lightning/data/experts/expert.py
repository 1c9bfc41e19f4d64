"""A small network that knows a task, and an episode of it acting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dopr_lightning.errors import UserError

Array = npt.NDArray[np.float32]
# The keys of torch.nn.Sequential(Linear, Tanh, Linear, Tanh, Linear).state_dict(), so that torch can load the file too.
LAYERS = ("0", "2", "4")


@dataclass(frozen=True)
class Expert:
    """A network with two hidden tanh layers, from raw observations to actions; the action bounds clip its output.

    In numpy: for one observation at a time it is several times quicker than torch.

    Args:
        layers: Three pairs of weight (out, in) and bias (out,).
        low: Lower action bound, (act_dim,).
        high: Upper action bound, (act_dim,).
    """

    layers: tuple[tuple[Array, Array], ...]
    low: Array
    high: Array

    @classmethod
    def load(cls, path: Path, action_space: Any) -> Expert:
        """Read a safetensors file.

        Args:
            path: The file.
            action_space: The environment's action space, a bounded Box.

        Raises:
            UserError: The file is missing, damaged, or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
            layers = tuple((tensors[f"{i}.weight"], tensors[f"{i}.bias"]) for i in LAYERS)
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{path}: not an expert ({error}); make one with dopr_lightning.data.experts.recipe"
            ) from error
        return cls(layers, action_space.low, action_space.high)

    def act(self, observation: npt.NDArray[np.floating[Any]]) -> Array:
        """The action (act_dim,) for one observation (obs_dim,)."""
        hidden = observation.astype(np.float32)
        for weight, bias in self.layers[:-1]:
            hidden = np.tanh(weight @ hidden + bias)
        weight, bias = self.layers[-1]
        return np.clip(weight @ hidden + bias, self.low, self.high).astype(np.float32)


class Played(NamedTuple):
    """One episode: observations (T, obs_dim), actions (T, act_dim), the sum of rewards."""

    observations: Array
    actions: Array
    return_: float


def play(expert: Expert, env: Any, seed: int) -> Played:
    """One whole episode, reset with ``seed``. The final observation, at which nobody acts, is left out."""
    observations, actions, total = [], [], 0.0
    observation, _ = env.reset(seed=seed)
    done = False
    while not done:
        action = expert.act(observation)
        observations.append(observation.astype(np.float32))
        actions.append(action)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        done = terminated or truncated
    return Played(np.stack(observations), np.stack(actions), total)
