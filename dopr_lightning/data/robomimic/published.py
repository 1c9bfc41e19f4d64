"""robomimic's files for robosuite 1.5, as published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dopr_lightning.data.download import download
from dopr_lightning.data.robomimic import registered_file
from dopr_lightning.data.robomimic.files import DemoFile
from dopr_lightning.errors import UserError

# Files were replaced under their names before, so one revision is named. The hub announces the SHA-256 of each.
URL = (
    "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/"
    "74fa018461f479cd9fd15b924a16103012096203/v1.5/{task}/{dataset_type}/low_dim_v15.hdf5"
)


def fetch(task: str, dataset_type: str, progress: Callable[[int, int | None], None]) -> Path:
    """Download a low-dimensional file to where `Robomimic` looks for it.

    Returns:
        The file.

    Raises:
        UserError: No such file is published, or the download failed.
    """
    target = registered_file(task, dataset_type)
    if dataset_type == "scripted":
        raise UserError("scripted demonstrations are not published; run: dopr demos lift --scripted 50")
    download(URL.format(task=task, dataset_type=dataset_type), target, progress=progress)
    try:
        DemoFile(target).close()
    except UserError:
        target.unlink()
        raise
    return target
