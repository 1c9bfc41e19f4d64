"""How do a camera's frames get from an array, which may lie on disk, into a batch?"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Frames:
    """Hands out the frames that are asked for, colours first, and reads no others.

    Args:
        array: (N, H, W, 3), uint8. A memory map (``np.load(..., mmap_mode="r")``) is pickled as its file's name, so
            that a loader process opens the file for itself and is not sent gigabytes.
    """

    def __init__(self, array: npt.NDArray[np.uint8]) -> None:
        self._array = array

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> Tensor:
        """The frames at ``rows``, (..., 3, H, W) for rows of shape (...).

        Colours lie in memory where they lie in the array: moving them would cost more than the gather, and a GPU's
        convolutions prefer them last.
        """
        # Quicker than indexing, but of what lies otherwise, colours first say, it first copies the whole.
        chosen = self._array.take(rows, axis=0) if self._array.flags.c_contiguous else self._array[rows]
        return torch.from_numpy(chosen).movedim(-1, -3)

    def __reduce__(self) -> tuple[Callable[..., Frames], tuple[Any, ...]]:
        array = self._array
        # A part of a memory map keeps the whole one's offset, so only a whole one can be opened again.
        if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap):
            order = "F" if array.flags.fnc else "C"
            return _open, (array.filename, array.dtype, array.offset, array.shape, order)
        return Frames, (array,)


def _open(
    path: str, dtype: np.dtype[np.uint8], offset: int, shape: tuple[int, ...], order: Literal["C", "F"]
) -> Frames:
    return Frames(np.memmap(path, dtype, "r", offset, shape, order))
