"""What is drawn with, and what is said where there is nothing to draw with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dopr_lightning.data.opengl import VARIABLE, off_screen

SCREENS = (VARIABLE, "DISPLAY", "WAYLAND_DISPLAY")


@pytest.mark.parametrize(
    "code",
    [
        "from dopr_lightning.data.experts import BuiltinExpert; BuiltinExpert().load()",
        "from dopr_lightning.data.environment import EnvironmentSpec; from dopr_lightning.rollout.environments import "
        "make; make(EnvironmentSpec('Walker2d-v5', 10, 'return'))",
    ],
    ids=["expert", "environment"],
)
def test_a_mujoco_that_cannot_load_its_opengl(code: str, tmp_path: Path) -> None:
    """It fails on import with whatever the loader raised; Gymnasium may say that MuJoCo is not installed."""
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {VARIABLE: "nothing"}, capture_output=True, text=True
    )
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("dopr_lightning.errors.UserError: MUJOCO_GL=nothing does not work (")
    assert "apt-get install libegl1" in last


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="EGL is Linux's")
def test_egl_is_taken_where_there_is_no_screen_and_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SCREENS:
        monkeypatch.delenv(name, raising=False)
    with off_screen():
        assert os.environ[VARIABLE] == "egl"
    assert VARIABLE not in os.environ
    for name in SCREENS:
        with monkeypatch.context() as one:
            one.setenv(name, "osmesa")
            with off_screen():
                assert os.environ.get(VARIABLE) == ("osmesa" if name == VARIABLE else None)
