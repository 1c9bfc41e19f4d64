"""One training run and its rollouts, as a record on disk that is never computed twice."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dopr_lightning.configuration import differences
from dopr_lightning.errors import UserError
from dopr_lightning.project import LIBRARY, Project
from dopr_lightning.versions import versions

SETTINGS = "settings.json"
DIVERGED = "diverged.json"

DATA = "data_sha256"
"""Key of the demonstrations' digest in settings."""


class DivergedError(UserError):
    """The numbers left the range of floats: a result, of which the same run would only give the same."""


Report = Callable[[str, int, int], None]
"""Called with (trial, steps done, steps in all)."""


@dataclass(frozen=True)
class Trial:
    """What to train and how to judge it.

    Args:
        name: For people, ``"dopr-muon seed 1"``.
        folder: Holds record.json, log.txt, TensorBoard events, rollouts.jsonl and checkpoints.
        arguments: Of ``dopr fit``, without the verb.
        config: What these arguments amount to: a file among them may change.
        seed: Of weights, batches and noise.
        first_seed: Of the judged rollouts.
        episodes: Judged rollouts.
        cost: Of training, in any unit, to estimate how long it takes from how long others took.
        keep_checkpoints: Whether they stay once there is a record.
        project: Whose policy and data.
    """

    name: str
    folder: Path
    arguments: tuple[str, ...]
    config: dict[str, Any]
    seed: int
    first_seed: int
    episodes: int
    cost: float = 1.0
    keep_checkpoints: bool = True
    project: Project = LIBRARY

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the record, and so must not have changed when a finished record is reused."""
        return {
            "config": self.config,
            "seed": self.seed,
            "first_seed": self.first_seed,
            "episodes": self.episodes,
        }


@dataclass(frozen=True)
class Record:
    """What a finished trial tells.

    Args:
        val_loss: One-step loss of the final EMA weights on held-out episodes.
        episodes: The metric of each judged rollout of these weights, in the order of the seeds.
        train_seconds: Wall-clock seconds of training, without validation and rollouts.
        settings: Of the trial.
        versions: Of the packages it was run with.
    """

    val_loss: float
    episodes: list[float]
    train_seconds: float
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean of the metric over episodes; NaN without any."""
        return sum(self.episodes) / len(self.episodes) if self.episodes else math.nan


@dataclass(frozen=True)
class Failure:
    """Why a trial has no record.

    Args:
        message: In a line.
        diverged: That is a result: the same run would only give the same. Anything else, the same command tries again.
        versions: Of the packages it diverged with.
    """

    message: str
    diverged: bool = False
    versions: dict[str, str] = field(default_factory=dict)


Outcome = Record | Failure


def load_outcome(trial: Trial) -> Outcome | None:
    """What came of a trial that has finished or diverged; else None.

    Raises:
        UserError: The folder holds a run, finished or not, with other settings.
    """
    path = trial.folder / "record.json"
    if not path.exists():
        diverged = trial.folder / DIVERGED
        if diverged.exists() and not _changed((found := json.loads(diverged.read_text()))["settings"], trial.settings):
            return Failure(found["message"], diverged=True, versions=found["versions"])
        check_settings(trial.folder, trial.settings)
        return None
    record = Record(**json.loads(path.read_text()))
    if changed := _changed(record.settings, trial.settings):
        raise _other_settings(trial.folder, changed)
    return record


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds work of other settings; what failed before its first checkpoint is no loss.

    Raises:
        UserError: Names what differs.
    """
    path = folder / SETTINGS
    if not path.exists():
        return
    old = json.loads(path.read_text())
    if not (any(folder.rglob("*.ckpt")) or any(folder.rglob("record.json"))):
        return
    if changed := _changed(old, settings):
        raise _other_settings(folder, changed)
    if old.get(DATA) and old[DATA] != settings[DATA]:  # older folders do not say
        raise UserError(
            f"{folder} holds runs on demonstrations with sha256 {old[DATA][:12]}, and here they have "
            f"{settings[DATA][:12]}: the data changed; choose another --output"
        )


def note_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down whose folder this is, for :func:`check_settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(settings, folder / SETTINGS)


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, in a few words; an option that is new and empty, as one of a later version may be, does not."""
    # The configuration's keys are known by their own names, "model.optimizer.lr".
    return differences(old | old.get("config", {}), new | new.get("config", {}), ignore=("config", DATA))


def _other_settings(folder: Path, changed: str) -> UserError:
    return UserError(f"{folder} holds a run with other settings ({changed}); choose another --output")


def run_trial(trial: Trial, report: Report) -> Record:
    """Train, from the last checkpoint if there is one, then judge the EMA weights by rollouts on fixed seeds.

    Everything that would be printed goes to ``log.txt`` in the trial's folder.

    Raises:
        DivergedError: The training loss, or what was trained, is not finite. That is kept as a record is.
    """
    note_settings(trial.folder, trial.settings)
    try:
        with (trial.folder / "log.txt").open("a") as log, _output_to(log):
            record = _train_and_judge(trial, report)
    except DivergedError as error:
        said = {"message": str(error), "settings": trial.settings, "versions": versions()}
        write_json(said, trial.folder / DIVERGED)
        _drop_checkpoints(trial)
        raise
    write_json(asdict(record), trial.folder / "record.json")
    _drop_checkpoints(trial)
    return record


def _drop_checkpoints(trial: Trial) -> None:
    if not trial.keep_checkpoints:
        shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write at once or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


@contextlib.contextmanager
def _output_to(log: TextIO) -> Iterator[None]:
    """Send what is printed to ``log``, and what Lightning logs: its handlers keep the stream they were made with."""
    import lightning.pytorch  # noqa: F401  # makes them

    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    handlers = [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]
    streams = [handler.setStream(log) for handler in handlers]
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


def _train_and_judge(trial: Trial, report: Report) -> Record:
    import lightning.pytorch as pl
    import torch

    from dopr_lightning.preemption import supersede_preempted_checkpoint
    from dopr_lightning.rollout.callback import RolloutEvaluation
    from dopr_lightning.training import CLI, quiet

    class Progress(pl.Callback):
        """Reports steps, watches the loss, and keeps the time spent on training alone, also over interruptions."""

        trained = False
        seconds = 0.0
        diverged = torch.tensor(False)

        def on_train_start(self, *_: Any) -> None:
            self.trained = True
            self.since = time.perf_counter()

        def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                self.seconds += time.perf_counter() - self.since

        def on_validation_end(self, *_: Any) -> None:
            self.since = time.perf_counter()

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
            # On the device: it is read, and waited for, with every report only.
            self.diverged = self.diverged.to(module.device) | ~outputs["loss"].isfinite()
            if trainer.global_step % max(1, trainer.max_steps // 100) == 0:
                report(trial.name, trainer.global_step, trainer.max_steps)
                if self.diverged:
                    raise DivergedError(
                        f"diverged: the training loss is not finite, by step {trainer.global_step} of "
                        f"{trainer.max_steps}"
                    )

        def on_train_end(self, *_: Any) -> None:
            self.seconds += time.perf_counter() - self.since

        def state_dict(self) -> dict[str, Any]:
            return {"seconds": self.seconds}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.seconds = state_dict["seconds"]

    quiet()
    cli = CLI(
        [
            *trial.arguments,
            f"--seed_everything={trial.seed}",
            f"--rollout.first_seed={trial.first_seed}",
            f"--rollout.report_episodes={trial.episodes}",
            f"--checkpoint.dirpath={trial.folder / 'checkpoints'}",
            f"--trainer.default_root_dir={trial.folder}",
            "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger",
            f"--trainer.logger.save_dir={trial.folder}",
            "--trainer.logger.name=",
            "--trainer.logger.version=",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ],
        run=False,
        project=trial.project,
    )
    cli.parser.save(cli.config, str(trial.folder / "config.yaml"), skip_check=True, overwrite=True)
    trainer, progress = cli.trainer, Progress()
    trainer.callbacks.append(progress)  # type: ignore[attr-defined]
    last = trial.folder / "checkpoints" / "last.ckpt"
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last if last.exists() else None)
        # Stopped between its last step and its record, there was nothing to train, and so nobody put the average in
        # place.
        finished = None if progress.trained else last
        supersede_preempted_checkpoint(trainer)
        (metrics,) = trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=finished, verbose=False)
    except DivergedError:
        raise
    except Exception as error:
        # Whatever was the first to stumble over them: a preconditioner, a rollout.
        if progress.diverged or not all(parameter.isfinite().all() for parameter in cli.model.parameters()):
            raise DivergedError(f"diverged: {error}") from error
        raise
    if not math.isfinite(metrics["test/loss"]):
        raise DivergedError("diverged: the validation loss is not finite")
    rollout = next(c for c in trainer.callbacks if isinstance(c, RolloutEvaluation))  # type: ignore[attr-defined]
    return Record(
        val_loss=metrics["test/loss"],
        episodes=[episode.value for episode in rollout.latest],
        train_seconds=progress.seconds,
        settings=trial.settings,
        versions=versions(),
    )
