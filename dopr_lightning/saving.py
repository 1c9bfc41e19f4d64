"""Where does a run write, when is its last state written, and how does a longer run go on from it?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dopr_lightning.errors import UserError, is_remote


def run_folder(trainer: Trainer) -> Path:
    """Where a run's configuration and rollouts go. All processes must ask, and hear the same.

    With a logger it is the run's own. Lightning's ``log_dir`` is that for TensorBoard and CSV files alone; of other
    loggers (Weights & Biases) it is the folder of all runs, in which Lightning gives only checkpoints a place by run.

    Raises:
        UserError: It is on a remote store (``s3://...``), where Lightning can write and we cannot.
    """
    logger = trainer.logger
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        folder = trainer.log_dir or trainer.default_root_dir
    else:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        root = str(logger.save_dir or trainer.default_root_dir)
        folder = trainer.strategy.broadcast(os.path.join(root, str(logger.name), version))
    # A fast_dev_run has no logger, whose folder may be a local one, and writes nothing.
    if is_remote(folder) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            f"{folder}: a run's configuration and rollouts are written to local files; choose a local "
            "--trainer.default_root_dir or save_dir of the logger (--checkpoint.dirpath may be remote)"
        )
    return Path(folder)


class LastCheckpoint(ModelCheckpoint):
    """Saves the state that a run ends with, too: Lightning saves at validations, and few runs end at one.

    Then ``last.ckpt`` holds the weights that the final rollouts judge. It resumes like one of a validation, also into a
    longer run that goes on in the middle of an epoch.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the folder is free: now, since before it is not always known whether a run is resumed.

        Raises:
            UserError: It holds another run's last checkpoint, beside which this one's would get another name.
        """
        super().on_train_start(trainer, pl_module)
        last = os.path.join(self.dirpath or "", f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        # Wherever it is: checkpoints may go to a remote store.
        if self.save_last and trainer.ckpt_path is None and self.file_exists(last, trainer):
            raise UserError(
                f"{last} is of another run; go on with it by --ckpt_path {last}, or choose another --checkpoint.dirpath"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save unless the last step's state was saved."""
        self.keep(trainer)

    def keep(self, trainer: Trainer) -> str:
        """Save a fit's state where its next checkpoint may never be; on all processes.

        Returns:
            The file, or nothing if there is to be none.
        """
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._last_checkpoint_saved = ""  # of an earlier step: nothing for save_last="link" to lead to
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.last_model_path if self._last_global_step_saved == trainer.global_step else ""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """When training has ended, describe its last epoch as one to go on with, or the next as one to begin.

        Lightning counts as complete what ``max_steps`` cut short, and would repeat a batch of a whole epoch without
        validation.
        """
        loop = checkpoint["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
        if not epochs["total"]["ready"] == epochs["total"]["completed"] > 0:
            return
        if batches["is_last_batch"]:
            batches["is_last_batch"] = False
            batches["current"] = dict.fromkeys(batches["current"], 0)
        else:
            for counts in epochs.values():
                counts["processed"] -= 1
                counts["completed"] -= 1
