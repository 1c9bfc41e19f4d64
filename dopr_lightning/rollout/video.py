"""What did an episode look like? Its actions again, in an environment that renders.

A policy's batched arithmetic rounds differently with other episodes beside it, and simulators of contact magnify that.
So the policy is not asked again: the seed and the actions are the episode, in a simulator that is deterministic.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError, import_extra
from dopr_lightning.rollout.evaluate import Episode
from dopr_lightning.rollout.slot import Segment
from dopr_lightning.rollout.workers import Lost, env_pool

log = logging.getLogger(__name__)

EXTRA = "video"

# Of animations for TensorBoard, which keeps them all in one file: a megabyte or two each.
ANIMATION_FRAMES = 100
ANIMATION_SIZE = 160

_CHUNK = 8  # actions between two answers of a worker


@dataclass(frozen=True)
class Film:
    """Frames (H, W, 3) uint8, and how many of them make a second."""

    frames: list[npt.NDArray[Any]]
    rate: float


def film(spec: EnvironmentSpec, episode: Episode, *, workers: int = 0, timeout_s: float = 60.0) -> Film:
    """Repeat an episode, with a camera.

    Says in a warning if it does not go as it went: the environment then is not a function of seed and actions, and
    nothing measured in it can be repeated.

    Args:
        spec: Its environment.
        episode: From :func:`~dopr_lightning.rollout.evaluate.evaluate`.
        workers: 0 to render in this process, else in another one.
        timeout_s: Seconds that the other process may take for a few steps.

    Raises:
        UserError: The environment cannot render, or fails.
    """
    with env_pool(spec, 1, 1, workers=workers, timeout_s=timeout_s, film=True) as pool:
        rate = pool.describe().frame_rate
        happened = [_went(pool.start({0: episode.seed})[0])]
        for first in range(0, episode.length, _CHUNK):
            happened.append(_went(pool.execute({0: episode.actions[first : first + _CHUNK]})[0]))
            if happened[-1].done:
                break
    rewards = [reward for segment in happened for reward in segment.rewards]
    # PushT's reward, the area of an intersection of polygons, may round otherwise the next time.
    if len(rewards) != episode.length or not math.isclose(sum(rewards), episode.return_, rel_tol=1e-6, abs_tol=1e-6):
        log.warning(
            "%s is not deterministic: the episode with seed %d had return %g in %d steps, and the same actions have "
            "return %g in %d steps when filmed; the film shows the latter",
            *(spec.id, episode.seed, episode.return_, episode.length, sum(rewards), len(rewards)),
        )
    return Film([frame for segment in happened for frame in segment.frames], rate)


def _went(answer: Segment | Lost) -> Segment:
    if isinstance(answer, Lost):
        raise UserError(answer.reason)
    return answer


def best_and_worst(episodes: Sequence[Episode], count: int) -> dict[str, Episode]:
    """Episodes to show: the best, the worst, the second best, and so on.

    Args:
        episodes: Of one evaluation.
        count: How many to choose; all, if there are fewer.

    Returns:
        By name: ``best``, ``worst``, ``best_2``, ``worst_2``. Of equal values, the quicker is the better.
    """
    ranked = deque(sorted(episodes, key=lambda e: (-e.value, e.length, e.seed)))
    chosen: dict[str, Episode] = {}
    for i in range(min(count, len(ranked))):
        place = f"_{i // 2 + 1}" if i > 1 else ""
        chosen["worst" + place if i % 2 else "best" + place] = ranked.pop() if i % 2 else ranked.popleft()
    return chosen


def require_encoder() -> None:
    """Find out before training that films cannot be written.

    Raises:
        UserError: Says what to install.
    """
    encoder = import_extra("imageio_ffmpeg", EXTRA)
    try:
        encoder.get_ffmpeg_exe()
    except RuntimeError as error:  # its wheels for some platforms hold no ffmpeg
        raise UserError(f"no films: {error} Or set rollout.videos to 0") from error


def write_mp4(film: Film, path: Path) -> None:
    """H.264, which browsers play.

    Raises:
        UserError: There is no encoder, or it cannot write there.
    """
    encoder = import_extra("imageio_ffmpeg", EXTRA)
    height, width = film.frames[0].shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")  # ffmpeg goes by the suffix
    writer = encoder.write_frames(
        str(partial), (width, height), fps=film.rate, macro_block_size=2, ffmpeg_log_level="error"
    )
    try:
        writer.send(None)
        for frame in film.frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        os.replace(partial, path)
    except OSError as error:  # ffmpeg says on stderr what it misses, and leaves a part of the file, or none
        partial.unlink(missing_ok=True)
        raise UserError(f"ffmpeg cannot write {path}; see its message above") from error


def animation(film: Film) -> bytes:
    """A small GIF, at the film's speed: TensorBoard shows it among the images, and needs no other package for that."""
    from PIL import Image

    stride = math.ceil(len(film.frames) / ANIMATION_FRAMES)
    images = [Image.fromarray(frame) for frame in film.frames[::stride]]
    for image in images:
        image.thumbnail((ANIMATION_SIZE, ANIMATION_SIZE))
    gif = io.BytesIO()
    # Browsers slow down what is shown for less than 20 ms.
    milliseconds = max(20, round(1000 * stride / film.rate))
    images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return gif.getvalue()
