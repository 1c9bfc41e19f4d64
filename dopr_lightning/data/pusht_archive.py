"""How is Diffusion Policy's zarr archive of PushT read, when it may be damaged or something else?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.download import file_sha256
from dopr_lightning.errors import UserError, import_extra, missing

Array = npt.NDArray[Any]

CAMERA = "image"
SIZE = 96
"""Height and width of the frames, in the archive and in gym-pusht."""

# Codecs that only decompress. A zarr archive may also name one that unpickles.
_CODECS = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}


def read_archive(path: Path, images: Callable[[tuple[int, ...]], Array] | None = None) -> Demonstrations:
    """Read the demonstrations, observed as the five state numbers.

    Args:
        path: The archive.
        images: Gives a uint8 array of a shape to put the frames into, if there are any; they are left out without.

    Raises:
        UserError: The file is missing, damaged or something else.
    """
    way_out = "give Diffusion Policy's pusht_cchi_v7_replay.zarr.zip, or run without --path to download it"
    if not path.is_file():
        raise UserError(f"{path}: {missing(path)}; {way_out}")
    zarr = import_extra("zarr", "pusht")
    try:
        sha256 = file_sha256(path)
        with zarr.ZipStore(str(path), mode="r") as store:
            root = zarr.open_group(store, mode="r")
            states = _checked(root, "data/state", "steps", 5)[:]
            actions = _checked(root, "data/action", "steps", 2)[:]
            ends = _checked(root, "meta/episode_ends", "episodes")[:]
            frames = None
            if images is not None and "data/img" in root:
                array = _checked(root, "data/img", "steps", SIZE, SIZE, 3)
                frames = {CAMERA: _unpack(array, images(array.shape))}
    # zipfile, zarr and every codec have errors of their own for a damaged file, with no common base.
    except Exception as error:
        raise UserError(f"{path}: not PushT's demonstrations ({error}); {way_out}") from error
    return Demonstrations(states, actions, ends, source="pusht", sha256=sha256, images=frames)


def _checked(root: Any, name: str, *shape: str | int) -> Any:
    """A sound zarr array of numbers of that shape, whose first size is free."""
    if name not in root:
        raise ValueError(f"no array {name!r} in it")
    array = root[name]
    actual = getattr(array, "shape", None)
    if actual is None or len(actual) != len(shape) or actual[1:] != shape[1:]:
        comma = "," if len(shape) == 1 else ""
        raise ValueError(f"{name} has shape {actual}, expected ({', '.join(map(str, shape))}{comma})")
    # Object arrays and unknown codecs can run code when read.
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {array.dtype}, not numbers")
    codecs = [codec.codec_id for codec in [array.compressor, *(array.filters or [])] if codec is not None]
    if not _CODECS.issuperset(codecs):
        raise ValueError(f"{name} is encoded with {', '.join(codecs)}; only {', '.join(sorted(_CODECS))} are read")
    if array.nchunks_initialized != array.nchunks:
        # zarr reads a missing chunk as zeros.
        raise ValueError(f"{name} lacks {array.nchunks - array.nchunks_initialized} of its chunks")
    return array


def _unpack(array: Any, frames: Array) -> Array:
    """Copy frames, published as floating point (2.8 GB), chunk by chunk."""
    for begin in range(0, len(array), array.chunks[0]):
        part = slice(begin, begin + array.chunks[0])
        values = array[part]
        with np.errstate(invalid="ignore"):  # NaN becomes some number, and differs from it
            frames[part] = values
        if not np.array_equal(frames[part], values):
            raise ValueError(f"{array.path} holds values that are not whole numbers from 0 to 255")
    return frames
