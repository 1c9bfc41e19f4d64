"""A file's images, laid out so that single ones can be read when they are needed."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.home import data_home
from dopr_lightning.data.robomimic.files import DemoFile, unfinished
from dopr_lightning.errors import UserError


def unpacked(file: DemoFile, camera: str, sha256: str) -> npt.NDArray[np.uint8]:
    """All of a camera's images, one demonstration after the other, (N, H, W, 3), as a memory map.

    A file holds them compressed, demonstration by demonstration. The first call unpacks them under
    ``data_home()/robomimic/frames``: 2 GB for a hundred thousand.

    Args:
        file: Open, with all of its demonstrations.
        camera: Which.
        sha256: Of the file; its images lie under this name.

    Raises:
        UserError: A demonstration has no such images, or some of another size; or there is no room for them.
    """
    path = data_home() / "robomimic" / "frames" / sha256 / f"{camera}.npy"
    if not path.is_file():
        partial = unfinished(path)
        steps, shape = sum(file.steps(demo) for demo in file.demos), image_shape(file, camera)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(steps, *shape))
            start = 0
            for demo in file.demos:
                images = file.read(demo, f"obs/{camera}_image")
                end = start + file.steps(demo)
                if images.dtype != np.uint8 or images.shape != (end - start, *shape):
                    raise UserError(
                        f"{file.path}: {demo}/obs/{camera}_image is {images.dtype} of shape {images.shape}, not uint8 "
                        f"of {(end - start, *shape)}; render it again with dopr demos robomimic --hdf5 image"
                    )
                frames[start:end] = images
                start = end
            frames.flush()
            os.replace(partial, path)
        except OSError as error:
            size = steps * np.prod(shape) / 1e9
            raise UserError(
                f"{path}: cannot unpack {size:.1f} GB of images there ({error}); make room, or let DOPR_HOME be "
                "another folder"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def image_shape(file: DemoFile, camera: str) -> tuple[int, int, int]:
    """Height, width and colours of a camera's images.

    Raises:
        UserError: There are none, or they are not square.
    """
    demo = file.demos[0]
    shape = file.shape(demo, f"obs/{camera}_image")
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise UserError(f"{file.path}: {demo}/obs/{camera}_image has shape {shape}, not (steps, side, side, 3)")
    return shape[1], shape[2], shape[3]
