"""Closed-loop evaluation inside a Lightning run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.preconditioner.sharding import local
from dopr_lightning.rollout.evaluate import Episode, Policy, check_fit, check_success, evaluate
from dopr_lightning.rollout.slot import SimulationError
from dopr_lightning.rollout.statistics import bootstrap_interval, wilson_interval
from dopr_lightning.rollout.video import Film, animation, best_and_worst, film, require_encoder, write_mp4
from dopr_lightning.saving import LastCheckpoint, run_folder

log = logging.getLogger(__name__)

# Distance from the seeds that are reported to those that choose a checkpoint. A checkpoint picked by its score on some
# seeds is partly picked for luck on them, so the report must not use them again.
SELECTION_OFFSET = 1_000_000


class RolloutEvaluation(Callback):
    """Roll the policy out at validation, to choose by, and at test, to report.

    Logs ``rollout/return``, ``rollout/max_reward`` or ``rollout/success`` (whichever the environment's metric is) with
    ``rollout/ci95_low``, ``rollout/ci95_high`` and ``rollout/episodes``; and where the environment reports success, its
    rate as ``rollout/success`` with ``rollout/success_low`` and ``rollout/success_high``. Intervals of a rate are
    Wilson's, others are bootstrapped. Appends a line per episode to ``rollouts.jsonl`` in the run's folder. Monitor the
    first for checkpoints.

    The module is the policy (`dopr_lightning.rollout.evaluate.Policy`), the environment is the data module's. Ranks
    share the seeds, so each is run exactly once on any number of processes. Rollouts happen when the validation epoch
    starts: an EMA callback has put its averages in by then (Lightning's own only if listed before this one), and
    Lightning has switched the module to eval mode and gradients off.

    Args:
        episodes: At each validation; 0 for none.
        report_episodes: At test; 0 for none. 50 is Diffusion Policy's choice.
        first_seed: Of the reported episodes; by default the environment's own. Validation uses seeds from
            ``first_seed + 1000000``, so a report is never about the seeds that chose the checkpoint.
        every_n_epochs: While fitting, roll out in every n-th epoch's validation only: for tasks where rollouts cost
            more than training.
        num_envs: Episodes at once, on each rank.
        workers: Processes, on each rank, among which the environments are shared out; 0 for none. For simulators that
            are slow (as many as there are cores to a rank, and ``num_envs`` a multiple of it) or may crash: an episode
            whose environment crashes or hangs is begun again, once, which its line counts as ``restarts``.
        timeout_s: Seconds after which a worker's environment counts as hanging, in one chunk of actions or a reset.
        videos: Episodes to film after each evaluation: the best, the worst, the second best, and so on; 0 for none.
            Each goes to ``videos/step-STEP-seed-SEED-METRIC-VALUE.mp4`` beside ``rollouts.jsonl``, and to TensorBoard's
            images.

    Where the data's environment is None there are no rollouts, and a warning says so.

    Attributes:
        latest: The episodes of the last evaluation, all ranks', in the order of their seeds.
    """

    def __init__(
        self,
        episodes: int = 10,
        report_episodes: int = 50,
        first_seed: int | None = None,
        every_n_epochs: int = 1,
        num_envs: int = 10,
        workers: int = 0,
        timeout_s: float = 60.0,
        videos: int = 0,
    ) -> None:
        for name, value, least in (
            ("episodes", episodes, 0),
            ("report_episodes", report_episodes, 0),
            ("first_seed", first_seed or 0, 0),
            ("every_n_epochs", every_n_epochs, 1),
            ("num_envs", num_envs, 1),
            ("workers", workers, 0),
            ("timeout_s", timeout_s, 1),
            ("videos", videos, 0),
        ):
            if value < least:
                raise UserError(f"RolloutEvaluation: {name}={value}; must be at least {least}")
        self.episodes = episodes
        self.report_episodes = report_episodes
        self.first_seed = first_seed
        self.every_n_epochs = every_n_epochs
        self.num_envs = num_envs
        self.workers = workers
        self.timeout_s = timeout_s
        self.videos = videos
        self.latest: list[Episode] = []
        self._said_none = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run whose rollouts would be of the wrong weights, or nowhere.

        Raises:
            UserError: A weight averaging callback is listed after this one, the data module names no environment, a
                checkpoint is to be chosen where there are no rollouts, there is no encoder for videos, or the results'
                folder is on a remote store.
        """
        run_folder(trainer)
        after = trainer.callbacks[trainer.callbacks.index(self) + 1 :]  # type: ignore[attr-defined]
        for callback in after:
            # Lightning's own averaging swaps in the hook that rolls out here; `dopr_lightning.policies.ema.EMA`, like
            # anything that overrides that hook to swap earlier, may be listed anywhere.
            swap = getattr(type(callback), "on_validation_epoch_start", None)
            if isinstance(callback, WeightAveraging) and swap is WeightAveraging.on_validation_epoch_start:
                raise UserError(
                    f"RolloutEvaluation would see the raw weights: list {type(callback).__name__} before it in the "
                    "trainer's callbacks"
                )
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "environment"):
            raise UserError(
                "RolloutEvaluation needs a data module with an 'environment' (an EnvironmentSpec); pass one, or remove "
                "the callback"
            )
        if stage == "fit":
            self._check_monitors(trainer, data.environment)
        if data.environment is None and trainer.is_global_zero and not self._said_none:
            self._said_none = True
            log.warning(
                "no rollouts: the data names no environment. Rollouts are the metric, a validation loss does not say "
                "how a policy does on its own predictions: give the source an environment as soon as there is one"
            )
        if self.videos:
            require_encoder()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an environment that the data do not fit now, and not at the first rollouts.

        Raises:
            UserError: It has other sizes, or cannot be made.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if data.environment is not None and (self.episodes or self.report_episodes):
            check_fit(
                cast(Policy, pl_module),
                data.environment,
                getattr(data, "image_sizes", {}),
                workers=self.workers,
                timeout_s=self.timeout_s,
            )

    def _check_monitors(self, trainer: L.Trainer, environment: EnvironmentSpec | None) -> None:
        """Refuse checkpoints by rollouts in epochs that have none: Lightning would stop at the first of these."""
        nowhere = "the data name no environment" if environment is None else ""
        why_none = nowhere or ("" if self.episodes else "rollout.episodes is 0")
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or not (callback.monitor or "").startswith("rollout/"):
                continue
            if why_none:
                raise UserError(
                    f"checkpoints are to be chosen by {callback.monitor!r}, and there are no rollouts: {why_none}; "
                    "mend that, or set checkpoint.monitor to val/loss and checkpoint.mode to min"
                )
            # 0 where steps or time decide.
            if saved := callback.every_n_epochs:
                validated = trainer.check_val_every_n_epoch or 1
                if math.lcm(saved, validated) % self.every_n_epochs:
                    raise UserError(
                        f"checkpoints are chosen by {callback.monitor!r} every {saved} epochs, and rollouts are every "
                        f"{self.every_n_epochs}; set checkpoint.every_n_epochs to {self.every_n_epochs} too"
                    )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Roll out on the seeds that choose a checkpoint."""
        skipped_epoch = trainer.state.fn == TrainerFn.FITTING and (trainer.current_epoch + 1) % self.every_n_epochs
        if trainer.sanity_checking or skipped_epoch:
            return
        self._run(trainer, pl_module, "validate", SELECTION_OFFSET, self.episodes)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Roll out on the seeds that are reported."""
        self._run(trainer, pl_module, "test", 0, self.report_episodes)

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, offset: int, count: int) -> None:
        spec: EnvironmentSpec | None = trainer.datamodule.environment  # type: ignore[attr-defined]
        if count == 0 or spec is None:
            self.latest = []
            return
        first_seed = offset + (spec.first_seed if self.first_seed is None else self.first_seed)
        seeds = range(first_seed, first_seed + count)
        mine = seeds[trainer.global_rank :: trainer.world_size]
        error: Exception | None = None
        episodes: list[Episode] = []
        with getattr(pl_module, "gathered", nullcontext)():
            try:
                episodes = evaluate(
                    cast(Policy, pl_module), spec, mine, self.num_envs, workers=self.workers, timeout_s=self.timeout_s
                )
            except Exception as caught:  # a policy may raise anything
                error = caught
        # A rank that fails must say so to the others, which would wait for it otherwise.
        failures = [failure for failure in _gather(_failure(error, pl_module)) if failure]
        if failures:
            raise _stopped(trainer, error or UserError(failures[0][0]), blameless=all(one for _, one in failures))
        episodes = sorted((e for share in _gather(episodes) for e in share), key=lambda e: e.seed)
        try:
            check_success(spec, episodes)
        except UserError as unsaid:
            raise _stopped(trainer, unsaid, blameless=True) from None
        self.latest = episodes

        # Every rank holds all episodes, so the numbers agree without another reduction.
        pl_module.log_dict(_summary(spec, episodes), rank_zero_only=False, sync_dist=False)
        directory = run_folder(trainer)  # a collective call: on every rank
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._record(directory, trainer, stage, spec)
            self._film(directory, trainer, spec)

    def _record(self, directory: Path, trainer: L.Trainer, stage: str, spec: EnvironmentSpec) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        where = {
            "stage": stage,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "environment": spec.id,
        }
        with (directory / "rollouts.jsonl").open("a") as file:
            for episode in self.latest:
                line = where | asdict(episode)
                line["return"] = line.pop("return_")  # the underscore is Python's need
                del line["actions"]
                file.write(json.dumps(line) + "\n")

    def _film(self, directory: Path, trainer: L.Trainer, spec: EnvironmentSpec) -> None:
        """Show the best and the worst; what cannot be shown is no reason to stop training."""
        step = trainer.global_step
        for name, episode in best_and_worst(self.latest, self.videos).items():
            file = f"step-{step}-seed-{episode.seed}-{spec.metric}-{_short(episode.value)}.mp4"
            try:
                shown = film(spec, episode, workers=min(1, self.workers), timeout_s=self.timeout_s)
                write_mp4(shown, directory / "videos" / file)
            except UserError as error:
                log.warning("no video, nor any more in this run: %s", error)
                self.videos = 0
                return
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    _show(logger, f"rollout/{name}", shown, step)


def _failure(error: Exception | None, policy: torch.nn.Module) -> tuple[str, bool] | None:
    """What to say of an error, and whether the training is none the worse for it: the simulator failed, say."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return str(error), isinstance(error, SimulationError)
    sound = all(bool(local(weight).isfinite().all()) for weight in policy.parameters())
    return f"{type(error).__name__}: {error}", sound


def _stopped(trainer: L.Trainer, error: Exception, *, blameless: bool) -> Exception:
    """The error to raise, once a fit's state is saved: this validation's checkpoint would have come after it.

    Not so where the policy is at fault: diverged weights must not replace those that were saved before.
    """
    savers = [one for one in trainer.checkpoint_callbacks if isinstance(one, LastCheckpoint)]
    if not (savers and blameless and trainer.state.fn == TrainerFn.FITTING):
        return error
    try:
        path = savers[0].keep(trainer)
    except Exception as another:  # a full disk, or a device that the first error has left unusable
        error.add_note(f"the training could not be saved either: {another}")
        return error
    if not path:
        return error
    saved = f"the training until step {trainer.global_step} is saved; go on with it by --ckpt_path {path}"
    if isinstance(error, UserError):
        said = type(error)(f"{error}; {saved}")
        said.__cause__ = error
        return said
    error.add_note(saved)
    return error


def _gather(mine: Any) -> list[Any]:
    """One object from each rank, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _summary(spec: EnvironmentSpec, episodes: Sequence[Episode]) -> dict[str, float]:
    """What is logged of an evaluation."""
    values = [episode.value for episode in episodes]
    summary = {f"rollout/{spec.metric}": sum(values) / len(values), "rollout/episodes": float(len(values))}
    low, high = bootstrap_interval(values)
    # Not every episode need say so: one that was cut off, say.
    if any(episode.success is not None for episode in episodes):
        successes = sum(bool(episode.success) for episode in episodes)
        rate_low, rate_high = wilson_interval(successes, len(episodes))
        summary["rollout/success"] = successes / len(episodes)
        summary |= {"rollout/success_low": rate_low, "rollout/success_high": rate_high}
        if spec.metric == "success":
            low, high = rate_low, rate_high
    return summary | {"rollout/ci95_low": low, "rollout/ci95_high": high}


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _show(logger: TensorBoardLogger, name: str, shown: Film, step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width = shown.frames[0].shape[:2]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=animation(shown))
    # The end of a fit closes the writer, and the test after it comes to this one, which opens it again.
    writer = logger.experiment._get_file_writer()
    writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
