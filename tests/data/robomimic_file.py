"""A small robomimic file, without a simulator: one arm on a column that turns and rises, so that poses are known."""

from __future__ import annotations

import copy
import ctypes.util
import importlib.util
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

# Looked for, not imported: robosuite changes MUJOCO_GL on import, and `import_robosuite` changes it back.
needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="pip install 'dopr-lightning[robomimic]'"
)
needs_opengl = pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="apt-get install libegl1")

# The grip site is 0.5 m out from the column, turned by a right angle about the vertical.
COLUMN = """
<mujoco>
  <asset><mesh name="link" file="/home/recorder/link.stl"/></asset>
  <worldbody>
    <geom type="plane" size="1 1 1" material="gone"/>
    <body name="robot{arm}_base" pos="0 {y} 0">
      <joint name="robot{arm}_joint1" type="hinge" axis="0 0 1"/>
      <geom type="mesh" mesh="link"/>
      <body name="robot{arm}_hand">
        <joint name="robot{arm}_joint2" type="slide" axis="0 0 1"/>
        <site name="gripper{arm}_{side}grip_site" pos="0.5 0 0" quat="0.70710678 0 0 0.70710678"/>
      </body>
    </body>
  </worldbody>
  <actuator><motor joint="robot{arm}_joint1"/></actuator>
</mujoco>
"""

OSC_POSE = {
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping": 1,
    "impedance_mode": "fixed",
    "kp_limits": [0, 300],
    "damping_limits": [0, 10],
    "position_limits": None,
    "orientation_limits": None,
    "uncouple_pos_ori": True,
    "control_delta": True,
    "interpolation": None,
    "ramp_ratio": 0.2,
}


def env_args(robosuite: str = "1.5.1", name: str = "Lift", **kwargs: Any) -> dict[str, Any]:
    """As robomimic's files for robosuite 1.4.1 and 1.5 have them."""
    arm = copy.deepcopy(OSC_POSE)
    new = {"input_ref_frame": "world", "gripper": {"type": "GRIP"}}
    controller = arm if robosuite < "1.5" else {"type": "BASIC", "body_parts": {"right": arm | new}}
    settings = {
        "has_renderer": False,
        "has_offscreen_renderer": False,
        "ignore_done": True,
        "use_object_obs": True,
        "use_camera_obs": False,
        "control_freq": 20,
        "controller_configs": controller,
        "robots": ["Panda"],
        "camera_depths": False,
        "camera_heights": 84,
        "camera_widths": 84,
        "reward_shaping": False,
    }
    if robosuite >= "1.5":
        settings["lite_physics"] = False
    return {"env_name": name, "env_version": robosuite, "type": 1, "env_kwargs": settings | kwargs}


LENGTHS = (9, 12, 30)


def write(path: Path, lengths: tuple[int, ...] = LENGTHS, robosuite: str = "1.5.1") -> Path:
    """Demonstrations ``demo_0``, ``demo_2``, ``demo_10`` ... as both versions lay them out."""
    rng = np.random.default_rng(0)
    names = ["demo_0", "demo_2", *(f"demo_{10 + i}" for i in range(len(lengths) - 2))][: len(lengths)]
    side = "" if robosuite < "1.5" else "right_"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"env_args": json.dumps(env_args(robosuite)), "total": sum(lengths)})
        for name, length in zip(names, lengths, strict=True):
            demo = data.create_group(name)
            demo.attrs.update({"num_samples": length, "model_file": COLUMN.format(arm=0, y=0, side=side)})
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["states"] = np.concatenate([0.05 * np.arange(length)[:, None], rng.uniform(-1, 1, (length, 4))], 1)
            demo["rewards"], demo["dones"] = np.zeros(length), np.zeros(length, np.int64)
            for key, size in (
                ("object", 10),
                ("robot0_eef_pos", 3),
                ("robot0_eef_quat", 4),
                ("robot0_gripper_qpos", 2),
            ):
                for when in ("obs", "next_obs"):
                    demo[f"{when}/{key}"] = rng.standard_normal((length, size))
        file["mask/train"] = np.array(names[:-1][::-1], dtype="S")
        file["mask/valid"] = np.array(names[-1:], dtype="S")
    return path
