"""What cameras would have seen: robomimic publishes states, and images are rendered from them, as it does itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np

from dopr_lightning.data.robomimic.files import DemoFile, unfinished, write_array
from dopr_lightning.data.robomimic.simulator import Simulator

# The views that Diffusion Policy and much-ado-about-noising learn from.
CAMERAS = {
    "lift": ("agentview", "robot0_eye_in_hand"),
    "can": ("agentview", "robot0_eye_in_hand"),
    "square": ("agentview", "robot0_eye_in_hand"),
    "tool_hang": ("sideview", "robot0_eye_in_hand"),
    "transport": ("shouldercamera0", "robot0_eye_in_hand", "shouldercamera1", "robot1_eye_in_hand"),
}

IMAGE_SIZE = 84
"""Height and width."""


def add_images(
    source: Path,
    target: Path,
    cameras: Sequence[str],
    progress: Callable[[int, int | None], None] | None = None,
) -> None:
    """Copy a file and add ``obs/CAMERA_image``, (T, 84, 84, 3) uint8, to every demonstration.

    Args:
        source: A robomimic file with states.
        target: The copy; it appears under its name when it is complete.
        cameras: Which.
        progress: Called with the demonstrations done and their number.

    Raises:
        UserError: The file or the simulator will not do, a camera is unknown, or there is no OpenGL.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished(target)
    with DemoFile(source) as file:
        simulator = Simulator(file.env_args, cameras=cameras)
        try:
            with h5py.File(partial, "w") as copy:
                file.copy_to(copy)
                kwargs = {"use_camera_obs": True, "has_offscreen_renderer": True, "camera_names": list(cameras)}
                kwargs |= {"camera_heights": IMAGE_SIZE, "camera_widths": IMAGE_SIZE}
                env_args = file.env_args | {"env_kwargs": file.env_args["env_kwargs"] | kwargs}
                copy["data"].attrs["env_args"] = json.dumps(env_args, indent=4)
                for done, demo in enumerate(file.demos, start=1):
                    model, states = file.model(demo), file.read(demo, "states")
                    simulator.restore(model, states[0])
                    shape = len(states), IMAGE_SIZE, IMAGE_SIZE, 3
                    frames = {camera: np.empty(shape, np.uint8) for camera in cameras}
                    for step, state in enumerate(simulator.translated(model, states)):
                        simulator.jump(state)
                        for camera in cameras:
                            frames[camera][step] = simulator.render(camera, IMAGE_SIZE)
                    for camera, array in frames.items():
                        write_array(copy, f"data/{demo}/obs/{camera}_image", array)
                    if progress is not None:
                        progress(done, len(file.demos))
            os.replace(partial, target)
        finally:
            simulator.close()
            partial.unlink(missing_ok=True)
