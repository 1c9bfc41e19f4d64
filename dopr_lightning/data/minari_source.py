"""Demonstrations from a Minari dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dopr_lightning.data.convention import Convention, bounds
from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.download import file_sha256
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.source import Source
from dopr_lightning.errors import UserError, import_extra, one_line

if TYPE_CHECKING:
    from minari import MinariDataset

WATCHING = ("RecordEpisodeStatistics", "RecordVideo")
"""Wrappers of Gymnasium's that change nothing."""


class Minari(Source):
    """Episodes of a local Minari dataset with flat observations and actions.

    Datasets lie where Minari keeps them: ``$MINARI_DATASETS_PATH``, or ``~/.minari/datasets``. Nothing is downloaded
    behind your back; ``minari download ID`` does that.

    Args:
        dataset_id: Minari's id of the dataset.
        episodes: Read only the first so many. Minari's expert sets hold about a thousand episodes, gigabytes of them,
            where imitation wants tens; ``None`` reads all.

    Raises:
        UserError: No episode is to be read.
    """

    def __init__(self, dataset_id: str = "mujoco/humanoid/expert-v0", episodes: int | None = 100) -> None:
        # A negative number would leave out the last ones.
        if episodes is not None and episodes < 1:
            raise UserError(f"Minari dataset {dataset_id!r}: episodes={episodes}: read at least 1, or None for all")
        self.dataset_id = dataset_id
        self.episodes = episodes

    @property
    def environment(self) -> EnvironmentSpec:
        """The environment the dataset says it was recorded in.

        Raises:
            UserError: The dataset is missing, or does not say which, or for how long an episode lasts; or wrappers
                were around it, which change what its numbers mean.
        """
        spec = self._open().spec.env_spec
        if spec is None or spec.max_episode_steps is None:
            raise UserError(
                f"Minari dataset {self.dataset_id!r} does not say in which environment, or for how many steps, it was "
                "recorded; choose a dataset with an env_spec that has max_episode_steps"
            )
        names = [wrapper.name for wrapper in spec.additional_wrappers if wrapper.name not in WATCHING]
        if names:
            raise UserError(
                f"Minari dataset {self.dataset_id!r} was recorded in {spec.id} within {', '.join(names)}, and rollouts "
                "would be without; register an environment that has them with Gymnasium, and take a subclass of Minari "
                "whose 'environment' names it, or is None for no rollouts"
            )
        return EnvironmentSpec(
            id=spec.id,
            max_steps=spec.max_episode_steps,
            metric="return",
            kwargs=dict(spec.kwargs),
            simulators=("mujoco",) if ".mujoco" in str(spec.entry_point) else (),
        )

    def convention(self) -> Convention:
        """The environment's own numbers, and the bounds that the dataset says actions have."""
        low, high = bounds(self._open().action_space)
        return Convention(low=low, high=high)

    def load(self) -> Demonstrations:
        """Read the episodes, each without its final observation, at which nobody acted.

        Raises:
            UserError: The dataset is missing, damaged, or not made of flat vectors.
        """
        from gymnasium.spaces import Box

        dataset = self._open()
        for name, space in (("observations", dataset.observation_space), ("actions", dataset.action_space)):
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise UserError(
                    f"Minari dataset {self.dataset_id!r}: {name} are {space}, not a flat Box; choose one of vectors"
                )
        data_file = Path(dataset.spec.data_path) / "main_data.hdf5"
        count = dataset.total_episodes
        if self.episodes is not None:
            count = min(count, self.episodes)
        observations, actions = [], []
        try:
            # Other formats have many files: the arrays are digested.
            sha256 = file_sha256(data_file) if data_file.is_file() else ""
            numbers = dataset.episode_indices[:count]
            for episode in dataset.iterate_episodes(numbers):
                actions.append(np.asarray(episode.actions, dtype=np.float32))
                observations.append(np.asarray(episode.observations[: len(episode.actions)], dtype=np.float32))
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from error
        return Demonstrations(
            np.concatenate(observations),
            np.concatenate(actions),
            np.cumsum([len(a) for a in actions]),
            source=f"minari:{self.dataset_id}",
            sha256=sha256,
            numbers=np.asarray(numbers),
        )

    def _open(self) -> MinariDataset:
        minari = import_extra("minari", "minari")
        try:
            return minari.load_dataset(self.dataset_id)
        except FileNotFoundError as error:
            raise UserError(
                f"Minari dataset {self.dataset_id!r} is not on this machine; run: minari download {self.dataset_id} "
                "(or point MINARI_DATASETS_PATH to where it lies)"
            ) from error
        except ImportError as error:  # pyarrow
            raise UserError(f"Minari dataset {self.dataset_id!r}: {error}") from error
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"Minari dataset {self.dataset_id!r} cannot be read ({one_line(error)}); "
            f"fetch it again: minari download --force {self.dataset_id}"
        )
