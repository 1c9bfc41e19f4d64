"""Closed-loop evaluation inside a Lightning run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.evaluate import Episode, Policy, evaluate
from dopr_lightning.rollout.statistics import bootstrap_interval

# Distance from the seeds that are reported to those that choose a checkpoint. A checkpoint picked by its score on some
# seeds is partly picked for luck on them, so the report must not use them again.
SELECTION_OFFSET = 1_000_000


class RolloutEvaluation(Callback):
    """Roll the policy out at validation, to choose by, and at test, to report.

    Logs ``rollout/return`` or ``rollout/max_reward`` (whichever the environment's metric is), ``rollout/ci95_low``,
    ``rollout/ci95_high`` and ``rollout/episodes``, and appends a line per episode to ``rollouts.jsonl`` in the
    trainer's log directory. Monitor the first for checkpoints.

    The module is the policy (`dopr_lightning.rollout.evaluate.Policy`), the environment is the data module's. Ranks
    share the seeds, so each is run exactly once on any number of processes. Rollouts happen when the validation epoch
    starts: an EMA callback has put its averages in by then (Lightning's own only if listed before this one), and
    Lightning has switched the module to eval mode and gradients off.

    Args:
        episodes: At each validation.
        report_episodes: At test. 50 is Diffusion Policy's choice.
        first_seed: Of the reported episodes; by default the environment's own. Validation uses seeds from
            ``first_seed + 1000000``, so a report is never about the seeds that chose the checkpoint.
        every_n_epochs: While fitting, roll out in every n-th epoch's validation only: for tasks where rollouts cost
            more than training.
        num_envs: Episodes at once, on each rank.

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
    ) -> None:
        for name, value in (
            ("episodes", episodes),
            ("report_episodes", report_episodes),
            ("every_n_epochs", every_n_epochs),
            ("num_envs", num_envs),
        ):
            if value < 1:
                raise UserError(f"RolloutEvaluation: {name}={value}; must be at least 1")
        self.episodes = episodes
        self.report_episodes = report_episodes
        self.first_seed = first_seed
        self.every_n_epochs = every_n_epochs
        self.num_envs = num_envs
        self.latest: list[Episode] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run whose rollouts would be of the wrong weights, or nowhere.

        Raises:
            UserError: A weight averaging callback is listed after this one, or the data module names no environment.
        """
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
        if not isinstance(self._environment(trainer), EnvironmentSpec):
            raise UserError(
                "RolloutEvaluation needs a data module with an 'environment' (an EnvironmentSpec); pass one, or remove "
                "the callback"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Roll out on the seeds that choose a checkpoint."""
        skipped_epoch = trainer.state.fn == TrainerFn.FITTING and (trainer.current_epoch + 1) % self.every_n_epochs
        if trainer.sanity_checking or skipped_epoch:
            return
        self._run(trainer, pl_module, "validate", self._first_seed(trainer) + SELECTION_OFFSET, self.episodes)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Roll out on the seeds that are reported."""
        self._run(trainer, pl_module, "test", self._first_seed(trainer), self.report_episodes)

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str, first_seed: int, count: int) -> None:
        spec = self._environment(trainer)
        seeds = range(first_seed, first_seed + count)
        mine = seeds[trainer.global_rank :: trainer.world_size]
        error: UserError | None = None
        episodes: list[Episode] = []
        try:
            episodes = evaluate(cast(Policy, pl_module), spec, mine, self.num_envs)
        except UserError as caught:
            error = caught
        # A rank that fails must say so to the others, which would wait for it otherwise.
        failures = [message for message in _gather(str(error) if error else None) if message]
        if failures:
            raise error or UserError(failures[0])
        episodes = sorted((e for share in _gather(episodes) for e in share), key=lambda e: e.seed)
        self.latest = episodes

        values = [episode.value for episode in episodes]
        low, high = bootstrap_interval(values)
        logged = {
            f"rollout/{spec.metric}": sum(values) / len(values),
            "rollout/ci95_low": low,
            "rollout/ci95_high": high,
            "rollout/episodes": float(len(values)),
        }
        # Every rank holds all episodes, so the numbers agree without another reduction.
        pl_module.log_dict(logged, rank_zero_only=False, sync_dist=False)
        self._record(trainer, stage, spec, episodes)

    def _record(self, trainer: L.Trainer, stage: str, spec: EnvironmentSpec, episodes: list[Episode]) -> None:
        log_dir = trainer.log_dir  # a collective call: on every rank
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = Path(log_dir or trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        where = {
            "stage": stage,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "environment": spec.id,
        }
        with (directory / "rollouts.jsonl").open("a") as file:
            for episode in episodes:
                line = where | asdict(episode)
                line["return"] = line.pop("return_")  # the underscore is Python's need
                file.write(json.dumps(line) + "\n")

    def _first_seed(self, trainer: L.Trainer) -> int:
        return self._environment(trainer).first_seed if self.first_seed is None else self.first_seed

    @staticmethod
    def _environment(trainer: L.Trainer) -> EnvironmentSpec:
        # None without a data module: only `setup`, which refuses that, ever sees it.
        return cast(EnvironmentSpec, getattr(getattr(trainer, "datamodule", None), "environment", None))


def _gather(mine: Any) -> list[Any]:
    """One object from each rank, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered
