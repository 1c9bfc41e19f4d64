"""Demonstrations to training windows: what is seen, and what is to be done next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.frames import Frames
from dopr_lightning.errors import UserError

Batch = dict[str, Any]
"""``observation`` and ``action``; and with cameras ``images``, a dictionary by camera."""


class WindowDataset(Dataset[Batch]):
    """Every window of every episode, cut as Diffusion Policy cuts them.

    The window at step t of an episode holds the observations t-observe+1 .. t and the actions
    t-observe+1 .. t-observe+horizon; the policy will execute the ``act`` actions from t on. Steps before the episode's
    start or past its end repeat its first or last row: up to ``observe - 1`` steps before, as at the start of a
    rollout, and up to ``act - 1`` steps after. Windows never cross episodes.

    Fetch with ``__getitems__`` (PyTorch's loader does so by itself) and `already_batched` as ``collate_fn``: a batch is
    then one gather instead of hundreds of small tensors. Images are read when they are fetched, for the steps that are
    observed alone, and stay uint8: the network scales them, on its device.

    Args:
        demonstrations: The episodes.
        observe: Observations seen at once.
        horizon: Actions predicted at once.
        act: Actions executed before observing again.

    Raises:
        UserError: The three do not fit together, or an episode is too short to hold one window.
    """

    def __init__(self, demonstrations: Demonstrations, observe: int, horizon: int, act: int) -> None:
        if min(observe, horizon, act) < 1:
            raise UserError(f"observe={observe}, horizon={horizon}, act={act}: each must be at least 1")
        if horizon < observe - 1 + act:
            raise UserError(
                f"horizon={horizon} is too short to observe {observe} steps and act {act}; "
                f"use horizon={observe - 1 + act} or more"
            )
        self.observations = torch.from_numpy(demonstrations.observations)
        self.actions = torch.from_numpy(demonstrations.actions)
        self._frames = {camera: Frames(array) for camera, array in (demonstrations.images or {}).items()}
        self._image_rows = demonstrations.image_rows if self._frames else None

        ends = demonstrations.episode_ends
        starts = np.concatenate([[0], ends[:-1]])
        # The first window begins observe-1 steps before the episode, the last ends act-1 steps after it.
        counts = (ends - starts) + (observe - 1) + (act - 1) - horizon + 1
        if counts.min() < 1:
            episode = int(np.argmin(counts))
            number = episode if demonstrations.numbers is None else demonstrations.numbers[episode]
            raise UserError(
                f"demonstrations {demonstrations.source!r}: episode {number} has {ends[episode] - starts[episode]} "
                f"steps, too few for a window of horizon={horizon}; shorten the horizon or remove that episode"
            )
        window_episode = np.repeat(np.arange(len(ends)), counts)
        window_in_episode = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = starts[window_episode] + window_in_episode - (observe - 1)
        rows = begin[:, None] + np.arange(horizon)
        rows = rows.clip(starts[window_episode][:, None], ends[window_episode][:, None] - 1)
        self._rows = torch.from_numpy(rows)
        self._observe = observe

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Batch:
        """One window: ``observation`` (observe, obs_dim) and ``action`` (horizon, act_dim), float32.

        With cameras also ``images``, by camera (observe, 3, H, W), uint8.
        """
        return self._gather(self._rows[index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch: the same with a first dimension of n = ``len(indices)``."""
        return self._gather(self._rows[torch.as_tensor(indices)])

    def _gather(self, rows: Tensor) -> Batch:
        # Observations are the first `observe` steps of the same window: horizon >= observe.
        seen = rows[..., : self._observe]
        batch: Batch = {"observation": self.observations[seen], "action": self.actions[rows]}
        if self._image_rows is not None:
            image_rows = self._image_rows[seen.numpy()]
            batch["images"] = {camera: frames[image_rows] for camera, frames in self._frames.items()}
        return batch


def already_batched(batch: Batch) -> Batch:
    """The ``collate_fn`` of a dataset whose ``__getitems__`` returns whole batches."""
    return batch
