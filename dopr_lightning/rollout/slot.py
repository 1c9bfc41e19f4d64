"""What happens in an environment between two looks of the policy.

Worker processes run this module, so it imports nothing that takes seconds.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.opengl import off_screen
from dopr_lightning.errors import UserError, one_line
from dopr_lightning.rollout.environments import make

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

# Of films. Software rendering takes up to a second per frame, and Hopper has 125 of them per second.
FRAME_RATE = 25
FRAME_SIZE = 256

_REMEDY = "check the environment's installation with that seed"
_OPENGL = "for MuJoCo without a screen, set MUJOCO_GL=egl, which needs: apt-get install libegl1 libgl1-mesa-dri"


class SimulationError(UserError):
    """The environment failed, not the policy: the same episode in a new one may not."""


@dataclass(frozen=True)
class Description:
    """Of an environment.

    Args:
        state: Shape of what it observes, images aside.
        action: Shape of what it takes.
        frame_rate: Of its films, in frames per second of simulated time.
        image_sizes: Height and width of each camera's images.
    """

    state: tuple[int, ...]
    action: tuple[int, ...]
    frame_rate: float
    image_sizes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Observation:
    """What the policy may see at one time.

    Args:
        state: (O,), float32.
        images: By camera, (H, W, 3), uint8.
    """

    state: Array
    images: dict[str, Array]


@dataclass(frozen=True)
class Segment:
    """A part of an episode: its reset, or a chunk of actions.

    Args:
        observations: The latest ones, at most as many as the policy sees; without that of the episode's end.
        rewards: One per step.
        success: Whether ``is_success`` was reported in it; ``None`` where no such thing was said.
        done: The episode is over.
        frames: Filmed, (H, W, 3) uint8.
    """

    observations: tuple[Observation, ...] = ()
    rewards: tuple[float, ...] = ()
    success: bool | None = None
    done: bool = False
    frames: tuple[Array, ...] = ()


class EnvSlot:
    """An environment, made when first needed, and the episode under way in it.

    Args:
        spec: Of the environment.
        observe: Observations the policy sees at once.
        film: Render what happens.
    """

    def __init__(self, spec: EnvironmentSpec, observe: int, film: bool = False) -> None:
        self._spec = spec
        self._observe = observe
        self._film = film
        self._env: Any = None
        self._seed = 0
        self._steps = 0

    def describe(self) -> Description:
        """What the environment gives and takes.

        Raises:
            UserError: There is no such environment.
        """
        env, cameras = self._made(), self._spec.cameras
        state = env.observation_space["state"] if cameras else env.observation_space
        sizes = {camera: env.observation_space["images"][camera].shape[:2] for camera in cameras}
        return Description(state.shape, env.action_space.shape, self._rate() / self._stride(), sizes)

    def start(self, seed: int) -> Segment:
        """Begin an episode.

        Raises:
            SimulationError: The environment raised something, or its observation is not sound.
            UserError: There is no such environment.
        """
        env = self._made()
        self._seed, self._steps = seed, 0
        observation, _ = self._guard(partial(env.reset, seed=seed))
        return Segment((self._checked(observation),), frames=tuple(self._frames()))

    def execute(self, chunk: Array) -> Segment:
        """Take actions (act, A) in turn, until the episode ends.

        Raises:
            SimulationError: As for `start`.
            UserError: An action is not finite.
        """
        space = self._env.action_space
        seen: deque[Observation] = deque(maxlen=self._observe)
        rewards: list[float] = []
        frames: list[Array] = []
        success, done = None, False
        for action in chunk:
            if not np.isfinite(action).all():
                raise UserError(
                    f"{self._spec.id}: the policy's action is not finite in the episode with seed {self._seed}, step "
                    f"{self._steps}; the training diverged, lower the learning rate or load another checkpoint"
                )
            clipped = np.clip(action, space.low, space.high).astype(space.dtype)
            observation, reward, terminated, truncated, info = self._guard(partial(self._env.step, clipped))
            self._steps += 1
            rewards.append(self._number("reward", reward))
            if info.get("is_success") is not None:
                success = bool(success) or bool(self._number("is_success", info["is_success"]))
            done = bool(terminated or truncated)
            frames += self._frames(last=done)
            if done:
                break
            seen.append(self._checked(observation))
        return Segment(tuple(seen), tuple(rewards), success, done, tuple(frames))

    def close(self) -> None:
        """Free the environment; the next episode gets a new one.

        What goes wrong here is only said: the episodes are played, and other environments wait to be closed.
        """
        if self._env is not None:
            env, self._env = self._env, None
            try:
                env.close()
            except Exception as error:  # a simulator may raise anything
                log.warning("%s cannot be closed: %s", self._spec.id, _line(error))

    def _made(self) -> Any:
        if self._env is None:
            spec = self._spec
            if self._film:
                spec = replace(spec, kwargs=spec.kwargs | {"render_mode": "rgb_array"})
            try:
                self._env = make(spec)
            except UserError:
                raise
            except Exception as error:  # a simulator may raise anything
                what = "cannot be made to render" if self._film else "cannot be made"
                raise SimulationError(f"{spec.id} {what} with {spec.kwargs}: {_line(error)}") from error
        return self._env

    def _checked(self, observation: Any) -> Observation:
        cameras, space = self._spec.cameras, self._env.observation_space
        given = self._guard(lambda: observation["state"] if cameras else observation)
        state = self._array("observation", given, space["state"] if cameras else space, np.float32)
        if not np.isfinite(state).all():
            raise SimulationError(f"{self._where()}: the environment's observation is not finite; {_REMEDY}")
        views = self._guard(lambda: {camera: observation["images"][camera] for camera in cameras})
        images = {
            camera: self._array(f"image of camera {camera!r}", view, space["images"][camera], np.uint8)
            for camera, view in views.items()
        }
        return Observation(state, images)

    def _array(self, name: str, value: Any, space: Any, dtype: type[np.generic]) -> Array:
        """A copy of what the environment gave, if it is what its space says.

        A copy: the simulator may go on writing to the same memory, and the policy looks back.
        """
        array = self._guard(partial(np.array, value))
        if array.shape != space.shape or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise SimulationError(
                f"{self._where()}: the environment's {name} is {array.dtype} of shape {array.shape}, and its space is "
                f"{space}; mend the environment"
            )
        return array.astype(dtype, copy=False)

    def _number(self, name: str, value: Any) -> float:
        """What the environment gave, as the number it must be: a mean over episodes hides where there was none."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise SimulationError(
                f"{self._where()}: the environment's {name} is {value!r}, no finite number; mend the environment"
            )
        return number

    def _frames(self, last: bool = False) -> list[Array]:
        """The present frame, if it is one to film."""
        if not self._film or (self._steps % self._stride() and not last):
            return []
        with off_screen():
            frame = self._guard(self._env.render, _OPENGL)
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape[2:] != (3,):
            raise SimulationError(f"{self._spec.id} renders no images in render_mode='rgb_array'")
        return [_small(frame)]

    def _rate(self) -> float:
        return float(self._env.metadata.get("render_fps") or FRAME_RATE)

    def _stride(self) -> int:
        return max(1, round(self._rate() / FRAME_RATE))

    def _guard(self, function: Callable[[], Any], remedy: str = _REMEDY) -> Any:
        # Dropping a failed episode would flatter the policy.
        try:
            return function()
        except Exception as error:
            raise SimulationError(f"{self._where()}: {_line(error)}; {remedy}") from error

    def _where(self) -> str:
        return where(self._spec, self._seed, self._steps)


def where(spec: EnvironmentSpec, seed: int, step: int) -> str:
    """What failed: the beginning of a message."""
    return f"{spec.id} failed in the episode with seed {seed}, step {step}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _small(frame: Array) -> Array:
    """At most FRAME_SIZE high and wide; both even, as H.264 wants them."""
    from PIL import Image

    height, width = frame.shape[:2]
    scale = min(1.0, FRAME_SIZE / max(height, width))
    width, height = (2 * max(1, round(scale * side / 2)) for side in (width, height))
    return np.asarray(Image.fromarray(frame).resize((width, height)))
