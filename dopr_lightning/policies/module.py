"""The LightningModule: a network, an algorithm and a normaliser, trained on windows and rolled out as a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from dopr_lightning.errors import UserError
from dopr_lightning.mup import MupSpec, WeightDecayRule
from dopr_lightning.optim import configure_optimizers
from dopr_lightning.optim.bases import resolve
from dopr_lightning.optim.schedules import Schedule
from dopr_lightning.policies.algorithms import Algorithm
from dopr_lightning.policies.networks import ActionNetwork
from dopr_lightning.policies.normalizer import Mode, Normalizer

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

Batch = Mapping[str, Tensor]


@dataclass
class OptimizerConfig:
    """The keywords of :func:`dopr_lightning.configure_optimizers`.

    Args:
        base: Name of the base optimizer.
        lr: Peak learning rate.
        weight_decay: For matrices only.
        schedule: Constant, or a cosine to 0, after the warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        options: Further keywords of the base's algorithm.
    """

    base: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-5
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class MupConfig:
    """muP: the learning rate, weight decay and damping of the base width serve at the network's own.

    Args:
        base: The network's keywords that scale with the width, at the base width: ``{"width": 64}``.
        weight_decay: How weight decay follows the learning rate, see :func:`dopr_lightning.mup.rules.weight_decay`.
    """

    base: dict[str, Any]
    weight_decay: WeightDecayRule = "independent"


class PolicyModule(L.LightningModule):
    """A policy over action chunks.

    Trains on batches ``{"observation": (B, observe, O), "action": (B, horizon, A)}`` in the data's own units and is
    itself a :class:`~dopr_lightning.rollout.evaluate.Policy`. The normaliser is fitted to the data module's training
    demonstrations when training starts and travels in the checkpoint.

    All noise is drawn from generators seeded by (seed, rank, step): a resumed run sees the noise that the uninterrupted
    run saw, and every validation sees the same.

    Args:
        network: Builds the network from (observation_dim, action_dim, observe, horizon, denoise).
        algorithm: The objective and its sampler.
        observation_dim: O. ``dopr`` fills the sizes in from the data.
        action_dim: A.
        observe: Observations seen at once.
        horizon: Actions predicted at once; the first belongs to the oldest observation of the window.
        act: Actions executed before observing again.
        optimizer: The optimizer and its schedule.
        mup: muP, from which base width. None: standard parametrisation.
        observation_normalizer: ``"minmax"`` or ``"standard"``, see :class:`Normalizer`.
        action_normalizer: The same for actions.
        seed: Seeds the training noise.

    Raises:
        UserError: ``horizon`` is too short for ``observe`` and ``act``, or the network has no such keywords as
            ``mup.base`` names.
        ValueError: The optimizer's base is unknown, or muP has no rule for the network.
    """

    def __init__(
        self,
        network: Callable[[int, int, int, int, bool], ActionNetwork],
        algorithm: Algorithm,
        observation_dim: int,
        action_dim: int,
        observe: int = 1,
        horizon: int = 1,
        act: int = 1,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # read only
        mup: MupConfig | None = None,
        observation_normalizer: Mode = "minmax",
        action_normalizer: Mode = "minmax",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if horizon < observe - 1 + act:
            raise UserError(
                f"horizon={horizon} is too short: the chunk starts {observe - 1} steps before the present (observe="
                f"{observe}) and must reach act={act} actions beyond; set horizon to {observe - 1 + act} or more"
            )
        resolve(optimizer.base)  # a mistake is said now, not when everything else is ready
        self.save_hyperparameters(logger=False)
        # `dopr` records plain values, from which load_from_checkpoint rebuilds the policy. Objects made in Python stay
        # out: a checkpoint holds no pickled code.
        self.remove_ignored_hparams([name for name, v in self.hparams.items() if not _is_plain(v)])
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.observe, self.horizon, self.act = observe, horizon, act
        self.algorithm = algorithm
        self.optimizer_config = optimizer
        self.seed = seed
        sizes = (observation_dim, action_dim, observe, horizon, algorithm.denoises)
        self.network = network(*sizes)
        self.mup = None
        if mup is not None:
            self.mup = _spec(partial(network, *sizes), mup.base)
            self.mup.initialize(self.network)
        self.mup_config = mup
        self.observation_normalizer = Normalizer(observation_dim, observation_normalizer)
        self.action_normalizer = Normalizer(action_dim, action_normalizer)

    def setup(self, stage: str) -> None:
        """Fit the normaliser, unless a checkpoint already has.

        Raises:
            UserError: The data's sizes are not the policy's.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "statistics"):
            return
        for what in ("observation", "action"):
            mine, its = getattr(self, f"{what}_dim"), getattr(data, f"{what}_dim")
            if mine != its:
                raise UserError(f"the policy has {what}_dim={mine}, the data {its}; use the data it was made for")
        if stage == "fit" and not self.observation_normalizer.fitted:
            statistics = data.statistics()
            self.observation_normalizer.fit(statistics["observation"])
            self.action_normalizer.fit(statistics["action"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the base shapes: a learning rate means nothing without them."""
        checkpoint["mup"] = None if self.mup is None else self.mup.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another size or parametrisation.

        Raises:
            UserError: Names an array whose shapes differ, or the muP base that does.
        """
        theirs, ours = checkpoint.get("mup"), None if self.mup is None else self.mup.state_dict()
        if theirs != ours:
            said = ["none" if spec is None else str(spec["base"]) for spec in (theirs, ours)]
            raise UserError(
                f"the checkpoint was trained with the muP base {said[0]}, and this policy has {said[1]}; give "
                "--model.mup.base as it was, or none"
            )
        saved = checkpoint["state_dict"]
        for name, value in self.state_dict().items():
            if name in saved and saved[name].shape != value.shape:
                raise UserError(
                    f"the checkpoint is not of this policy: {name} has shape {tuple(saved[name].shape)} in it and "
                    f"{tuple(value.shape)} here; give the data and the configuration that it was trained with"
                )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Refuse NaN and infinity, while the batch is still on the CPU and the check does not wait for a device.

        Raises:
            UserError: Names the array and the window in the batch.
        """
        for name, value in batch.items():
            if value.device.type == "cpu" and not value.isfinite().all():
                row = int((~value.isfinite()).flatten(1).any(1).nonzero()[0])
                raise UserError(f"a batch holds NaN or infinity: {name!r}, window {row}; clean the demonstrations")
        return batch

    def on_train_epoch_end(self) -> None:
        """Keep Lightning's count of epochs right, which the order of batches hangs on.

        When a run of ``max_steps`` resumes from a checkpoint saved at the end of an epoch, Lightning 2.6 passes through
        that epoch once more, without batches, and counts it as processed again.
        """
        for progress in (self.trainer.fit_loop.epoch_progress.current, self.trainer.fit_loop.epoch_progress.total):
            # Completed is counted after this hook.
            progress.processed = progress.completed + 1  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The algorithm's loss on normalised windows, logged as ``train/loss``."""
        loss = self._loss(batch, 0, self.seed, self.global_rank, self.global_step, batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same loss on held-out windows, logged as ``val/loss``; the noise is the same at every validation."""
        self.log("val/loss", self._loss(batch, 1, self.global_rank, batch_idx), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation, logged as ``test/loss``."""
        self.log("test/loss", self._loss(batch, 1, self.global_rank, batch_idx), sync_dist=True)

    def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Actions to execute, see :class:`~dopr_lightning.rollout.evaluate.Policy`.

        Args:
            observations: (n, observe, O), in the environment's units.
            generators: n, on the CPU: the only source of noise.

        Returns:
            (n, act, A), in the environment's units.
        """
        observation = self.observation_normalizer(observations.to(self.device))
        shape = (len(observation), self.horizon, self.action_dim)
        chunk = self.action_normalizer.inverse(self.algorithm.sample(self.network, observation, shape, generators))
        return chunk[:, self.observe - 1 : self.observe - 1 + self.act]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One composite optimizer, and its schedule."""
        c = self.optimizer_config
        return configure_optimizers(
            self,
            c.base,
            lr=c.lr,
            weight_decay=c.weight_decay,
            schedule=c.schedule,
            warmup_steps=c.warmup_steps,
            mup=self.mup,
            weight_decay_rule=self.mup_config.weight_decay if self.mup_config else "independent",
            **c.options,
        )

    def _loss(self, batch: Batch, *stream: int) -> Tensor:
        observation = self.observation_normalizer(batch["observation"])
        action = self.action_normalizer(batch["action"])
        seed = int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0])
        return self.algorithm.loss(self.network, observation, action, torch.Generator().manual_seed(seed))


def _spec(factory: Callable[..., ActionNetwork], base: Mapping[str, Any]) -> MupSpec:
    try:
        return MupSpec.from_factory(factory, **base)
    except TypeError as error:
        raise UserError(f"mup.base {dict(base)}: {error}; name keywords of the network that scale with it") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float | bool)
