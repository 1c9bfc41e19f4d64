"""Demonstrations of robosuite's Lift without a download: a script that sees the cube picks it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.robomimic.files import DemoWriter
from dopr_lightning.data.robomimic.images import IMAGE_SIZE
from dopr_lightning.data.robomimic.simulator import Simulator, import_robosuite
from dopr_lightning.errors import UserError

Array = npt.NDArray[Any]

MAX_STEPS = 200
# The script hardly ever fails; if it does so often, the simulator is another than it was written for.
MAX_FAILURES = 20
VALIDATION_SHARE = 0.1
# Demonstrations end while the cube is still held, as people's do.
HELD_STEPS = 10


def lift_env_args(cameras: Sequence[str] = ()) -> dict[str, Any]:
    """What robomimic's Lift files for robosuite 1.5 say of their environment."""
    arm = {
        "type": "OSC_POSE",
        "input_max": 1,
        "input_min": -1,
        "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
        "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
        "kp": 150,
        "damping_ratio": 1,
        "impedance_mode": "fixed",
        "kp_limits": [0, 300],
        "damping_ratio_limits": [0, 10],
        "position_limits": None,
        "orientation_limits": None,
        "uncouple_pos_ori": True,
        "input_type": "delta",
        "input_ref_frame": "world",
        "interpolation": None,
        "ramp_ratio": 0.2,
        "gripper": {"type": "GRIP"},
    }
    return {
        "env_name": "Lift",
        "env_version": import_robosuite().__version__,
        "type": 1,
        "env_kwargs": {
            "robots": ["Panda"],
            "controller_configs": {"type": "BASIC", "body_parts": {"right": arm}},
            "control_freq": 20,
            "lite_physics": False,
            "reward_shaping": False,
            "ignore_done": True,
            "has_renderer": False,
            "has_offscreen_renderer": bool(cameras),
            "use_object_obs": True,
            "use_camera_obs": bool(cameras),
            "camera_names": list(cameras),
            "camera_depths": False,
            "camera_heights": IMAGE_SIZE,
            "camera_widths": IMAGE_SIZE,
        },
    }


class LiftExpert:
    """Comes down a funnel onto the cube, turned to its faces, closes, and goes up.

    What it does depends on what it sees alone, so that a policy without memory can learn it. How fast it goes, how
    steep the funnel is and how unsteady its hand differ from episode to episode, so that there is more than one path.

    Args:
        rng: Draws this episode's manner, and the noise.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._speed = rng.uniform(0.5, 1.0)
        self._slope = rng.uniform(2.0, 4.0)
        self._ceiling = rng.uniform(0.06, 0.15)
        self._noise = rng.uniform(0.0, 0.2)

    def act(self, observation: dict[str, Array]) -> Array:
        """Offsets of position and rotation, and gripper (7,), each in [-1, 1]."""
        hand = observation["robot0_eef_pos"]
        cube = observation["cube_pos"]
        finger_gap = observation["robot0_gripper_qpos"][0] - observation["robot0_gripper_qpos"][1]
        aside = float(np.linalg.norm((cube - hand)[:2]))
        there = aside < 0.012 and abs(cube[2] - hand[2]) < 0.012
        held = there and finger_gap < 0.046  # the cube is 0.040 to 0.044 wide, the open gripper 0.08

        above = np.array([0.0, 0.0, np.clip(self._slope * (aside - 0.01), 0.0, self._ceiling)])
        target = hand + np.array([0.0, 0.0, 0.05]) if held else cube + above
        action = np.zeros(7)
        action[:3] = self._speed * (target - hand) / 0.05
        action[5] = self._speed * _turn(observation["robot0_eef_quat"], observation["cube_quat"]) / 0.5
        action[:6] += self._noise * self._rng.standard_normal(6) * [1, 1, 1, 0.3, 0.3, 0.3]
        action[6] = 1.0 if there else -1.0
        return np.clip(action, -1.0, 1.0)


def _turn(hand: Array, cube: Array) -> float:
    """How far to turn about the vertical until the fingers face the cube's nearest sides, in radians."""

    def yaw(quaternion: Array) -> float:
        x, y, z, w = quaternion
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    quarter = np.pi / 2
    return (yaw(cube) - yaw(hand) + quarter / 2) % quarter - quarter / 2


@dataclass(frozen=True)
class Scripted:
    """What was written.

    Args:
        path: Where to.
        episodes: Demonstrations kept: those that lifted the cube.
        tried: How many it took.
        steps: In all that were kept.
    """

    path: Path
    episodes: int
    tried: int
    steps: int


def demonstrate(
    path: Path,
    episodes: int,
    seed: int = 0,
    cameras: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Scripted:
    """Write demonstrations in robomimic's own format; those that fail are left out.

    Args:
        path: The file; what was there stays until the new one is complete.
        episodes: How many to keep. A tenth of them are in the mask ``valid``, the others in ``train``.
        seed: Attempt i draws its scene and its manner with ``seed + i``.
        cameras: Also store what these see.
        progress: Called with the number kept, after each attempt.

    Raises:
        UserError: The simulator cannot be made, no episode is asked for, or the script fails time and again.
    """
    if episodes < 1:
        raise UserError(f"--scripted {episodes}: ask for at least 1 demonstration")
    simulator = Simulator(lift_env_args(cameras), cameras=cameras)
    kept = steps = tried = 0
    try:
        with DemoWriter(path, simulator.env_args) as writer:
            while kept < episodes:
                if tried - kept > MAX_FAILURES:
                    raise UserError(
                        f"the script lifted the cube in {kept} of {tried} attempts only; this robosuite or MuJoCo "
                        "moves differently from robosuite 1.5.2 with mujoco 3.9: install these"
                    )
                rng = np.random.default_rng([seed + tried, 1])
                episode = _attempt(simulator, LiftExpert(rng), seed + tried, cameras)
                tried += 1
                if episode is not None:
                    writer.add(simulator.model, episode, seed=seed + tried - 1)
                    kept += 1
                    steps += len(episode["actions"])
                if progress is not None:
                    progress(kept)
            held_out = np.random.default_rng(seed).permutation(kept)[: round(kept * VALIDATION_SHARE)]
            writer.mask("train", sorted(set(range(kept)) - set(held_out)))
            writer.mask("valid", sorted(held_out))
    finally:
        simulator.close()
    return Scripted(path, kept, tried, steps)


def _attempt(simulator: Simulator, expert: LiftExpert, seed: int, cameras: Sequence[str]) -> dict[str, Array] | None:
    """One episode, key to (T, ...); ``None`` if the cube was not lifted and held."""
    simulator.reset(seed)
    rows: dict[str, list[Any]] = {"states": [], "actions": [], "rewards": []}
    seen = [simulator.observe()]
    images: dict[str, list[Array]] = {camera: [] for camera in cameras}
    while sum(rows["rewards"]) < HELD_STEPS:
        if len(rows["actions"]) == MAX_STEPS:
            return None
        for camera in cameras:
            images[camera].append(simulator.render(camera, IMAGE_SIZE))
        rows["states"].append(simulator.state)
        rows["actions"].append(expert.act(seen[-1]))
        rows["rewards"].append(float(simulator.step(rows["actions"][-1])))
        seen.append(simulator.observe())
    episode = {key: np.array(values) for key, values in rows.items()}
    episode["dones"] = episode["rewards"].astype(np.int64)
    # As robomimic's own extraction: the robot's senses, and the objects as one vector.
    for key in seen[0]:
        if key == "object" or (key.startswith("robot0_") and not key.endswith("proprio-state")):
            values = np.array([observation[key] for observation in seen])
            episode[f"obs/{key}"], episode[f"next_obs/{key}"] = values[:-1], values[1:]
    for camera, frames in images.items():
        episode[f"obs/{camera}_image"] = np.array(frames)
    return episode
