"""One training run and its rollouts, and what is on disk of them: a record that is never computed twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopr_lightning.configuration import differences
from dopr_lightning.errors import UserError
from dopr_lightning.project import LIBRARY, Project

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
        steps: Optimizer steps that its training took; None where that is not known.
    """

    val_loss: float
    episodes: list[float]
    train_seconds: float
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    steps: int | None = None

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


def common_steps(outcomes: Iterable[Outcome], planned: int) -> int | None:
    """The steps that every run took, or was to take if none says; None if they differ, or nobody knows."""
    taken = {outcome.steps for outcome in outcomes if isinstance(outcome, Record) and outcome.steps} or {planned}
    return taken.pop() if len(taken) == 1 and taken != {-1} else None


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
    if old.get(DATA) != settings.get(DATA):  # of a whole comparison or sweep; a trial has none
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


def earlier_results(path: Path, part: str) -> dict[str, Any] | None:
    """The results.json that new results will replace, or None where there is none.

    Args:
        path: Of the file.
        part: What results of the same command have, and others have not.

    Raises:
        UserError: It is of something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError:  # no JSON, or no text
        found = None
    if not isinstance(found, dict) or part not in found:
        raise UserError(f"{path} holds other results, not of this command; choose another --output")
    return found


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write at once or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)
