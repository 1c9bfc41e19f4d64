"""What env_args say of the arms' controllers, whichever version of robosuite wrote them. Needs no robosuite."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.robomimic.rotations import SIX_DIM
from dopr_lightning.errors import UserError

Array = npt.NDArray[np.float64]

_OLDEST, _NEWEST = (1, 2), (1, 5)


def version(env_args: Mapping[str, Any]) -> tuple[int, int]:
    """Major and minor version of the robosuite that recorded the file.

    Raises:
        UserError: It is one whose settings are not understood here.
    """
    text = str(env_args.get("env_version", "1.2"))  # not yet written then
    try:
        major, minor = (int(part) for part in text.split(".")[:2])
    except ValueError:
        major, minor = 0, 0
    if not _OLDEST <= (major, minor) <= _NEWEST:
        raise UserError(
            f"env_args are of robosuite {text}; versions 1.2 to 1.5 are understood: fetch the file for 1.5 with "
            "dopr demos robomimic"
        )
    return major, minor


def arm_controllers(env_args: Mapping[str, Any], absolute: bool) -> list[dict[str, Any]]:
    """The settings of each robot's arm, in the terms of robosuite 1.5.

    Args:
        env_args: As in a file.
        absolute: Ask for poses in the world's frame in place of offsets.

    Returns:
        One dictionary per robot.

    Raises:
        UserError: There are none, or others than OSC_POSE, which all of robomimic's are; or poses are asked of arms
            that do not take offsets in that frame.
    """
    kwargs = env_args["env_kwargs"]
    robots = kwargs.get("robots", [])
    robots = [robots] if isinstance(robots, str) else robots
    written = kwargs.get("controller_configs")
    per_robot = written if isinstance(written, list) else [written] * len(robots)
    if not robots or len(per_robot) != len(robots) or not all(isinstance(config, dict) for config in per_robot):
        raise UserError("env_args name no robots with controller_configs for each; fetch the file again")
    arms = []
    for config in per_robot:
        if "body_parts" in config:
            parts = config["body_parts"].get("arms", config["body_parts"])
            arm = copy.deepcopy(parts.get("right", {}))
            frame = arm.get("input_ref_frame", "base")
            offsets = arm.get("input_type", "delta") == "delta"
        else:
            arm = copy.deepcopy(config)
            frame = "world"
            offsets = arm.pop("control_delta", True)
        if arm.get("type") != "OSC_POSE":
            raise UserError(f"env_args have an arm with a controller {arm.get('type')}; choose a file with OSC_POSE")
        if absolute and (frame != "world" or not offsets):
            raise UserError(
                "absolute actions are made of offsets in the world's frame; the actions of env_args are "
                f"{'offsets' if offsets else 'poses'} in the frame of the {frame}: use them as stored"
            )
        arm |= {"input_ref_frame": frame, "input_type": "delta" if offsets and not absolute else "absolute"}
        arms.append(arm)
    return arms


def action_bounds(env_args: Mapping[str, Any], absolute: bool = False) -> tuple[Array, Array]:
    """The least and the greatest action that is not clipped; of poses only the gripper is.

    Args:
        env_args: As in a file.
        absolute: Of poses with 6-D rotations, (10 arms,) each; else of what the file holds, (7 arms,).
    """
    arms = arm_controllers(env_args, absolute=False)
    if absolute:
        bound = np.tile([np.inf] * (SIX_DIM - 1) + [1.0], len(arms))
        return -bound, bound
    low, high = [], []
    for arm in arms:
        offsets = arm["input_type"] == "delta"
        low += [*np.broadcast_to(arm.get("input_min", -1) if offsets else -np.inf, 6), -1.0]
        high += [*np.broadcast_to(arm.get("input_max", 1) if offsets else np.inf, 6), 1.0]
    return np.array(low), np.array(high)
