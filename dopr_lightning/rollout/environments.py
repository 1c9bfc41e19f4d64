"""From an `EnvironmentSpec` to an environment that can be stepped."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.opengl import mujoco_loads
from dopr_lightning.errors import UserError, import_extra

if TYPE_CHECKING:
    import gymnasium


def make(spec: EnvironmentSpec) -> gymnasium.Env[Any, Any]:
    """Make the environment.

    Raises:
        UserError: It is not installed, unknown, its actions are not flat vectors, or its observations are not what
            the spec's cameras say; or MuJoCo lacks the OpenGL it is told to load.
    """
    import gymnasium

    if spec.module is not None:
        _register(spec.module, spec)
    try:
        # Gymnasium's checker warns about observations a hair out of bounds; we check what matters while rolling out.
        with mujoco_loads():
            env = gymnasium.make(spec.id, max_episode_steps=spec.max_steps, disable_env_checker=True, **spec.kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        extra = f"[{spec.extra}]" if spec.extra else ""
        raise UserError(
            f"environment {spec.id!r} lacks a dependency ({error}); run: pip install 'dopr-lightning{extra}'"
        ) from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UserError(
            f"environment {spec.id!r} cannot be made ({error}); correct the id, or install the package it is in"
        ) from error
    if misfit := _misfit(spec, env):
        env.close()
        raise UserError(f"environment {spec.id!r}: {misfit}")
    return env


def _register(module: str, spec: EnvironmentSpec) -> None:
    """Import the module that makes the id known."""
    if spec.extra:
        import_extra(module, spec.extra)
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"environment {spec.id!r} is made known by the module {module!r}, and there is {error}; install it, or "
            "put its folder into PYTHONPATH"
        ) from error


def _misfit(spec: EnvironmentSpec, env: gymnasium.Env[Any, Any]) -> str:
    """What is wrong with its spaces, and the way out; or nothing."""
    sees, does = env.observation_space, env.action_space
    if spec.cameras:
        if misfit := _misfit_of_images(spec, getattr(sees, "spaces", {})):
            return f"observations are {sees}; {misfit}"
    elif not _is_vector(sees):
        return f"observations are {sees}, not a flat Box; choose an environment of vectors"
    return "" if _is_vector(does) else f"actions are {does}, not a flat Box; choose an environment of vectors"


def _misfit_of_images(spec: EnvironmentSpec, parts: Mapping[str, Any]) -> str:
    images = getattr(parts.get("images"), "spaces", {})
    if not _is_vector(parts.get("state")) or not images:
        return "with cameras they must be a Dict of a flat Box 'state' and a Dict 'images'"
    for camera in spec.cameras:
        if camera not in images:
            return f"there is no camera {camera!r}, only {', '.join(images)}; correct the cameras of its spec"
        if len(images[camera].shape) != 3 or images[camera].shape[2] != 3 or images[camera].dtype != np.uint8:
            return f"images of camera {camera!r} must be uint8 of shape (height, width, 3)"
    return ""


def _is_vector(space: Any) -> bool:
    from gymnasium.spaces import Box

    return isinstance(space, Box) and len(space.shape) == 1
