"""Exactly one episode per seed, whatever the number of environments and processes."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.slot import Description, Observation, Segment, SimulationError
from dopr_lightning.rollout.workers import Lost, env_pool

if TYPE_CHECKING:
    from dopr_lightning.policies.networks.base import VisualObservation

log = logging.getLogger(__name__)

# An episode whose environment failed is repeated once: a crash may be an accident, two are a fault.
ATTEMPTS = 2


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
        """Numbers in an observation, images aside."""

    @property
    def action_dim(self) -> int:
        """Numbers in an action."""

    def predict(self, observations: Tensor | VisualObservation, generators: Sequence[torch.Generator]) -> Tensor:
        """Actions for several episodes at once.

        Args:
            observations: (n, observe, observation_dim), float32, on the CPU, in the environment's own units. From an
                environment with cameras, this as ``"state"``, and ``"images"`` by camera: (n, observe, 3, H, W), uint8.
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
        value: The metric: ``return_``, ``max_reward`` or success.
        return_: Sum of the rewards.
        max_reward: Largest reward.
        length: Steps taken.
        success: Whether the environment ever reported ``is_success``; ``None``, which counts as no success, if it said
            nothing of it.
        restarts: How often it was begun again because a worker process or its environment failed.
        actions: The policy's, (length, A): with the seed, they are the episode.
    """

    seed: int
    value: float
    return_: float
    max_reward: float
    length: int
    success: bool | None
    restarts: int
    actions: npt.NDArray[np.float32] = field(compare=False, repr=False)


def evaluate(
    policy: Policy,
    spec: EnvironmentSpec,
    seeds: Sequence[int],
    num_envs: int = 10,
    progress: Callable[[Episode], None] | None = None,
    *,
    workers: int = 0,
    timeout_s: float = 60.0,
) -> list[Episode]:
    """Roll a policy out, once from each seed.

    Environments are not stepped by Gymnasium's vector environments: those step every environment every time, also one
    that has finished and has no seed left. The policy's calls are batched over all running episodes, each of which
    executes its ``act`` actions between two calls; a free environment takes the next seed at once. So an episode
    depends on its seed alone, up to the rounding of batched arithmetic; and not even that differs over ``workers``.

    Args:
        policy: Called without gradients; put modules in eval mode first.
        spec: Environment and metric.
        seeds: Of the resets, and of each episode's noise. All different.
        num_envs: Episodes at once.
        progress: Called with each episode as it ends.
        workers: Processes among which the environments are shared out, for simulators that are slow or may crash; 0
            for none but this one. An episode whose environment fails in a worker is repeated once, and says so.
        timeout_s: Seconds that a worker may take for one chunk of actions, or a reset, before it is killed.

    Returns:
        The episodes, in the order of ``seeds``.

    Raises:
        UserError: The environment cannot be made or fails, with workers twice in the same episode; the policy does not
            fit it, or gives an action that is not finite.
    """
    for name, value, least in (("num_envs", num_envs, 1), ("workers", workers, 0)):
        if value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    if len(set(seeds)) != len(seeds):
        raise UserError("rollout seeds repeat; give each episode its own seed")
    if not seeds:
        return []
    count = min(num_envs, len(seeds))
    finished: dict[int, Episode] = {}
    waiting = deque(seeds)
    running: list[_Running] = []
    free = list(range(count))
    restarts, failures = Counter[int](), Counter[int]()

    def note(happened: Mapping[int, Segment | Lost]) -> None:
        for episode in [e for e in running if e.slot in happened]:
            what = happened[episode.slot]
            if isinstance(what, Lost):
                restarts[episode.seed] += 1
                failures[episode.seed] += what.own
                if failures[episode.seed] == ATTEMPTS:
                    raise SimulationError(f"{what.reason}; it failed {ATTEMPTS} times")
                log.warning("%s; the episode is begun again", what.reason)
                waiting.appendleft(episode.seed)
            elif episode.extend(what):
                finished[episode.seed] = episode.result(spec.metric, restarts[episode.seed])
                if progress is not None:
                    progress(finished[episode.seed])
            else:
                continue
            running.remove(episode)
            free.append(episode.slot)

    with env_pool(spec, count, policy.observe, workers=workers, timeout_s=timeout_s) as pool:
        _check_sizes(policy, spec, pool.describe())
        while waiting or running:
            begun = []
            while waiting and free:
                begun.append(_Running(free.pop(), waiting.popleft(), policy.observe))
            running += begun
            note(pool.start({episode.slot: episode.seed for episode in begun}))
            if running:  # all may be lost
                chunks = decide(policy, [e.window for e in running], [e.generator for e in running])
                for episode, chunk in zip(running, chunks, strict=True):
                    episode.chunk = chunk
                note(pool.execute({episode.slot: episode.chunk for episode in running}))
    return [finished[seed] for seed in seeds]


def check_success(spec: EnvironmentSpec, episodes: Sequence[Episode]) -> None:
    """Refuse to judge by success where no episode says anything of it: most likely none ever would.

    Args:
        spec: Of the environment.
        episodes: All of an evaluation.

    Raises:
        UserError: Success is the metric, and no episode reported whether it was one.
    """
    if spec.metric == "success" and all(episode.success is None for episode in episodes):
        raise UserError(
            f"{spec.id} reports no 'is_success' in any of {len(episodes)} episodes; have it report failures too, and "
            "not success alone, or choose the metric return or max_reward"
        )


def check_fit(
    policy: Policy,
    spec: EnvironmentSpec,
    image_sizes: Mapping[str, tuple[int, int]],
    *,
    workers: int = 0,
    timeout_s: float = 60.0,
) -> None:
    """Make the environment, and compare its sizes with the policy's and the data's before that is trained on.

    Args:
        policy: As for `evaluate`, and so are the others.
        spec: Of the environment.
        image_sizes: Height and width of the data's images, by camera.
        workers: 0 to make it in this process.
        timeout_s: Of a worker.

    Raises:
        UserError: It cannot be made, or has other sizes or cameras.
    """
    with env_pool(spec, 1, policy.observe, workers=min(1, workers), timeout_s=timeout_s) as pool:
        found = pool.describe()
    _check_sizes(policy, spec, found)
    for camera, size in image_sizes.items():
        if camera in found.image_sizes and found.image_sizes[camera] != size:
            raise UserError(
                f"images of camera {camera!r} are {' x '.join(map(str, size))} in the data and "
                f"{' x '.join(map(str, found.image_sizes[camera]))} in {spec.id}; make one of them like the other"
            )


class _Running:
    """One episode under way."""

    def __init__(self, slot: int, seed: int, observe: int) -> None:
        self.slot = slot
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.window: deque[Observation] = deque(maxlen=observe)
        self._observe = observe
        self.chunk: npt.NDArray[np.float32]
        self._actions: list[npt.NDArray[np.float32]] = []
        self._rewards: list[float] = []
        self._success: bool | None = None

    def extend(self, segment: Segment) -> bool:
        """Note what happened; returns whether the episode is over."""
        if not self.window:
            self.window.extend(first_window(segment.observations[0], self._observe))
            return False
        self.window.extend(segment.observations)
        self._actions.append(self.chunk[: len(segment.rewards)])
        self._rewards += segment.rewards
        if segment.success is not None:
            self._success = bool(self._success) or segment.success
        return segment.done

    def result(self, metric: str, restarts: int) -> Episode:
        """The finished episode."""
        return_, max_reward = sum(self._rewards), max(self._rewards)
        values = {"return": return_, "max_reward": max_reward, "success": float(bool(self._success))}
        return Episode(
            seed=self.seed,
            value=values[metric],
            return_=return_,
            max_reward=max_reward,
            length=len(self._rewards),
            success=self._success,
            restarts=restarts,
            actions=np.concatenate(self._actions),
        )


def _check_sizes(policy: Policy, spec: EnvironmentSpec, environment: Description) -> None:
    sees, does = environment.state, environment.action
    if (policy.observation_dim,) != sees or (policy.action_dim,) != does:
        raise UserError(
            f"the policy maps observations of shape ({policy.observation_dim},) to actions of shape "
            f"({policy.action_dim},), but {spec.id} has {sees} and {does}; evaluate it where it was "
            "trained, and train it on demonstrations of where it is to be evaluated"
        )
    for camera in getattr(policy, "cameras", ()):
        if camera not in environment.image_sizes:
            raise UserError(
                f"the policy sees through camera {camera!r}, and {spec.id} has "
                f"{', '.join(environment.image_sizes) or 'no images'}; name it in the cameras of the environment's "
                "spec, or leave it out of the network's"
            )


def first_window(observation: Observation, observe: int) -> list[Observation]:
    """What a policy sees at first: as in training, the time before the episode repeats its first observation."""
    return [observation] * observe


def decide(
    policy: Policy, windows: Sequence[Sequence[Observation]], generators: Sequence[torch.Generator]
) -> npt.NDArray[np.float32]:
    """Ask the policy for actions.

    Args:
        policy: In eval mode.
        windows: n, the latest ``observe`` observations of an episode each, oldest first.
        generators: n, sources of noise.

    Returns:
        (n, act, A).

    Raises:
        UserError: The policy gives something of another shape.
    """
    with torch.no_grad():
        actions = policy.predict(_batched(windows), generators)
    expected = (len(windows), policy.act, policy.action_dim)
    if actions.shape != expected:
        raise UserError(
            f"the policy's predict() returned shape {tuple(actions.shape)} for {len(windows)} episodes; it must return "
            f"{expected}"
        )
    return actions.detach().float().cpu().numpy()


def _batched(windows: Sequence[Sequence[Observation]]) -> Tensor | VisualObservation:
    state = torch.from_numpy(np.stack([np.stack([look.state for look in window]) for window in windows]))
    cameras = windows[0][0].images
    if not cameras:
        return state
    images: dict[str, Tensor] = {}
    for camera in cameras:
        frames = np.stack([np.stack([look.images[camera] for look in window]) for window in windows])
        images[camera] = torch.from_numpy(frames).movedim(-1, -3).contiguous()
    return {"state": state, "images": images}
