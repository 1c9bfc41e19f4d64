"""PushT: human demonstrations of pushing a T onto its outline, as Diffusion Policy published them.

C. Chi et al., "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", RSS 2023; data under the MIT
licence. `register` unpacks the published zarr archive under ``data_home()/pusht``: the low-dimensional arrays (0.8 MB)
and the images (709 MB), which are then read from there as they are needed.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.convention import Convention
from dopr_lightning.data.demonstrations import Demonstrations
from dopr_lightning.data.download import download
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.home import data_home
from dopr_lightning.data.pusht_archive import CAMERA, read_archive
from dopr_lightning.data.source import Source
from dopr_lightning.errors import UserError

# The Diffusion Policy release: pusht_cchi_v7_replay.zarr.zip, 31 MB, 206 episodes, 25,650 steps.
URL = "https://drive.google.com/uc?export=download&id=1KY1InLurpMvJDRb14L9NlXT_fEsCvVUq"
SHA256 = "96b514609776a2b0905828f40efc3cf2adb77338cd50648957be87cd5388ebfd"

ARRAYS, IMAGES, RECORD = "pusht.npz", "pusht_images.npy", "pusht.json"
"""What is registered: the low-dimensional arrays, the frames, and where they come from."""

SIMULATORS = ("gym-pusht", "pymunk")

ARENA = 512.0
"""Side, in pixels."""

KEYS = ("agent_x", "agent_y", "block_x", "block_y", "block_angle")

AGENT = 2
"""The first so many numbers of a state are the agent's, the rest the block's."""


@dataclass(frozen=True)
class Registered:
    """A registered copy of the demonstrations.

    Args:
        path: The npz that holds the arrays.
        sha256: Of the original archive.
        episodes: How many.
        steps: In all.
        images: Whether the archive had images, which are then in a file beside.
    """

    path: Path
    sha256: str
    episodes: int
    steps: int
    images: bool


class PushT(Source):
    """PushT from state: agent x, y, block x, y (pixels of a 512 x 512 arena) and block angle (radians).

    With images the state is the agent's x, y alone; where the block is must be seen, in the 96 x 96 frames of the
    camera ``image``.

    Actions are the agent's next target x, y. An episode's score is the environment's best reward,
    coverage / 0.95 clipped to 1, over 300 steps, as in Diffusion Policy.

    Args:
        path: A Diffusion Policy archive (``.zarr.zip``) to read directly. By default the copy that
            ``dopr demos pusht`` registered, whose images stay on disk; an archive's are unpacked into memory.
        images: Observe images.
    """

    def __init__(self, path: str | None = None, images: bool = False) -> None:
        self.path = path
        self.images = images

    @property
    def environment(self) -> EnvironmentSpec:
        """gym-pusht, observed as the demonstrations are."""
        if self.images:
            return EnvironmentSpec(
                id="dopr/PushTImages-v0",
                max_steps=300,
                metric="max_reward",
                extra="pusht",
                module="dopr_lightning.rollout.pusht_env",
                cameras=(CAMERA,),
                simulators=SIMULATORS,
            )
        return EnvironmentSpec(
            id="gym_pusht/PushT-v0",
            max_steps=300,
            metric="max_reward",
            kwargs={"obs_type": "state"},
            extra="pusht",
            module="gym_pusht",
            simulators=SIMULATORS,
        )

    def convention(self) -> Convention:
        """Where the agent shall go, in the arena."""
        keys = KEYS[:AGENT] if self.images else KEYS
        return Convention(keys, "absolute", low=(0.0, 0.0), high=(ARENA, ARENA))

    def load(self) -> Demonstrations:
        """Read the demonstrations.

        Raises:
            UserError: Nothing is registered, the file is missing or damaged, or there are no images in it.
        """
        if self.path is None:
            data = _read_registered(self.images)
        else:
            data = read_archive(Path(self.path), _in_memory if self.images else None)
        if not self.images:
            return data
        if not data.cameras:
            where = self.path or "the registered copy"
            raise UserError(f"{where} holds no images; run: dopr demos pusht, or set images to false")
        return replace(data, observations=data.observations[:, :AGENT])


def register(path: Path | None = None, progress: Callable[[int, int | None], None] | None = None) -> Registered:
    """Check an archive and unpack it; the work behind ``dopr demos pusht``.

    What was registered before stays until the new copy is complete.

    Args:
        path: A local archive. By default the published one is downloaded, and checked.
        progress: Called with bytes downloaded so far and in all, the latter ``None`` if the server does not say.

    Raises:
        UserError: The download failed, or the file is missing, damaged or something else.
    """
    home = data_home() / "pusht"
    home.mkdir(parents=True, exist_ok=True)
    archive = path or home / "pusht_cchi_v7_replay.zarr.zip"
    if path is None:
        download(
            URL, archive, SHA256, progress, f"fetch {archive.name} from there yourself: dopr demos pusht --path FILE"
        )
    with tempfile.TemporaryDirectory(dir=home) as directory:
        registered = _keep(archive, Path(directory), home)
    if path is None:
        archive.unlink(missing_ok=True)  # another process may have been as far
    return registered


def _keep(archive: Path, new: Path, home: Path) -> Registered:
    def on_disk(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        return np.lib.format.open_memmap(new / IMAGES, mode="w+", dtype=np.uint8, shape=shape)

    demonstrations = read_archive(archive, on_disk)
    np.savez(
        new / ARRAYS,
        observations=demonstrations.observations,
        actions=demonstrations.actions,
        episode_ends=demonstrations.episode_ends,
        sha256=np.array(demonstrations.sha256),
    )
    registered = Registered(
        home / ARRAYS,
        demonstrations.sha256,
        demonstrations.num_episodes,
        len(demonstrations.actions),
        images=bool(demonstrations.cameras),
    )
    provenance = {"source": demonstrations.source, "url": URL, **asdict(registered), "path": ARRAYS}
    (new / RECORD).write_text(json.dumps(provenance, indent=2) + "\n")
    if not registered.images:
        (home / IMAGES).unlink(missing_ok=True)
    for name in (IMAGES, ARRAYS, RECORD) if registered.images else (ARRAYS, RECORD):
        os.replace(new / name, home / name)
    return registered


def _read_registered(images: bool) -> Demonstrations:
    home = data_home() / "pusht"
    try:
        with np.load(home / ARRAYS, allow_pickle=False) as held:
            return Demonstrations(
                held["observations"],
                held["actions"],
                held["episode_ends"],
                source="pusht",
                sha256=str(held["sha256"]),
                images={CAMERA: np.load(home / IMAGES, mmap_mode="r")} if images and (home / IMAGES).exists() else None,
            )
    except FileNotFoundError as error:
        raise UserError(
            "PushT's demonstrations are not registered on this machine; run: dopr demos pusht (downloads 31 MB), or: "
            "dopr demos pusht --path FILE"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"the copy in {home} is damaged ({error}); run again: dopr demos pusht") from error


def _in_memory(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    return np.empty(shape, np.uint8)
