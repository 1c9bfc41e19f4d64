"""Exactly one episode per seed, whatever the number of environments."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.environments import make


class Policy(Protocol):
    """What can be rolled out."""

    @property
    def observe(self) -> int:
        """Observations seen at once."""

    @property
    def act(self) -> int:
        """Actions executed before observing again."""

    @property
    def observation_dim(self) -> int:
        """Numbers in an observation."""

    @property
    def action_dim(self) -> int:
        """Numbers in an action."""

    def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Actions for several episodes at once.

        Args:
            observations: (n, observe, observation_dim), float32, on the CPU, in the environment's own units.
            generators: n, on the CPU, one per episode: the only noise to draw from, so that an episode's noise does not
                depend on which others run beside it.

        Returns:
            (n, act, action_dim), in the environment's own units, on any device.
        """


@dataclass(frozen=True)
class Episode:
    """What happened in one episode.

    Args:
        seed: It was reset with.
        value: The metric: ``return_`` or ``max_reward``.
        return_: Sum of the rewards.
        max_reward: Largest reward.
        length: Steps taken.
        success: Whether the environment ever reported ``is_success``; ``None`` if it reports no such thing.
    """

    seed: int
    value: float
    return_: float
    max_reward: float
    length: int
    success: bool | None


def evaluate(
    policy: Policy,
    spec: EnvironmentSpec,
    seeds: Sequence[int],
    num_envs: int = 10,
    progress: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Roll a policy out, once from each seed.

    Environments are stepped one after the other, not by Gymnasium's vector environments: those step every environment
    every time, also one that has finished and has no seed left. The policy's calls are batched over all running
    episodes, each of which executes its ``act`` actions between two calls; a free environment takes the next seed at
    once. So an episode depends on its seed alone, up to the rounding of batched arithmetic.

    Args:
        policy: Called without gradients; put modules in eval mode first.
        spec: Environment and metric.
        seeds: Of the resets, and of each episode's noise. All different.
        num_envs: Episodes at once.
        progress: Called with each episode as it ends.

    Returns:
        The episodes, in the order of ``seeds``.

    Raises:
        UserError: The environment cannot be made or fails; the policy does not fit it, or gives an action that is not
            finite.
    """
    if num_envs < 1:
        raise UserError(f"num_envs={num_envs}: must be at least 1")
    if len(set(seeds)) != len(seeds):
        raise UserError("rollout seeds repeat; give each episode its own seed")
    finished: dict[int, Episode] = {}
    waiting = deque(seeds)
    running: list[_Running] = []
    free: list[Any] = []
    try:
        free.extend(make(spec) for _ in range(min(num_envs, len(seeds))))
        for env in free[:1]:
            _check_fit(policy, spec, env)
        while waiting or running:
            while waiting and free:
                running.append(_Running(free.pop(), waiting.popleft(), policy.observe, spec))
            for episode, chunk in zip(running, _predict(policy, running), strict=True):
                episode.execute(chunk)
            for episode in [e for e in running if e.done]:
                running.remove(episode)
                free.append(episode.env)
                finished[episode.seed] = episode.result()
                if progress is not None:
                    progress(finished[episode.seed])
    finally:
        for env in [*free, *(episode.env for episode in running)]:
            env.close()
    return [finished[seed] for seed in seeds]


class _Running:
    """One episode under way."""

    def __init__(self, env: Any, seed: int, observe: int, spec: EnvironmentSpec) -> None:
        self.env = env
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.done = False
        self._spec = spec
        self._rewards: list[float] = []
        self._success: bool | None = None
        observation, _ = self._guard(env.reset, seed=seed)
        # As in training, the time before the episode repeats its first observation.
        self._window = deque([self._checked(observation)] * observe, maxlen=observe)

    def window(self) -> npt.NDArray[np.float32]:
        """The latest observations, (observe, obs_dim)."""
        return np.stack(self._window)

    def execute(self, chunk: npt.NDArray[np.float32]) -> None:
        """Execute actions (act, act_dim) in turn, until the episode ends."""
        space = self.env.action_space
        for action in chunk:
            if not np.isfinite(action).all():
                raise UserError(
                    f"{self._spec.id}: the policy's action is not finite in the episode with seed {self.seed}, step "
                    f"{len(self._rewards)}; the training diverged, lower the learning rate or load another checkpoint"
                )
            clipped = np.clip(action, space.low, space.high).astype(space.dtype)
            observation, reward, terminated, truncated, info = self._guard(self.env.step, clipped)
            self._rewards.append(float(reward))
            if "is_success" in info:
                self._success = bool(self._success) or bool(info["is_success"])
            self.done = bool(terminated or truncated)
            if self.done:
                return
            self._window.append(self._checked(observation))

    def result(self) -> Episode:
        """The finished episode."""
        return_, max_reward = sum(self._rewards), max(self._rewards)
        return Episode(
            seed=self.seed,
            value=return_ if self._spec.metric == "return" else max_reward,
            return_=return_,
            max_reward=max_reward,
            length=len(self._rewards),
            success=self._success,
        )

    def _checked(self, observation: Any) -> npt.NDArray[np.float32]:
        array = np.asarray(observation, dtype=np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{self._where()}: the environment's observation is not finite; {_REPORT}")
        return array

    def _guard(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Dropping a failed episode would flatter the policy.
        try:
            return function(*args, **kwargs)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self._where()}: {type(error).__name__}: {reason}; {_REPORT}") from error

    def _where(self) -> str:
        return f"{self._spec.id} failed in the episode with seed {self.seed}, step {len(self._rewards)}"


_REPORT = "check the environment's installation with that seed"


def _check_fit(policy: Policy, spec: EnvironmentSpec, env: Any) -> None:
    sees, does = env.observation_space.shape, env.action_space.shape
    if (policy.observation_dim,) != sees or (policy.action_dim,) != does:
        raise UserError(
            f"the policy maps observations of shape ({policy.observation_dim},) to actions of shape "
            f"({policy.action_dim},), but {spec.id} has {sees} and {does}; evaluate it where it was trained"
        )


def _predict(policy: Policy, running: Sequence[_Running]) -> npt.NDArray[np.float32]:
    observations = torch.from_numpy(np.stack([episode.window() for episode in running]))
    with torch.no_grad():
        actions = policy.predict(observations, [episode.generator for episode in running])
    expected = (len(running), policy.act, policy.action_dim)
    if actions.shape != expected:
        raise UserError(
            f"the policy's predict() returned shape {tuple(actions.shape)} for observations of shape "
            f"{tuple(observations.shape)}; it must return {expected}"
        )
    return actions.detach().float().cpu().numpy()
