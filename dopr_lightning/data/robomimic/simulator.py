"""robosuite 1.5, made from the env_args of a robomimic file of any of its versions.

What changed on the way, and is undone here, so that a policy sees and does in the simulator what its data say:

- A controller was one dictionary (``"type": "OSC_POSE"``) that moved in the world's frame; it is now a part of a
  composite one, and moves in the robot's frame unless told.
- ``object`` had poses before relative poses, and Lift's last three numbers the other sign.
- ``lite_physics``, on by default, is quicker and moves differently.

And what has not changed: ``step()`` returns observations sampled early in the control step, up to 48 ms before its end.
Files hold them at the recorded states, so here they are read anew.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.opengl import no_opengl
from dopr_lightning.data.robomimic.absolute import kinematic_model
from dopr_lightning.data.robomimic.controllers import arm_controllers, version
from dopr_lightning.errors import UserError, import_extra

Array = npt.NDArray[Any]

EXTRA = "robomimic"


def _poses(name: str) -> tuple[str, ...]:
    return (f"{name}_pos", f"{name}_quat", f"{name}_to_robot0_eef_pos", f"{name}_to_robot0_eef_quat")


# What ``object`` consists of in files of robosuite 1.2 to 1.4, "-" for the opposite sign. Other tasks are as in 1.5.
_OLD_OBJECT = {
    "Lift": ("cube_pos", "cube_quat", "-gripper_to_cube_pos"),
    "PickPlaceCan": _poses("Can"),
    "NutAssemblySquare": _poses("SquareNut"),
    "ToolHang": (*_poses("base"), *_poses("frame"), *_poses("tool"), "frame_is_assembled", "tool_on_frame"),
}


class Simulator:
    """A task with its own robots and controllers.

    Args:
        env_args: As in a file: ``env_name``, ``env_version``, ``env_kwargs``.
        absolute: Take poses in the world's frame, in place of the offsets the file's controllers took.
        cameras: Cameras to `render`; any takes off-screen OpenGL.

    Raises:
        UserError: robosuite is not installed or is another version; the task, a controller, an argument or a camera is
            unknown to it; or there is no OpenGL.
    """

    def __init__(
        self,
        env_args: Mapping[str, Any],
        absolute: bool = False,
        cameras: Sequence[str] = (),
    ) -> None:
        robosuite = import_robosuite()
        self.env_args = env_args
        self._old = version(env_args) < (1, 5)
        name = env_args["env_name"]
        kwargs = _arguments(env_args, absolute) | {"has_offscreen_renderer": bool(cameras)}
        if name not in robosuite.ALL_ENVIRONMENTS:
            raise UserError(
                f"robosuite {robosuite.__version__} has no task {name!r}, of which env_args speak; it has: "
                f"{', '.join(sorted(robosuite.ALL_ENVIRONMENTS))}"
            )
        try:
            self._env = robosuite.make(name, seed=0, **kwargs)
            if cameras:
                self._env.sim.render(camera_name=None, width=8, height=8)
        # Assertions and lookups in robosuite; without OpenGL also errors of PyOpenGL, and of what it failed to load.
        except Exception as error:
            if cameras and not isinstance(error, TypeError):
                raise no_opengl(error) from error
            raise UserError(f"robosuite {robosuite.__version__} cannot make the {name} of env_args: {error}") from error
        unknown = [camera for camera in cameras if camera not in self._env.sim.model.camera_names]
        if unknown:
            there = ", ".join(self._env.sim.model.camera_names)
            self.close()
            raise UserError(f"{name} has no camera {unknown[0]!r}; it has: {there}")
        self.model = ""

    @property
    def state(self) -> Array:
        """MuJoCo's time, qpos and qvel, (1 + nq + nv,)."""
        return np.array(self._env.sim.get_state().flatten())

    def reset(self, seed: int) -> None:
        """Start an episode; its initial state, sizes of objects included, is a function of the seed."""
        # In place: samplers made earlier hold this generator, and env.rng = default_rng(seed) would leave them theirs.
        self._env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._env.reset()
        # MuJoCo gives out the XML of whatever was compiled last, so now or never.
        self.model = self._env.sim.model.get_xml()

    def restore(self, model: str, state: Array) -> None:
        """Start an episode at a recorded state.

        The controllers are told that the robot started there: they pull its elbow towards its first posture.

        Args:
            model: The recorded scene's XML. A scene of robosuite 1.4 cannot be loaded by 1.5, whose own is used with
                the recorded positions of all joints; objects then have sizes of their own.
            state: (1 + nq + nv,).

        Raises:
            UserError: The state is not of this scene.
        """
        env = self._env
        if self._old:
            self.reset(seed=0)
        else:
            env.reset_from_xml_string(env.edit_model_xml(model))
            env.sim.reset()
        env.sim.set_state_from_flattened(self.translated(model, state))
        env.sim.forward()
        for robot in env.robots:
            for arm in robot.arms:
                controller = robot.composite_controller.part_controllers[arm]
                controller.update_initial_joints(env.sim.data.qpos[controller.qpos_index])
        # Relative poses are made of the object's pose at the previous reading.
        env._get_observations(force_update=True)

    def translated(self, model: str, states: Array) -> Array:
        """States (..., n) of a recorded scene as states of the present one, (..., 1 + nq + nv).

        Raises:
            UserError: They do not fit.
        """
        present = self.state
        name = self.env_args["env_name"]
        if not self._old:
            if states.shape[-1] != len(present):
                raise UserError(
                    f"recorded states have {states.shape[-1]} numbers, this robosuite's {name} has {len(present)}; "
                    "fetch the file for robosuite 1.5"
                )
            return states
        ours = _columns(self._env.sim.model._model)
        renamed = np.broadcast_to(present, (*states.shape[:-1], len(present))).copy()
        for joint, columns in _columns(kinematic_model(model)).items():
            now = re.sub(r"^gripper(\d+)_", r"gripper\1_right_", joint)
            if now not in ours or columns.max() >= states.shape[-1]:
                raise UserError(
                    f"the recorded states of joint {joint!r} do not fit this robosuite's {name}; fetch the file for "
                    "robosuite 1.5"
                )
            renamed[..., ours[now]] = states[..., columns]
        return renamed

    def jump(self, state: Array) -> None:
        """Set a state of the present scene, without any memory of what led there: to look at, not to go on from."""
        self._env.sim.set_state_from_flattened(state)
        self._env.sim.forward()

    def distance(self, state: Array) -> float:
        """Largest difference of any joint's position from a state: metres, radians, or parts of a unit quaternion."""
        nq = self._env.sim.model.nq
        return float(np.abs(self.state - state)[1 : 1 + nq].max())

    def step(self, action: Array) -> bool:
        """Act for one control step.

        Args:
            action: (7 arms,).

        Returns:
            Whether the task is solved now.
        """
        self._env.step(action)
        # The last physics step moved the joints only.
        self._env.sim.forward()
        return self.solved

    @property
    def solved(self) -> bool:
        """Whether the task is solved in the present state."""
        return bool(self._env._check_success())

    def observe(self) -> dict[str, Array]:
        """All low-dimensional observations, by their names in robomimic's files."""
        env = self._env
        env.sim.forward()
        if self._old:  # ... where relative poses were of the same moment
            env._get_observations(force_update=True)
        named = env._get_observations(force_update=True)
        observation = {key: np.atleast_1d(np.asarray(value, dtype=np.float64)) for key, value in named.items()}
        observation["object"] = observation["object-state"]
        if self._old and (parts := _OLD_OBJECT.get(self.env_args["env_name"])):
            observation["object"] = np.concatenate(
                [-observation[part[1:]] if part.startswith("-") else observation[part] for part in parts]
            )
        return observation

    def render(self, camera: str, size: int) -> Array:
        """What a camera sees, (size, size, 3) uint8, upright."""
        image = self._env.sim.render(camera_name=camera, width=size, height=size)
        return np.ascontiguousarray(image[::-1])

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()


def _columns(model: Any) -> dict[str, Array]:
    """Which numbers of a flattened state are of which joint."""
    positions, velocities = (7, 4, 1, 1), (6, 3, 1, 1)  # of free, ball, slide and hinge joints
    return {
        model.joint(joint).name: np.concatenate(
            [
                1 + model.jnt_qposadr[joint] + np.arange(positions[model.jnt_type[joint]]),
                1 + model.nq + model.jnt_dofadr[joint] + np.arange(velocities[model.jnt_type[joint]]),
            ]
        )
        for joint in range(model.njnt)
    }


def _arguments(env_args: Mapping[str, Any], absolute: bool) -> dict[str, Any]:
    """The keyword arguments of robosuite.make."""
    from robosuite.controllers.composite.composite_controller_factory import refactor_composite_controller_config

    kwargs = copy.deepcopy(env_args["env_kwargs"])
    kwargs.pop("env_lang", None)  # robomimic's own
    robots = [kwargs["robots"]] if isinstance(kwargs.get("robots"), str) else kwargs.get("robots", [])
    arms = arm_controllers(env_args, absolute)
    kwargs |= {
        "controller_configs": [
            refactor_composite_controller_config(arm, robot, ["right"]) for robot, arm in zip(robots, arms, strict=True)
        ],
        "has_renderer": False,
        "use_camera_obs": False,
        "use_object_obs": True,
        "ignore_done": True,
        "hard_reset": True,  # draws the sizes of objects anew
    }
    if version(env_args) < (1, 5):
        kwargs["lite_physics"] = False
    return kwargs


def import_robosuite() -> ModuleType:
    """Import robosuite 1.5, quietly, and with a MuJoCo that it works with.

    Raises:
        UserError: It is not installed, or one of the two is another version.
    """
    rendering = os.environ.get("MUJOCO_GL")
    logging.disable(logging.WARNING)
    try:
        robosuite = import_extra("robosuite", EXTRA)
    except UserError:
        raise
    except Exception as error:  # MuJoCo loads OSMesa or GLFW at once where MUJOCO_GL says so
        raise no_opengl(error) from error
    finally:
        logging.disable(logging.NOTSET)
    # It chooses EGL for itself; left in the environment, subprocesses without EGL could not even import MuJoCo.
    if rendering is None:
        os.environ.pop("MUJOCO_GL", None)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    import mujoco

    for name, found, wanted, fits in (
        ("robosuite", robosuite.__version__, "1.5", robosuite.__version__.startswith("1.5.")),
        ("mujoco", mujoco.__version__, "3.3 to 3.9", mujoco.__version__.startswith("3.")),
    ):
        if not fits:
            raise UserError(
                f"{name} {found} is installed, {wanted} is needed; run: pip install 'dopr-lightning[{EXTRA}]'"
            )
    return robosuite
