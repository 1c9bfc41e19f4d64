"""What is in a robomimic HDF5 file, and how one is written.

    data            attributes: env_args (JSON: task, robosuite version, its keyword arguments), total (steps)
      demo_0        attributes: num_samples, model_file (MuJoCo XML)
        states      (T, 1 + nq + nv), MuJoCo's time, qpos and qvel before each action
        actions     (T, act_dim)
        rewards     (T,), after each action;  dones (T,)
        obs, next_obs    one (T, ...) array per observation key, before and after each action
      demo_1 ...
    mask            train, valid, 20_percent ...: names of demonstrations

The files for robosuite 1.4.1 and 1.5 are laid out alike; what differs is the simulator they speak of
(`dopr_lightning.data.robomimic.simulator`).
"""

from __future__ import annotations

import json
import os
import re
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from dopr_lightning.data.robomimic.controllers import arm_controllers, version
from dopr_lightning.errors import UserError, missing

Array = npt.NDArray[Any]

# EnvType.ROBOSUITE_TYPE of robomimic; the others are Gym and iGibson.
_ROBOSUITE = 1


class DemoFile:
    """A file open for reading; what is wrong with it is said with its name, the key and a way out.

    Args:
        path: The file.
        filter_key: Only the demonstrations of this mask, ``"train"`` say; ``None`` for all.

    Raises:
        UserError: The file is missing, damaged, not of robosuite demonstrations, or has no such mask.
    """

    def __init__(self, path: Path, filter_key: str | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: {missing(path)}; give a robomimic HDF5 file, or fetch one: dopr demos robomimic")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise self._damaged(error) from error
        try:
            with self._reading():
                self.env_args = self._read_env_args()
                self.demos = self._read_demos(filter_key)
        except UserError:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Use it in a ``with`` statement, which closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, demo: str, key: str) -> Array:
        """A whole array of one demonstration: ``"actions"``, ``"obs/object"``.

        Raises:
            UserError: There is none, or it is damaged.
        """
        with self._reading():
            return np.asarray(self._dataset(demo, key)[()])

    def shape(self, demo: str, key: str) -> tuple[int, ...]:
        """As `read`, without reading."""
        with self._reading():
            return tuple(self._dataset(demo, key).shape)

    def steps(self, demo: str) -> int:
        """How many actions a demonstration has."""
        return self.shape(demo, "actions")[0]

    def numbers(self) -> Array:
        """Which of all demonstrations in the file each of `demos` is."""
        with self._reading():
            places = {demo: place for place, demo in enumerate(_in_order(self._file["data"]))}
        return np.array([places[demo] for demo in self.demos])

    def controllers(self, absolute: bool) -> list[dict[str, Any]]:
        """As `arm_controllers`.

        Raises:
            UserError: env_args have none, or none that know poses.
        """
        try:
            return arm_controllers(self.env_args, absolute)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error

    def observation_keys(self, demo: str) -> list[str]:
        """The names of the observations of one demonstration."""
        with self._reading():
            return sorted(self._file["data"][demo].get("obs", {}))

    def model(self, demo: str) -> str:
        """The MuJoCo XML of the scene of one demonstration.

        Raises:
            UserError: There is none, or it is damaged.
        """
        with self._reading():
            xml = self._file["data"][demo].attrs.get("model_file")
            if xml is not None:
                ElementTree.fromstring(xml)  # attributes have no checksum
        if xml is None:
            raise UserError(f"{self.path}: {demo} has no attribute model_file; take a file with the simulator's states")
        return str(xml)

    def _dataset(self, demo: str, key: str) -> h5py.Dataset:
        group = self._file["data"][demo]
        if key not in group:
            parent = key.rpartition("/")[0]
            there = sorted(group.get(parent, {}) if parent else group)
            way_out = (
                "raw files hold no observations: take the low_dim file" if parent and not there else "choose another"
            )
            if key.endswith("_image"):
                way_out = "dopr demos robomimic --hdf5 image renders a task's usual cameras"
            raise UserError(
                f"{self.path}: {demo} has no {key!r}; {parent or 'it'} has: {', '.join(there) or 'nothing'}; {way_out}"
            )
        return group[key]

    def copy_to(self, target: h5py.File) -> None:
        """Copy everything into another file."""
        with self._reading():
            for name in self._file:
                self._file.copy(name, target)

    def _read_env_args(self) -> dict[str, Any]:
        way_out = "take one that robomimic publishes (dopr demos robomimic) or converted"
        text = self._file["data"].attrs.get("env_args") if "data" in self._file else None
        if text is None:
            raise UserError(f"{self.path}: not a robomimic file, it has no data with the attribute env_args; {way_out}")
        try:
            env_args = json.loads(text)
            kind, name, kwargs = env_args["type"], env_args["env_name"], env_args["env_kwargs"]
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{self.path}: env_args cannot be understood ({error}); {way_out}") from error
        if kind != _ROBOSUITE or not isinstance(kwargs, dict):
            raise UserError(f"{self.path}: env_args speak of {name!r} of type {kind}, not of robosuite; {way_out}")
        try:
            version(env_args)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return env_args

    def _read_demos(self, filter_key: str | None) -> list[str]:
        names = list(self._file["data"])
        if filter_key is not None:
            masks = self._file.get("mask", {})
            if filter_key not in masks:
                raise UserError(
                    f"{self.path}: no mask {filter_key!r}; choose one of: {', '.join(sorted(masks)) or '(none)'}"
                )
            chosen = [name.decode() for name in masks[filter_key][()]]
            if missing := sorted(set(chosen) - set(names)):
                raise UserError(
                    f"{self.path}: mask {filter_key!r} names {missing[0]}, which is not there; fetch it again"
                )
            names = chosen
        if not names:
            raise UserError(f"{self.path}: holds no demonstrations; fetch it again, or choose another filter_key")
        return _in_order(names)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError, RuntimeError, ValueError, AttributeError, ElementTree.ParseError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: damaged, or not HDF5 ({error}); fetch it again")


def _in_order(names: Iterable[str]) -> list[str]:
    # demo_10 after demo_9, as robomimic orders them.
    return sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


def unfinished(path: Path) -> Path:
    """Where a file is written until it is complete; containers that share a disk may share process numbers."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")


def write_array(group: h5py.Group, key: str, array: Array) -> None:
    """Write an array; images, which are most of a file, in chunks of one frame: a reader can take single ones."""
    image = {"chunks": (1, *array.shape[1:]), "compression": "gzip"} if array.ndim == 4 else {}
    group.create_dataset(key, data=array, **image)


class DemoWriter:
    """A file being written; it appears under its name when it is complete.

    Args:
        path: The file. What was there stays until then.
        env_args: As `DemoFile.env_args`.
    """

    def __init__(self, path: Path, env_args: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._unfinished = unfinished(path)
        self._file = h5py.File(self._unfinished, "w")
        self._data = self._file.create_group("data")
        self._data.attrs["env_args"] = json.dumps(env_args, indent=4)
        self._steps = 0
        self._demos: list[str] = []

    def __enter__(self) -> Self:
        """Leaving the ``with`` statement by an exception leaves no file."""
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._unfinished, self.path)
        else:
            self._unfinished.unlink()

    def add(self, model: str, arrays: Mapping[str, Array], **attributes: Any) -> None:
        """Add a demonstration.

        Args:
            model: MuJoCo XML of its scene.
            arrays: Key to (T, ...): ``"states"``, ``"actions"``, ``"obs/object"``.
            attributes: More attributes of it.
        """
        name = f"demo_{len(self._demos)}"
        group = self._data.create_group(name)
        for key, array in arrays.items():
            write_array(group, key, array)
        steps = len(arrays["actions"])
        group.attrs.update({"model_file": model, "num_samples": steps, **attributes})
        self._demos.append(name)
        self._steps += steps
        self._data.attrs["total"] = self._steps

    def mask(self, key: str, demos: Sequence[int]) -> None:
        """Name a subset of the demonstrations."""
        self._file[f"mask/{key}"] = np.array([self._demos[i] for i in demos], dtype="S")
