"""robomimic: demonstrations of robosuite tasks by people, in HDF5 files.

A. Mandlekar et al., "What Matters in Learning from Offline Human Demonstrations for Robot Manipulation", CoRL 2021.
``dopr demos robomimic`` fetches a file, ``dopr demos lift`` makes one, ``dopr demos replay`` tries one out.

robomimic's own ``SequenceDataset`` is not used: it gives one step at a time as a dictionary of arrays, and reads, or
copies, for each. These files, read once, fit `Demonstrations`, whose windows are one gather per batch; the tests hold
the two against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.convention import Convention
from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.download import file_sha256
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.home import data_home
from dopr_lightning.data.robomimic.absolute import stored_as_poses
from dopr_lightning.data.robomimic.controllers import action_bounds
from dopr_lightning.data.robomimic.files import DemoFile
from dopr_lightning.data.robomimic.frames import image_shape, unpacked
from dopr_lightning.data.source import Source
from dopr_lightning.errors import UserError

Array = npt.NDArray[Any]

# How long robomimic lets policies try, in steps of 1/20 s.
HORIZONS = {
    "ph": {"lift": 400, "can": 400, "square": 400, "transport": 700, "tool_hang": 700},
    "mh": {"lift": 500, "can": 500, "square": 500, "transport": 1100},
    "scripted": {"lift": 400},
}
KEYS = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


class Robomimic(Source):
    """A robosuite task, from low-dimensional observations or from images.

    An episode's score is 1 if the task was ever solved, else 0; it ends when it is solved.

    Args:
        task: ``lift``, ``can``, ``square``, ``tool_hang`` or ``transport``.
        dataset_type: Whose demonstrations: ``ph``, one proficient person; ``mh``, several people of different skill;
            ``scripted``, what ``dopr demos lift`` makes.
        path: A file to read; by default the one that ``dopr demos`` put in place for the task and type.
        keys: Low-dimensional observations, concatenated in this order. Beside images leave out ``object``, which says
            where things are.
        cameras: Observe the images of these, too; by default the file is then the one with images.
        absolute: Learn the poses that actions asked for, with 6-D rotations (10 numbers per arm), in place of the
            stored offsets (7 per arm).
        filter_key: Only the demonstrations of this mask of the file, ``20_percent`` say.
        max_steps: How long a policy may try; by default robomimic's own horizon for the task and type.

    Raises:
        UserError: There are no keys.
    """

    def __init__(
        self,
        task: str = "lift",
        dataset_type: Literal["ph", "mh", "scripted"] = "ph",
        path: str | None = None,
        keys: tuple[str, ...] = KEYS,
        cameras: tuple[str, ...] = (),
        absolute: bool = False,
        filter_key: str | None = None,
        max_steps: int | None = None,
    ) -> None:
        if not keys:
            raise UserError(
                "Robomimic: keys are empty; name at least one low-dimensional observation, beside images too"
            )
        self.task = task
        self.dataset_type = dataset_type
        self.path = path
        self.keys = tuple(keys)
        self.cameras = tuple(cameras)
        self.absolute = absolute
        self.filter_key = filter_key
        self.max_steps = max_steps

    @property
    def environment(self) -> EnvironmentSpec:
        """The robots and controllers the file was recorded with.

        Raises:
            UserError: The file is missing or damaged, or of a task or version that is unknown.
        """
        with self._open() as file:
            env_args = file.env_args
            file.controllers(self.absolute)  # refuses what it does not understand
            sizes = {camera: image_shape(file, camera)[0] for camera in self.cameras}
        max_steps = self.max_steps
        if max_steps is None:
            max_steps = HORIZONS[self.dataset_type].get(self.task)
        if max_steps is None:
            raise UserError(f"task {self.task!r}, {self.dataset_type}: no horizon is known; set max_steps")
        kwargs = {"env_args": env_args, "keys": list(self.keys), "absolute": self.absolute}
        return EnvironmentSpec(
            id="dopr/Robosuite-v0",
            max_steps=max_steps,
            metric="success",
            kwargs=kwargs | ({"images": sizes} if sizes else {}),
            extra="robomimic",
            module="dopr_lightning.rollout.robosuite_env",
            cameras=self.cameras,
            name=f"robomimic's {self.task} {self.dataset_type}{' from images' if sizes else ''}",
            simulators=("robosuite", "mujoco"),
        )

    def convention(self) -> Convention:
        """Poses with 6-D rotations; or what the file holds, mostly offsets, whose rotations are axis times angle.

        Raises:
            UserError: The file is missing or damaged.
        """
        with self._open() as file:
            arms = file.controllers(absolute=False)
            low, high = (tuple(bound.tolist()) for bound in action_bounds(file.env_args, self.absolute))
        if self.absolute:
            return Convention(self.keys, "absolute", "6d", low, high)
        offsets = all(arm["input_type"] == "delta" for arm in arms)
        return Convention(self.keys, "relative" if offsets else "absolute", "axis_angle", low, high)

    def load(self) -> Demonstrations:
        """Read the demonstrations.

        Raises:
            UserError: The file is missing or damaged, lacks a key or a camera, or holds an action out of bounds.
        """
        observations, actions = [], []
        with self._open() as file:
            file.controllers(self.absolute)  # refuses what it does not understand
            sha256 = file_sha256(file.path)
            for demo in file.demos:
                seen = [self._flat(file, demo, f"obs/{key}") for key in self.keys]
                done = self._flat(file, demo, "actions")
                for key, array in zip(self.keys, seen, strict=True):
                    if len(array) != len(done):
                        raise UserError(
                            f"{file.path}: {demo} has {len(done)} actions but {len(array)} of obs/{key}; fetch it again"
                        )
                _check_bounds(file, demo, done)
                observations.append(np.concatenate(seen, axis=1))
                actions.append(stored_as_poses(file, demo) if self.absolute else done)
            chosen, numbers = file.demos, file.numbers()
        images, rows = self._images(chosen, sha256) if self.cameras else (None, None)
        path = self._path()
        try:
            return Demonstrations(
                np.concatenate(observations),
                np.concatenate(actions),
                np.cumsum([len(array) for array in actions]),
                # Not where the file lies: records travel.
                source=f"robomimic:{self.task}/{self.dataset_type}/{path.name}",
                sha256=sha256,
                images=images,
                image_rows=rows,
                numbers=numbers,
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def _images(self, chosen: Sequence[str], sha256: str) -> tuple[dict[str, npt.NDArray[np.uint8]], Array]:
        """Every camera's images, and which of them the chosen demonstrations have."""
        with DemoFile(self._path()) as file:  # images are unpacked for all of its demonstrations
            images = {camera: unpacked(file, camera, sha256) for camera in self.cameras}
            lengths = [file.steps(demo) for demo in file.demos]
            starts = dict(zip(file.demos, np.cumsum([0, *lengths[:-1]]), strict=True))
            return images, np.concatenate([starts[demo] + np.arange(file.steps(demo)) for demo in chosen])

    def _flat(self, file: DemoFile, demo: str, key: str) -> Array:
        array = file.read(demo, key)
        if array.ndim != 2 or array.dtype.kind not in "fiu":
            raise UserError(
                f"{file.path}: {demo}/{key} has shape {array.shape} and type {array.dtype}, not (steps, dimensions) of "
                "numbers; choose other keys"
            )
        return array

    def _open(self) -> DemoFile:
        path = self._path()
        if self.path is None and not path.is_file():
            scripted = self.dataset_type == "scripted"
            how = (
                f"{self.task} --scripted 50{' --images' if self.cameras else ''}"
                if scripted
                else f"robomimic --task {self.task} --type {self.dataset_type}{' --hdf5 image' if self.cameras else ''}"
            )
            raise UserError(f"{path}: no such file; run: dopr demos {how}")
        return DemoFile(path, self.filter_key)

    def _path(self) -> Path:
        if self.path is not None:
            return Path(self.path)
        return registered_file(self.task, self.dataset_type, "image" if self.cameras else "low_dim")


def registered_file(task: str, dataset_type: str, hdf5_type: str = "low_dim") -> Path:
    """Where ``dopr demos`` puts a file, and `Robomimic` looks for it.

    Raises:
        UserError: There are no such demonstrations.
    """
    tasks = HORIZONS.get(dataset_type, {})
    if task not in tasks:
        raise UserError(
            f"no {dataset_type!r} demonstrations of task {task!r}; choose from "
            + "; ".join(f"{kind}: {', '.join(known)}" for kind, known in HORIZONS.items())
        )
    return data_home() / "robomimic" / task / dataset_type / f"{hdf5_type}_v15.hdf5"


def _check_bounds(file: DemoFile, demo: str, actions: Array) -> None:
    low, high = action_bounds(file.env_args)
    if actions.shape[1] != len(low):
        raise UserError(
            f"{file.path}: {demo} has {actions.shape[1]} numbers per action, the robots of env_args take {len(low)}; "
            "fetch it again"
        )
    outside = (actions < low) | (actions > high)
    if outside.any():
        step, dimension = np.argwhere(outside)[0]
        raise UserError(
            f"{file.path}: {demo}, step {step}: action {dimension} is {actions[step, dimension]:.3g}, outside "
            f"[{low[dimension]:g}, {high[dimension]:g}], and would be clipped; clip it in the file, or remove the "
            "demonstration"
        )
