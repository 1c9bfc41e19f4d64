"""What was demonstrated: observations, actions and where each episode ends."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.errors import UserError


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Episodes laid end to end.

    Args:
        observations: (N, obs_dim), what the demonstrator saw at each step. Stored as float32.
        actions: (N, act_dim), what the demonstrator did there. Stored as float32.
        episode_ends: (E,), one past the last step of each episode, increasing, the last equal to N. Stored as int64.
        source: Where they come from, in words for records and errors: ``"pusht"``, a Minari id.
        sha256: Digest of the original data, so that a checkpoint can say what it was trained on, and is not judged on
            anything else. By default of these arrays, and of each episode's first images. Where they are made anew each
            time, give that of what decides them: another processor rounds otherwise.
        images: What cameras saw at each step, by camera (M, H, W, 3), uint8. They are never copied, so they may be
            memory maps of files larger than memory.
        image_rows: (N,), which row of the images each step has; by default its own, and M is N. It lets a part of
            the demonstrations share the images of the whole. Stored as int64.
        numbers: (E,), which episode of the whole each one is, for errors, and so that a checkpoint can say which were
            held out; by default its own. A part has them, and so should what a source reads of a larger file. Stored
            as int64.

    Raises:
        UserError: The arrays do not fit together, or hold a value that is not finite.
    """

    observations: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    episode_ends: npt.NDArray[np.int64]
    source: str
    sha256: str = ""
    images: Mapping[str, npt.NDArray[np.uint8]] | None = None
    image_rows: npt.NDArray[np.int64] | None = None
    numbers: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        name = f"demonstrations {self.source!r}"
        # A value too large for float32 becomes inf here, and is reported below with its place.
        with np.errstate(over="ignore"):
            for field in ("observations", "actions"):
                try:
                    array = np.ascontiguousarray(getattr(self, field), dtype=np.float32)
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"{name}: {field} are no array of numbers ({error}); concatenate the episodes' arrays, (steps, "
                        "dimensions), and say in episode_ends where each ends"
                    ) from error
                object.__setattr__(self, field, array)
                if array.ndim != 2 or array.shape[1] == 0:
                    raise UserError(
                        f"{name}: {field} have shape {array.shape}; expected (steps, dimensions), one row per step"
                    )
        ends = np.ascontiguousarray(self.episode_ends, dtype=np.int64)
        object.__setattr__(self, "episode_ends", ends)

        steps = len(self.observations)
        if len(self.actions) != steps:
            raise UserError(
                f"{name}: {steps} observations but {len(self.actions)} actions; give one action per observation "
                "(drop an episode's final observation)"
            )
        if ends.ndim != 1 or len(ends) == 0 or ends[0] <= 0 or np.any(np.diff(ends) <= 0) or ends[-1] != steps:
            raise UserError(
                f"{name}: episode ends do not divide the {steps} steps into episodes; they must increase from above "
                f"0 to {steps}"
            )
        if self.numbers is not None:
            object.__setattr__(self, "numbers", np.ascontiguousarray(self.numbers, dtype=np.int64))
            if self.numbers.shape != ends.shape:
                raise UserError(
                    f"{name}: numbers of shape {self.numbers.shape} for {len(ends)} episodes; give each its own"
                )
        for field in ("observations", "actions"):
            finite = np.isfinite(getattr(self, field)).all(axis=1)
            if not finite.all():
                row = int(np.argmin(finite))
                episode = int(np.searchsorted(ends, row, side="right"))
                step = row - (int(ends[episode - 1]) if episode else 0)
                number = episode if self.numbers is None else self.numbers[episode]
                what = "NaN" if np.isnan(getattr(self, field)[row]).any() else "an infinite value"
                raise UserError(
                    f"{name}: {field} hold {what} in episode {number}, step {step}; mend or remove that episode"
                )
        self._check_images(name, steps)
        if not self.sha256:
            object.__setattr__(self, "sha256", self._digest())

    def _check_images(self, name: str, steps: int) -> None:
        if not self.images:
            return
        for camera, frames in self.images.items():
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
                raise UserError(
                    f"{name}: images of camera {camera!r} are {frames.dtype} of shape {frames.shape}; expected uint8, "
                    "(steps, height, width, 3)"
                )
            if self.image_rows is None and len(frames) != steps:
                raise UserError(
                    f"{name}: {steps} observations but {len(frames)} images of camera {camera!r}; give one image per "
                    "observation"
                )
        rows = np.arange(steps) if self.image_rows is None else np.ascontiguousarray(self.image_rows, dtype=np.int64)
        object.__setattr__(self, "image_rows", rows)
        fewest = min(len(frames) for frames in self.images.values())
        if rows.shape != (steps,) or rows.min() < 0 or rows.max() >= fewest:
            raise UserError(
                f"{name}: image rows of shape {rows.shape} for {steps} observations and {fewest} images; give each "
                "observation a row that is there"
            )

    def _digest(self) -> str:
        digest = hashlib.sha256()
        parts: dict[str, npt.NDArray[Any]] = {
            "observations": self.observations,
            "actions": self.actions,
            "ends": self.episode_ends,
        }
        if self.images and self.image_rows is not None:
            first = self.image_rows[np.concatenate([[0], self.episode_ends[:-1]])]
            # All of them may be more than memory holds.
            parts |= {f"images of {camera}": frames[first] for camera, frames in self.images.items()}
        for part, array in parts.items():
            digest.update(f"{part} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras."""
        return tuple(self.images or ())

    @property
    def num_episodes(self) -> int:
        """How many episodes there are."""
        return len(self.episode_ends)

    def take(self, episodes: int) -> Demonstrations:
        """The first ``episodes`` episodes.

        Raises:
            UserError: There are fewer, or fewer than one is asked for.
        """
        if not 1 <= episodes <= self.num_episodes:
            raise UserError(
                f"demonstrations {self.source!r}: {episodes} episodes asked for, {self.num_episodes} there; "
                f"ask for 1 to {self.num_episodes}"
            )
        return self._select(np.arange(episodes))

    def split(self, validation_episodes: int, seed: int) -> tuple[Demonstrations, Demonstrations]:
        """Hold out whole episodes, so that no validation step has a near copy among the training steps.

        Args:
            validation_episodes: How many to hold out.
            seed: Chooses which. The same numbers give the same split everywhere.

        Returns:
            Training and validation demonstrations, each in the original order.

        Raises:
            UserError: No episode would be left to train on, or none is held out.
        """
        if self.num_episodes == 1:
            raise UserError(
                f"demonstrations {self.source!r}: there is one episode, and one to train on and one to hold out for "
                "validation are needed; record another, or give the ends of all (episode_ends)"
            )
        if not 1 <= validation_episodes < self.num_episodes:
            raise UserError(
                f"demonstrations {self.source!r}: cannot hold out {validation_episodes} of {self.num_episodes} "
                f"episodes for validation; hold out 1 to {self.num_episodes - 1}"
            )
        order = np.random.default_rng(seed).permutation(self.num_episodes)
        return self._select(np.sort(order[validation_episodes:])), self._select(np.sort(order[:validation_episodes]))

    def _select(self, episodes: npt.NDArray[np.int64]) -> Demonstrations:
        starts = np.concatenate([[0], self.episode_ends[:-1]])
        rows = np.concatenate([np.arange(starts[e], self.episode_ends[e]) for e in episodes])
        lengths = (self.episode_ends - starts)[episodes]
        return replace(
            self,
            observations=self.observations[rows],
            actions=self.actions[rows],
            episode_ends=np.cumsum(lengths),
            image_rows=None if self.image_rows is None else self.image_rows[rows],
            numbers=episodes if self.numbers is None else self.numbers[episodes],
        )
