"""From an `EnvironmentSpec` to an environment that can be stepped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError, import_extra

if TYPE_CHECKING:
    import gymnasium


def make(spec: EnvironmentSpec) -> gymnasium.Env[Any, Any]:
    """Make the environment.

    Raises:
        UserError: It is not installed, unknown, or its observations or actions are not flat vectors.
    """
    import gymnasium

    if spec.module is not None:
        import_extra(spec.module, spec.extra or "dev")
    try:
        # Gymnasium's checker warns about observations a hair out of bounds; we check what matters while rolling out.
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
    for name, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            env.close()
            raise UserError(
                f"environment {spec.id!r}: {name} are {space}, not a flat Box; choose an environment of vectors"
            )
    return env
