"""How does a policy act outside training: on a robot, in somebody's own loop? One observation in, one action out."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from dopr_lightning import checkpoint
from dopr_lightning.errors import UserError, one_line
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.rollout.evaluate import Policy, decide, first_window
from dopr_lightning.rollout.slot import Observation

# Predictions are timed until there are so many, or for so long.
WARM_UP, TIMED, PATIENCE_S = 3, 50, 5.0


class Deployable(Policy, Protocol):
    """A `Policy` that says which cameras it sees through, and can be moved."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras whose images it needs."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""


class DeployedPolicy:
    """A policy that acts step by step: what :func:`load_policy` returns.

    It holds what a rollout holds for an episode: the latest ``observe`` observations, the actions predicted but not yet
    executed, and the source of noise. So with the same seed and observations it gives, number for number, the actions
    that :func:`dopr_lightning.rollout.evaluate.evaluate` executes (with ``num_envs=1``: other batch sizes round
    otherwise): clipped to ``low`` and ``high`` of ``record["action"]``. Where the source's convention named none, clip
    them to the environment's action space, as rollouts do.

    Args:
        policy: In eval mode.
        image_sizes: Height and width of each camera's images; of cameras that are not named, any.
        record: What the policy's checkpoint says of itself, see :mod:`dopr_lightning.checkpoint`.

    Attributes:
        record: As given.
    """

    def __init__(
        self,
        policy: Deployable,
        image_sizes: Mapping[str, tuple[int, int]] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy = policy
        self.record = dict(record or {})
        self._image_sizes = dict(image_sizes or {})
        action = self.record.get("action", {})
        low, high = action.get("low"), action.get("high")
        self._low = np.float32(-np.inf if low is None else low)
        self._high = np.float32(np.inf if high is None else high)
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Begin an episode.

        Args:
            seed: Of all noise in it.
        """
        self._generator = torch.Generator().manual_seed(seed)
        self._window: deque[Observation] = deque(maxlen=self.policy.observe)
        self._queue: deque[npt.NDArray[np.float32]] = deque()

    @torch.no_grad()
    def act(self, observation: Any) -> npt.NDArray[np.float32]:
        """The action to execute now. Call it once per step of the environment, with what is observed there.

        Every ``act``-th call predicts; those between return what is left of that prediction, and only remember what is
        observed. Before the first observation there is none: the window repeats the first, as in training.

        Args:
            observation: The environment's: a vector (O,); for a policy with cameras ``{"state": (O,), "images":
                {camera: (H, W, 3) uint8}}``. In the environment's own units: the policy normalises.

        Returns:
            (A,), float32, in the environment's own units, within the bounds that the record has.

        Raises:
            UserError: It has another shape than the policy was trained on, lacks a key or a camera, or is not finite;
                or the action is not.
        """
        look = self._checked(observation)
        self._window.extend([look] if self._window else first_window(look, self.policy.observe))
        if not self._queue:
            self._queue.extend(decide(self.policy, [self._window], [self._generator])[0])
        action = self._queue.popleft()
        # Clipping leaves NaN, and would make a full stroke of infinity.
        if not np.isfinite(action).all():
            raise UserError("the policy's action is not finite; the training diverged: load another checkpoint")
        return np.clip(action, self._low, self._high)

    def _checked(self, observation: Any) -> Observation:
        cameras = self.policy.cameras
        if not cameras:
            if isinstance(observation, Mapping):
                raise UserError("the policy observes a vector and no images; give it the state alone")
            return Observation(self._state(observation), {})
        if not isinstance(observation, Mapping) or not {"state", "images"} <= observation.keys():
            got = f"keys {', '.join(map(str, observation))}" if isinstance(observation, Mapping) else "no dictionary"
            raise UserError(
                f"the policy observes {{'state': ..., 'images': {{camera: ...}}}} and got {got}; give it both"
            )
        images = observation["images"]
        if not isinstance(images, Mapping):
            raise UserError(
                f"the policy observes images by camera, and got {type(images).__name__}; give {{{cameras[0]!r}: ...}}"
            )
        if missing := [camera for camera in cameras if camera not in images]:
            raise UserError(
                f"the policy needs images of camera {missing[0]!r}, and got {', '.join(images) or 'none'}; name them "
                "as in training"
            )
        return Observation(
            self._state(observation["state"]), {camera: self._image(camera, images[camera]) for camera in cameras}
        )

    def _state(self, value: Any) -> npt.NDArray[np.float32]:
        try:
            state = np.array(value, dtype=np.float32)  # a copy: the caller may go on writing to its own
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the policy's state needs numbers ({error}), and got {type(value).__name__}; give what reset() or "
                "step() observed, without what they return beside it"
            ) from error
        if state.shape != (self.policy.observation_dim,):
            keys = self.record.get("observation", {}).get("keys", [])
            raise UserError(
                f"the policy observes a state of shape ({self.policy.observation_dim},)"
                f"{' (' + ', '.join(keys) + ')' if keys else ''}, and got {state.shape}; one observation, not a batch"
            )
        if not np.isfinite(state).all():
            raise UserError(f"state {int(np.argmin(np.isfinite(state)))} is not finite; mend the sensor's reading")
        return state

    def _image(self, camera: str, value: Any) -> npt.NDArray[np.uint8]:
        image = np.array(value)
        size = self._image_sizes.get(camera, image.shape[:2])
        if image.dtype != np.uint8 or image.shape != (*size, 3):
            height, width = size if camera in self._image_sizes else ("height", "width")
            raise UserError(
                f"camera {camera!r}: the policy sees images of shape ({height}, {width}, 3), uint8, and got "
                f"{image.shape}, {image.dtype}; resize or convert them as its training images were"
            )
        return image


def speed(policy: Deployable, image_sizes: Mapping[str, tuple[int, int]]) -> str:
    """Time predictions, from observation to actions on the CPU, and say how fast they are.

    Args:
        policy: In eval mode.
        image_sizes: Height and width of each of its cameras' images.
    """
    images = {camera: np.zeros((*image_sizes[camera], 3), np.uint8) for camera in policy.cameras}
    window = first_window(Observation(np.zeros(policy.observation_dim, np.float32), images), policy.observe)
    generator = torch.Generator().manual_seed(0)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < WARM_UP + TIMED:
        since = time.perf_counter()
        decide(policy, [window], [generator])
        times.append(time.perf_counter() - since)
        if len(times) > WARM_UP and times[-1] + since - begun > PATIENCE_S:
            break
    median = statistics.median(times[WARM_UP:])
    device = policy.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{1000 * median:.3g} ms per prediction of {policy.act} actions, {policy.act / median:.4g} actions per second "
        f"on {name} (median of {len(times) - WARM_UP} after {WARM_UP} to warm up)"
    )


def load_policy(path: str | Path, device: str | torch.device = "cpu") -> DeployedPolicy:
    """Rebuild a policy from its checkpoint alone: no demonstrations, no simulator, no configuration.

    It acts with the average of its weights (EMA), in eval mode, and puts its observations in network units itself.

    Args:
        path: A checkpoint of ``dopr fit``.
        device: Where it shall compute.

    Raises:
        UserError: The file is missing, damaged, without a record, or of a class that cannot be imported; or there is no
            such device here.
    """
    held = checkpoint.read(path)
    policy = rebuild(path, held, device)
    return DeployedPolicy(cast(Deployable, policy), image_sizes(held[checkpoint.KEY]), held[checkpoint.KEY])


def rebuild(path: str | Path, held: Mapping[str, Any], device: str | torch.device = "cpu") -> PolicyModule:
    """The policy of a checkpoint, in eval mode.

    Args:
        path: The file.
        held: What :func:`dopr_lightning.checkpoint.read` read of it.
        device: Where it shall compute.

    Raises:
        UserError: It cannot be rebuilt, or there is no such device here.
    """
    if "_instantiator" not in held.get("hyper_parameters", {}):
        raise UserError(
            f"{path}: the policy was made of objects in Python, which a checkpoint does not hold; build it the same "
            "way and load its state_dict"
        )
    cls = checkpoint.class_of(held[checkpoint.KEY], "policy")
    try:
        policy = cls.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: {cls.__name__} cannot be rebuilt from it ({one_line(error)[:200]})") from error
    try:
        return policy.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without CUDA
        raise UserError(f"device={str(device)!r}: {str(error).splitlines()[0]}; device='cpu' is everywhere") from error


def image_sizes(record: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Height and width of the images of each camera that a checkpoint's policy sees."""
    return {camera: (height, width) for camera, (height, width) in record["observation"]["cameras"].items()}
