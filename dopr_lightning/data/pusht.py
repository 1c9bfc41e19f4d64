"""PushT: human demonstrations of pushing a T onto its outline, as Diffusion Policy published them.

C. Chi et al., "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", RSS 2023; data under the MIT
licence. The published zarr archive holds images too; `register` keeps the low-dimensional arrays (0.8 MB) under
``data_home()/pusht``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.home import data_home
from dopr_lightning.data.source import Source
from dopr_lightning.errors import UserError, import_extra

# The Diffusion Policy release: pusht_cchi_v7_replay.zarr.zip, 31 MB, 206 episodes, 25,650 steps.
URL = "https://drive.google.com/uc?export=download&id=1KY1InLurpMvJDRb14L9NlXT_fEsCvVUq"
SHA256 = "96b514609776a2b0905828f40efc3cf2adb77338cd50648957be87cd5388ebfd"

# Codecs that only decompress. A zarr archive may also name one that unpickles.
_CODECS = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}


@dataclass(frozen=True)
class Registered:
    """A registered copy of the demonstrations.

    Args:
        path: The npz that holds the arrays.
        sha256: Of the original archive.
        episodes: How many.
        steps: In all.
    """

    path: Path
    sha256: str
    episodes: int
    steps: int


class PushT(Source):
    """PushT from state: agent x, y, block x, y (pixels of a 512 x 512 arena) and block angle (radians).

    Actions are the agent's next target x, y. An episode's score is the environment's best reward,
    coverage / 0.95 clipped to 1, over 300 steps, as in Diffusion Policy.

    Args:
        path: A Diffusion Policy archive (``.zarr.zip``) to read directly. By default the copy that
            ``dopr demos pusht`` registered.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @property
    def environment(self) -> EnvironmentSpec:
        """gym-pusht, observed as the five state numbers."""
        return EnvironmentSpec(
            id="gym_pusht/PushT-v0",
            max_steps=300,
            metric="max_reward",
            kwargs={"obs_type": "state"},
            extra="pusht",
            module="gym_pusht",
        )

    def load(self) -> Demonstrations:
        """Read the demonstrations.

        Raises:
            UserError: Nothing is registered, or the file is missing or damaged.
        """
        return _read_registered() if self.path is None else _read_archive(Path(self.path))


def register(path: Path | None = None) -> Registered:
    """Check an archive and keep its low-dimensional arrays; the work behind ``dopr demos pusht``.

    What was registered before stays until the new copy is complete.

    Args:
        path: A local archive. By default the published one is downloaded, with a progress bar and a checksum.

    Raises:
        UserError: The download failed, or the file is missing, damaged or something else.
    """
    home = data_home() / "pusht"
    if path is not None:
        return _keep(_read_archive(path), home)
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as directory:
        archive = Path(directory) / "pusht_cchi_v7_replay.zarr.zip"
        _download(archive)
        return _keep(_read_archive(archive), home)


def _download(archive: Path) -> None:
    import torch.hub

    try:
        torch.hub.download_url_to_file(URL, str(archive), hash_prefix=SHA256, progress=True)
    # No route, a refused connection, a full disk; RuntimeError is the checksum.
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the download of PushT failed ({error}); fetch pusht_cchi_v7_replay.zarr.zip from {URL} yourself and run: "
            "dopr demos pusht --path FILE"
        ) from error


def _keep(demonstrations: Demonstrations, home: Path) -> Registered:
    home.mkdir(parents=True, exist_ok=True)
    arrays = home / "pusht.npz"
    with tempfile.TemporaryDirectory(dir=home) as directory:
        new = Path(directory) / "pusht.npz"
        np.savez(
            new,
            observations=demonstrations.observations,
            actions=demonstrations.actions,
            episode_ends=demonstrations.episode_ends,
            sha256=np.array(demonstrations.sha256),
        )
        registered = Registered(arrays, demonstrations.sha256, demonstrations.num_episodes, len(demonstrations.actions))
        provenance = {"source": demonstrations.source, "url": URL, **asdict(registered), "path": arrays.name}
        record = Path(directory) / "pusht.json"
        record.write_text(json.dumps(provenance, indent=2) + "\n")
        os.replace(new, arrays)
        os.replace(record, home / "pusht.json")
    return registered


def _read_registered() -> Demonstrations:
    arrays = data_home() / "pusht" / "pusht.npz"
    try:
        with np.load(arrays, allow_pickle=False) as held:
            return Demonstrations(
                held["observations"],
                held["actions"],
                held["episode_ends"],
                source="pusht",
                sha256=str(held["sha256"]),
            )
    except FileNotFoundError as error:
        raise UserError(
            "PushT's demonstrations are not registered on this machine; run: dopr demos pusht (downloads 31 MB), or: "
            "dopr demos pusht --path FILE"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{arrays} is damaged ({error}); run again: dopr demos pusht") from error


def _read_archive(path: Path) -> Demonstrations:
    way_out = "give Diffusion Policy's pusht_cchi_v7_replay.zarr.zip, or run without --path to download it"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {way_out}")
    zarr = import_extra("zarr", "pusht")
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with zarr.ZipStore(str(path), mode="r") as store:
            root = zarr.open_group(store, mode="r")
            states = _read_array(root, "data/state", dimensions=5)
            actions = _read_array(root, "data/action", dimensions=2)
            ends = _read_array(root, "meta/episode_ends", dimensions=None)
    # zipfile, zarr and every codec have errors of their own for a damaged file, with no common base.
    except Exception as error:
        raise UserError(f"{path}: not PushT's demonstrations ({error}); {way_out}") from error
    return Demonstrations(states, actions, ends, source="pusht", sha256=sha256)


def _read_array(root: Any, name: str, dimensions: int | None) -> npt.NDArray[Any]:
    """A sound (steps, dimensions) array of numbers, or (episodes,) where dimensions is None."""
    if name not in root:
        raise ValueError(f"no array {name!r} in it")
    array = root[name]
    shape = getattr(array, "shape", None)
    if shape is None or (len(shape) != 1 if dimensions is None else len(shape) != 2 or shape[1] != dimensions):
        expected = "(episodes,)" if dimensions is None else f"(steps, {dimensions})"
        raise ValueError(f"{name} has shape {shape}, expected {expected}")
    # Object arrays and unknown codecs can run code when read.
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {array.dtype}, not numbers")
    codecs = [codec.codec_id for codec in [array.compressor, *(array.filters or [])] if codec is not None]
    if not _CODECS.issuperset(codecs):
        raise ValueError(f"{name} is encoded with {', '.join(codecs)}; only {', '.join(sorted(_CODECS))} are read")
    if array.nchunks_initialized != array.nchunks:
        # zarr reads a missing chunk as zeros.
        raise ValueError(f"{name} lacks {array.nchunks - array.nchunks_initialized} of its chunks")
    return np.asarray(array[:])
