"""The LightningModule: a network, an algorithm and a normaliser, trained on windows and rolled out as a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from dopr_lightning.policies.networks import ActionNetwork, VisualObservation
from dopr_lightning.policies.normalizer import Mode, Normalizer
from dopr_lightning.policies.sharding import gathered, is_sharded, outline, shard

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

Batch = Mapping[str, Any]


@dataclass
class OptimizerConfig:
    """The keywords of :func:`dopr_lightning.configure_optimizers`.

    Args:
        base: Name of the base optimizer.
        lr: Peak learning rate.
        weight_decay: For matrices only.
        schedule: Constant, or a cosine to 0, after the warm-up.
        warmup_steps: Optimizer steps of linear warm-up.
        lr_by_role: Multipliers of the learning rate by role, ``{input: 0.25}``.
        options: Further keywords of the base's algorithm.
    """

    base: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-5
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    lr_by_role: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class MupConfig:
    """muP: the learning rate, weight decay and damping of the base width serve at the network's own.

    Args:
        base: The network's keywords that scale with the width, at the base width: ``{"width": 64}``.
        weight_decay: How weight decay follows the learning rate, see :func:`dopr_lightning.mup.rules.weight_decay`.
        zero_readouts: Start from readouts of 0, which narrow and wide networks have alike; see
            :meth:`dopr_lightning.MupSpec.initialize`.
    """

    base: dict[str, Any]
    weight_decay: WeightDecayRule = "independent"
    zero_readouts: bool = True


class PolicyModule(L.LightningModule):
    """A policy over action chunks.

    Trains on batches ``{"observation": (B, observe, O), "action": (B, horizon, A)}`` in the data's own units, with
    ``"images": {camera: (B, observe, 3, H, W)}`` for a network with cameras, and is itself a
    :class:`~dopr_lightning.rollout.evaluate.Policy`. The normaliser is fitted to the data module's training
    demonstrations when training starts and travels in the checkpoint; images the network scales itself. In training
    their crops are random, in validation and rollouts central.

    All noise, and every place of a crop, is drawn from generators seeded by (seed, rank, step): a resumed run sees the
    noise that the uninterrupted run saw, and every validation sees the same.

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
        UserError: ``horizon`` is too short for ``observe`` and ``act``, the algorithm would clip what the normaliser
            does not bound, or the network has no such keywords as ``mup.base`` names.
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
        # An algorithm of one's own need not know of clipping.
        if action_normalizer != "minmax" and getattr(algorithm, "clip", False):
            raise UserError(
                f"{type(algorithm).__name__}: clip cuts actions at [-1, 1], which under action_normalizer="
                f"{action_normalizer!r} they exceed; set the algorithm's clip to false, or action_normalizer to minmax"
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
            self.mup.initialize(self.network, zero_readouts=mup.zero_readouts)
        self.mup_config = mup
        self.observation_normalizer = Normalizer(observation_dim, observation_normalizer)
        self.action_normalizer = Normalizer(action_dim, action_normalizer)

    @property
    def cameras(self) -> tuple[str, ...]:
        """Whose images the network sees."""
        return tuple(getattr(self.network, "cameras", ()))

    def configure_model(self) -> None:
        """Cut the network up over processes, under Lightning's ``ModelParallelStrategy`` (FSDP2)."""
        if self.device_mesh is not None and not is_sharded(self.network):
            # In a tuple it is no module of this one.
            self._outline = (outline(self.network),)
            shard(self.network, self.device_mesh["data_parallel"])

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """With the network whole, on every process: for rollouts, where one predicts more often than another.

        A forward of a network that is cut up (FSDP2) gathers weights, so all processes must call it equally often.
        Without FSDP2 it does nothing. All processes must enter at once.
        """
        network = self.network
        if is_sharded(network):
            self.network = gathered(network, self._outline[0])
        try:
            yield
        finally:
            self.network = network

    def setup(self, stage: str) -> None:
        """Fit the normaliser, unless a checkpoint already has.

        Raises:
            UserError: The data's sizes are not the policy's, or its cameras do not fit the network.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "statistics"):
            return
        for what in ("observation", "action"):
            mine, its = getattr(self, f"{what}_dim"), getattr(data, f"{what}_dim")
            if mine != its:
                raise UserError(f"the policy has {what}_dim={mine}, the data {its}; use the data it was made for")
        self._check_cameras(getattr(data, "cameras", ()))
        if stage == "fit" and not self.observation_normalizer.fitted:
            self.fit_normalizers(data.statistics())

    def fit_normalizers(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fit both, to what :meth:`~dopr_lightning.data.module.DemonstrationData.statistics` returns."""
        self.observation_normalizer.fit(statistics["observation"], "observation")
        self.action_normalizer.fit(statistics["action"], "action")

    def _check_cameras(self, there: Sequence[str]) -> None:
        name = type(self.network).__name__
        for camera in self.cameras:
            if camera not in there:
                raise UserError(
                    f"{name} needs camera {camera!r}, and the data has {', '.join(there) or 'no images'}; set the "
                    "network's cameras to the data's, or take a source with that camera"
                )
        if there and not self.cameras:
            raise UserError(
                f"{name} sees no images, and the data has those of {', '.join(there)}; use a network with cameras "
                "(VisionMLP, VisionUnet1d, VisionTransformer), or a source without images"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the base shapes: a learning rate means nothing without them."""
        checkpoint["mup"] = None if self.mup is None else self.mup.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another size or parametrisation.

        Raises:
            UserError: Names an array whose shapes differ, or the muP base that does.
        """
        theirs, ours = checkpoint.get("mup"), None if self.mup is None else self.mup.state_dict()
        base, here = (spec and spec["base"] for spec in (theirs, ours))
        if base != here:
            raise UserError(
                f"the checkpoint was trained with the muP base {base or 'none'}, and this policy has {here or 'none'}; "
                "give --model.mup.base as it was, or none"
            )
        saved = checkpoint.get("state_dict", {})  # FSDP2 has loaded it already
        for name, value in self.state_dict().items():
            if name in saved and saved[name].shape != value.shape:
                raise UserError(
                    f"the checkpoint is not of this policy: {name} has shape {tuple(saved[name].shape)} in it and "
                    f"{tuple(value.shape)} here; give the data and the configuration that it was trained with"
                )
        if theirs and ours and _trained_as(theirs) != _trained_as(ours):
            raise UserError(
                f"the checkpoint is not of this policy: at the muP base {base} its network has other shapes; give "
                "the configuration that it was trained with"
            )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Refuse NaN and infinity, while the batch is still on the CPU and the check does not wait for a device.

        Raises:
            UserError: Names the array and the window in the batch.
        """
        arrays = {name: value for name, value in batch.items() if name != "images"} | batch.get("images", {})
        for name, value in arrays.items():
            # Integers, as images are, need no look.
            if value.is_floating_point() and value.device.type == "cpu" and not value.isfinite().all():
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
        stream = (self.seed, self.global_rank, self.global_step, batch_idx)
        loss = self._loss(batch, _generator(0, *stream), _generator(2, *stream))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same loss on held-out windows, logged as ``val/loss``; the noise is the same at every validation."""
        loss = self._loss(batch, _generator(1, self.global_rank, batch_idx), None)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation, logged as ``test/loss``."""
        loss = self._loss(batch, _generator(1, self.global_rank, batch_idx), None)
        self.log("test/loss", loss, sync_dist=True)

    @torch.no_grad()
    def predict(self, observations: Tensor | VisualObservation, generators: Sequence[torch.Generator]) -> Tensor:
        """Actions to execute, see :class:`~dopr_lightning.rollout.evaluate.Policy`.

        Args:
            observations: (n, observe, O), in the environment's units; for a network with cameras ``state``: these, and
                ``images``: by camera (n, observe, 3, H, W), uint8.
            generators: n, on the CPU: the only source of noise.

        Returns:
            (n, act, A), in the environment's units.
        """
        if isinstance(observations, Tensor):
            state, images = observations, None
        else:
            state = observations["state"]
            images = {camera: frames.to(self.device) for camera, frames in observations["images"].items()}
        seen = self._encode(state.to(self.device), images, None)
        shape = (len(state), self.horizon, self.action_dim)
        chunk = self.action_normalizer.inverse(self.algorithm.sample(self.network, seen, shape, generators))
        return chunk[:, self.observe - 1 : self.observe - 1 + self.act]

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Keywords of :func:`dopr_lightning.optim.make_optimizer` for this policy."""
        c = self.optimizer_config
        rule = {"weight_decay_rule": self.mup_config.weight_decay} if self.mup_config else {}
        numbers = {"lr": c.lr, "weight_decay": c.weight_decay, "lr_by_role": c.lr_by_role}
        return {"base": c.base, "mup": self.mup, **numbers, **rule, **c.options}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One composite optimizer, and its schedule."""
        c = self.optimizer_config
        return configure_optimizers(self, schedule=c.schedule, warmup_steps=c.warmup_steps, **self.optimizer_arguments)

    def _loss(self, batch: Batch, noise: torch.Generator, crops: torch.Generator | None) -> Tensor:
        seen = self._encode(batch["observation"], batch.get("images"), crops)
        return self.algorithm.loss(self.network, seen, self.action_normalizer(batch["action"]), noise)

    def _encode(self, state: Tensor, images: Mapping[str, Tensor] | None, crops: torch.Generator | None) -> Tensor:
        """What the network makes of an observation in the data's units."""
        state = self.observation_normalizer(state)
        return self.network.encode(state if images is None else {"state": state, "images": images}, crops)


def _generator(*stream: int) -> torch.Generator:
    """Of a stream of its own."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0]))


def _trained_as(spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a MupSpec's state what training goes by; how initial values were drawn is past."""
    return {
        name: {key: value for key, value in shape.items() if not key.startswith("drawn_")}
        for name, shape in spec["shapes"].items()
    }


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
