"""Batches for Lightning: demonstrations split, cut into windows, shuffled by seed and epoch alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from dopr_lightning.data.convention import Convention
from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.source import Source
from dopr_lightning.data.windows import Batch, WindowDataset, already_batched
from dopr_lightning.errors import UserError

# Which episodes are held out is part of the task, not of a run: the same for every seed, so that validation losses of
# different seeds, and of different numbers of training episodes, are about the same data.
_SPLIT_SEED = 0


class DemonstrationData(L.LightningDataModule):
    """Windows of demonstrations for training; whole held-out episodes for validation.

    A batch is ``{"observation": (n, observe, obs_dim), "action": (n, horizon, act_dim)}``, float32, in the source's
    own units; and where there are cameras ``"images": {camera: (n, observe, 3, H, W)}``, uint8.

    The order of batches is a function of ``seed`` and the epoch's number: nothing is drawn from the global generator,
    so a run resumed at the end of an epoch sees what the uninterrupted run saw. Under DDP each rank gets its share of
    that order.

    Args:
        source: Where the demonstrations come from.
        batch_size: Windows per batch, on each rank. 256 is the paper's choice for behaviour cloning.
        observe: Observations seen at once.
        horizon: Actions predicted at once.
        act: Actions executed before observing again.
        episodes: Train on the first so many episodes left after holding out; ``None`` for all. The held-out ones are
            the same whatever the number.
        validation_episodes: Episodes held out.
        num_workers: Loader processes. 0 is quickest as long as everything is in memory: a batch is one gather. A few
            help where images are read from a disk, or while a GPU would wait for them.
        seed: Orders the batches.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 256,
        observe: int = 1,
        horizon: int = 1,
        act: int = 1,
        episodes: int | None = None,
        validation_episodes: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        self.source = source
        self.batch_size = batch_size
        self.observe = observe
        self.horizon = horizon
        self.act = act
        self.episodes = episodes
        self.validation_episodes = validation_episodes
        self.num_workers = num_workers
        self.seed = seed

    @cached_property
    def _split(self) -> tuple[Demonstrations, Demonstrations]:
        held = self.source.load()
        if not isinstance(held, Demonstrations):
            raise UserError(
                f"{type(self.source).__name__}.load() returned a {type(held).__name__}, and must return Demonstrations"
            )
        train, validation = held.split(self.validation_episodes, _SPLIT_SEED)
        return (train if self.episodes is None else train.take(self.episodes)), validation

    @property
    def environment(self) -> EnvironmentSpec | None:
        """The environment to roll policies out in, if the source names one."""
        return self.source.environment

    def convention(self) -> Convention:
        """What the numbers of observations and actions mean."""
        return self.source.convention()

    @property
    def observation_dim(self) -> int:
        """Numbers in an observation."""
        return int(self._split[0].observations.shape[1])

    @property
    def action_dim(self) -> int:
        """Numbers in an action."""
        return int(self._split[0].actions.shape[1])

    @property
    def cameras(self) -> tuple[str, ...]:
        """Whose images there are."""
        return self._split[0].cameras

    @property
    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width of each camera's images."""
        return {camera: (frames.shape[1], frames.shape[2]) for camera, frames in (self._split[0].images or {}).items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """What a run was trained on, for its checkpoint and records."""
        train, validation = self._split
        return {
            "source": train.source,
            "sha256": train.sha256,
            "train_episodes": train.num_episodes,
            "train_steps": len(train.actions),
            "validation_episodes": validation.num_episodes,
            "validation_steps": len(validation.actions),
            "split_sha256": _digest(train.numbers, validation.numbers),
        }

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """What a normaliser needs, of the training demonstrations.

        Returns:
            ``{"observation": s, "action": s}`` with s holding ``min``, ``max``, ``mean`` and ``std`` (of the
            population; 0 where a dimension never changes), each (dim,) float32.
        """
        train, _ = self._split
        return {"observation": _moments(train.observations), "action": _moments(train.actions)}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of equal size; what does not fill the last one is left for other epochs.

        Raises:
            UserError: There are fewer windows than a batch holds, or an episode, held out or not, is too short for one.
        """
        train, validation = self._split
        dataset = self._windows(train)
        self._windows(validation)  # what is wrong with these is said now, and not at the first validation
        world = self.trainer.world_size if self.trainer else 1
        if len(dataset) // world < self.batch_size:
            raise UserError(
                f"batch_size={self.batch_size} is more than the {len(dataset)} training windows"
                f"{f' shared by {world} processes' if world > 1 else ''}; use {len(dataset) // world} or less"
            )
        # Also on one process: this sampler orders by (seed, epoch), and Lightning tells it the epoch and leaves it as
        # it is under DDP. RandomSampler would draw from the global generator.
        sampler = _Resumable(
            lambda: self._done() * self.batch_size,
            dataset,
            num_replicas=world,
            rank=self.trainer.global_rank if self.trainer else 0,
            shuffle=True,
            seed=self.seed,
            drop_last=True,
        )
        return self._loader(dataset, _Late, sampler=sampler, drop_last=True)

    def _windows(self, demonstrations: Demonstrations) -> WindowDataset:
        return WindowDataset(demonstrations, self.observe, self.horizon, self.act)

    def _done(self) -> int:
        """How many of an epoch's batches a resumed run has trained on; Lightning knows, and begins the epoch anew."""
        if not self.trainer:
            return 0
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        # A whole epoch, which may be less than all batches (limit_train_batches), is no part of the next. That its last
        # batch was read does not make it whole: a preempted run leaves between that and training on it.
        whole = done >= self.trainer.num_training_batches
        return 0 if whole or not self.trainer.fit_loop.restarting else done

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every held-out window in order. Under DDP Lightning shards it, and may repeat a window to even the shards."""
        return self._loader(self._windows(self._split[1]))

    def test_dataloader(self) -> DataLoader[Batch]:
        """The held-out windows again: what is new in a test are the rollouts, with seeds of their own."""
        return self.val_dataloader()

    def _loader(
        self, dataset: WindowDataset, kind: type[DataLoader[Batch]] = DataLoader, **kwargs: Any
    ) -> DataLoader[Batch]:
        return kind(
            dataset,
            batch_size=self.batch_size,
            collate_fn=already_batched,  # type: ignore[arg-type]  # batches, not lists of items
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # From pinned memory a batch is copied to the GPU while that computes.
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # The loader draws a seed for its workers at each epoch; without a generator, from the global one.
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )


class _Late(DataLoader[Batch]):
    """A DataLoader whose processes draw nothing before the first batch is asked for.

    Lightning asks for the iterator with the loader, and says later which epoch it is and where that is gone on with.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()


class _Resumable(DistributedSampler[Any]):
    """A DistributedSampler whose first epoch begins ``skip()`` windows on, where an interrupted run stopped.

    It is asked when that epoch begins: to count the steps of a schedule Lightning makes the loader before it has read
    from the checkpoint where the run stopped.
    """

    def __init__(self, skip: Callable[[], int], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._skip: Callable[[], int] | None = skip

    def __iter__(self) -> Iterator[int]:
        skip, self._skip = self._skip, None
        return islice(super().__iter__(), skip() if skip else 0, None)


def _digest(*numbers: npt.NDArray[np.int64] | None) -> str:
    """Of the numbers of the episodes on each side of a split."""
    return hashlib.sha256(json.dumps([side.tolist() for side in numbers if side is not None]).encode()).hexdigest()


def _moments(rows: npt.NDArray[np.float32]) -> dict[str, Tensor]:
    wide = rows.astype(np.float64)
    values = {"min": wide.min(0), "max": wide.max(0), "mean": wide.mean(0), "std": wide.std(0)}
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}
