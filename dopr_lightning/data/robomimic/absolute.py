"""Recorded offsets to the poses they asked for.

robomimic's files hold what its controllers took: an offset from where the gripper was, clipped and scaled. Where the
gripper was follows from the recorded state by kinematics alone, so no simulation is needed. A pose says the same to a
policy that is a few steps late, which is why Diffusion Policy predicts poses.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation

from dopr_lightning.data.robomimic.files import DemoFile
from dopr_lightning.data.robomimic.rotations import AXIS_ANGLE_DIM, six_from_actions
from dopr_lightning.errors import UserError

Array = npt.NDArray[np.floating[Any]]

# gripper0_grip_site in robosuite 1.4, gripper0_right_grip_site in 1.5: the frame that OSC controllers move.
_GRIP_SITE = re.compile(r"gripper\d+_(right_)?grip_site")
# All that moves sites is bodies and joints. The rest refers to meshes and textures on the recorder's disk, or to that.
_NOT_KINEMATICS = {
    "asset",
    "actuator",
    "sensor",
    "contact",
    "equality",
    "tendon",
    "keyframe",
    "geom",
    "camera",
    "light",
}


def stored_as_poses(file: DemoFile, demo: str) -> Array:
    """The poses that a demonstration's actions asked for, with 6-D rotations: (T, 10 arms).

    Raises:
        UserError: The file's controllers or states do not allow it.
    """
    controllers = file.controllers(absolute=True)
    try:
        positions, rotations = gripper_poses(file.model(demo), file.read(demo, "states"))
        return six_from_actions(absolute_actions(file.read(demo, "actions"), positions, rotations, controllers))
    except ValueError as error:
        raise UserError(f"{file.path}: {demo}: {error}; use the actions as stored, or fetch the file again") from error


def gripper_poses(model: str, states: Array) -> tuple[Array, Array]:
    """Where the grippers were.

    Args:
        model: MuJoCo XML of the scene.
        states: (T, 1 + nq + nv), MuJoCo's time, qpos and qvel.

    Returns:
        Positions (T, arms, 3) and rotation matrices (T, arms, 3, 3), in the world's frame.

    Raises:
        ValueError: The states are not of this scene, or it has no gripper.
    """
    import mujoco

    scene = kinematic_model(model)
    if states.shape[1] != 1 + scene.nq + scene.nv:
        raise ValueError(f"states have {states.shape[1]} numbers, the scene has {1 + scene.nq + scene.nv}")
    sites = [site for site in range(scene.nsite) if _GRIP_SITE.fullmatch(scene.site(site).name)]
    if not sites:
        raise ValueError("the scene has no site named gripper0_grip_site or gripper0_right_grip_site")
    data = mujoco.MjData(scene)
    positions, rotations = [], []
    for state in states:
        data.qpos[:] = state[1 : 1 + scene.nq]
        mujoco.mj_kinematics(scene, data)
        positions.append(data.site_xpos[sites])
        rotations.append(data.site_xmat[sites].reshape(-1, 3, 3))
    return np.stack(positions), np.stack(rotations)


def absolute_actions(
    actions: Array, positions: Array, rotations: Array, controllers: Sequence[Mapping[str, Any]]
) -> Array:
    """What robosuite's OSC_POSE controllers made of offsets in the world's frame, in the units of its absolute mode.

    Args:
        actions: (T, 7 arms): per arm, offsets of position and rotation (axis-angle) in controller units, and gripper.
        positions: (T, arms, 3), as from `gripper_poses`.
        rotations: (T, arms, 3, 3).
        controllers: Each arm's ``input_min``, ``input_max``, ``output_min`` and ``output_max``.

    Returns:
        (T, 7 arms): per arm, position in metres, rotation as axis-angle, gripper.
    """
    arms = actions.reshape(len(actions), -1, AXIS_ANGLE_DIM)
    goals = np.empty_like(arms, dtype=np.float64)
    for arm, controller in enumerate(controllers):
        low, high, out_low, out_high = (
            np.broadcast_to(np.asarray(controller[key], dtype=np.float64), 6)
            for key in ("input_min", "input_max", "output_min", "output_max")
        )
        inputs = np.clip(arms[:, arm, :6], low, high)
        offset = (inputs - (high + low) / 2) * (out_high - out_low) / (high - low) + (out_high + out_low) / 2
        turned = Rotation.from_rotvec(offset[:, 3:]) * Rotation.from_matrix(rotations[:, arm])
        goals[:, arm] = np.concatenate(
            [positions[:, arm] + offset[:, :3], turned.as_rotvec(), arms[:, arm, 6:]], axis=-1
        )
    return goals.reshape(len(actions), -1)


def kinematic_model(model: str) -> Any:
    """A MuJoCo model of the scene's bodies, joints and sites, without what it takes to draw or to simulate it."""
    import mujoco

    root = ElementTree.fromstring(model)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in _NOT_KINEMATICS:
                parent.remove(child)
        parent.attrib.pop("material", None)
    # Without geoms some bodies have no mass, which MuJoCo refuses in what moves; poses do not depend on it.
    for compiler in root.findall("compiler"):
        compiler.attrib.pop("inertiafromgeom", None)
    ElementTree.SubElement(root, "compiler", boundmass="1", boundinertia="1")
    return mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))
