"""What is there to draw with, without a screen, and what is said where there is nothing?

MuJoCo draws with the OpenGL that ``MUJOCO_GL`` names, and loads it when it is imported: who sets that variable cannot
even simulate where the library is missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from dopr_lightning.errors import UserError, one_line

VARIABLE = "MUJOCO_GL"

# Where their making failed, these complain once more when they are freed.
_RUINS = {"OffScreenViewer.__del__", "MjRenderContext.__del__"}


def no_opengl(error: BaseException) -> UserError:
    """Of an exception that came of drawing, or of loading what draws."""
    _silence_ruins()
    chosen = os.environ.get(VARIABLE)
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    what = f"{VARIABLE}={chosen} does not work" if chosen else "off-screen rendering fails"
    return UserError(
        f"{what} ({type(cause).__name__}: {one_line(cause)}); set {VARIABLE}=egl, which needs: apt-get "
        f"install libegl1 libgl1-mesa-dri; or {VARIABLE}=osmesa, which needs: apt-get install libosmesa6"
    )


@contextmanager
def mujoco_loads() -> Iterator[None]:
    """Say of what fails inside, where it is MuJoCo's import, what is wrong with the ``MUJOCO_GL`` it was given.

    Raises:
        UserError: Says what to install or to set.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get(VARIABLE) and "mujoco" not in sys.modules:
            raise no_opengl(error) from error
        raise


@contextmanager
def off_screen() -> Iterator[None]:
    """Let Gymnasium draw with EGL where there is no screen and nothing else is asked for.

    It would take GLFW, which needs a screen. The variable is taken back: processes without EGL could not import MuJoCo.
    """
    _silence_ruins()
    screen = any(os.environ.get(name) for name in (VARIABLE, "DISPLAY", "WAYLAND_DISPLAY"))
    if screen or not sys.platform.startswith("linux"):
        yield
        return
    os.environ[VARIABLE] = "egl"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


@cache
def _silence_ruins() -> None:
    before = sys.unraisablehook

    def report(what: sys.UnraisableHookArgs) -> None:
        if getattr(what.object, "__qualname__", "") not in _RUINS:
            before(what)

    sys.unraisablehook = report
