"""Films of episodes: what they show, how fast, and in which files."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy_environment
from faulty_environment import SPEC
from PIL import Image
from torch import Tensor

from dopr_lightning.data import PushT
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.evaluate import Episode, evaluate
from dopr_lightning.rollout.video import Film, animation, best_and_worst, film, require_encoder, write_mp4


class Walk:
    """Random actions."""

    observe, act = 1, 3

    def __init__(self, observation_dim: int = 2, action_dim: int = 1, scale: float = 1.0) -> None:
        self.observation_dim, self.action_dim, self.scale = observation_dim, action_dim, scale

    def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        actions = [torch.randn(self.act, self.action_dim, generator=g) for g in generators]
        return self.scale * (torch.stack(actions) + 1)


def steps_shown(shown: Film) -> list[int]:
    return [int(frame.mean()) // 10 for frame in shown.frames]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_film_shows_the_episode(caplog: pytest.LogCaptureFixture, workers: int) -> None:
    """At 25 frames of the environment's 50 per second, and its end; with even sides."""
    episodes = evaluate(Walk(), SPEC, [3, 5], num_envs=2)
    for episode, steps in zip(episodes, ([0, 2, 4, 5], [0, 2, 4, 6, 7]), strict=True):
        shown = film(SPEC, episode, workers=workers)
        assert steps_shown(shown) == steps
        assert shown.rate == 25
        assert shown.frames[0].shape == (16, 22, 3)
    assert caplog.messages == []


def test_large_frames_are_made_smaller() -> None:
    (episode,) = evaluate(Walk(), SPEC, [3])
    shown = film(replace(SPEC, kwargs={"size": (600, 401)}), episode)
    assert shown.frames[0].shape == (256, 172, 3)
    assert steps_shown(shown) == [0, 2, 4, 5]


def test_an_episode_that_goes_otherwise_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    spec = replace(SPEC, kwargs={"fault": "drift"})
    (episode,) = evaluate(Walk(), spec, [3])
    with caplog.at_level(logging.WARNING):
        film(spec, episode)
    assert "DoprFaulty-v0 is not deterministic: the episode with seed 3" in caplog.text


def test_environments_that_do_not_render() -> None:
    (episode,) = evaluate(Walk(), toy_environment.SPEC, [3])
    with pytest.raises(UserError, match=r"DoprToy-v0 cannot be made to render .*argument 'render_mode'"):
        film(toy_environment.SPEC, episode)
    for workers in (0, 1):
        with pytest.raises(UserError, match="DoprFaulty-v0 renders no images in render_mode='rgb_array'"):
            film(replace(SPEC, kwargs={"fault": "blind"}), replace(episode, seed=3), workers=workers)


def test_pusht(caplog: pytest.LogCaptureFixture) -> None:
    """A real simulator, which repeats itself and renders without OpenGL."""
    pytest.importorskip("gym_pusht")
    spec = replace(PushT().environment, max_steps=9)
    episodes = evaluate(Walk(5, 2, scale=256.0), spec, [100_000, 100_001], num_envs=2)
    shown = film(spec, episodes[1])
    assert len(shown.frames) == 10
    assert shown.rate == 10
    assert shown.frames[0].shape == (256, 256, 3)
    assert not np.array_equal(shown.frames[0], shown.frames[-1])
    assert caplog.messages == []


def gradient(frames: int, rate: float = 10.0) -> Film:
    """Frame i is of brightness i, modulo 256."""
    return Film([np.full((64, 96, 3), i % 256, np.uint8) for i in range(frames)], rate)


def test_mp4(tmp_path: Path) -> None:
    """Read back: all frames, at their speed and of their brightness."""
    encoder = pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "videos" / "one.mp4"
    write_mp4(gradient(40, rate=12.5), path)
    reader = encoder.read_frames(str(path))
    described = next(reader)
    assert described["size"] == (96, 64)
    assert described["fps"] == pytest.approx(12.5)
    assert described["codec"] == "h264"
    brightness = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    np.testing.assert_allclose(brightness, range(40), atol=3)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    with pytest.raises(UserError, match=r"cannot write .*\.unknown"):
        write_mp4(gradient(3), tmp_path / "one.unknown")


def test_a_file_that_is_cut_off_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dies(path: str, *_: Any, **__: Any) -> Generator[None, Any]:
        with Path(path).open("wb") as file:
            for _ in range(3):
                file.write((yield).tobytes())
        raise OSError("broken pipe")

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(write_frames=dies))
    with pytest.raises(UserError, match=r"ffmpeg cannot write .*one.mp4; see its message above"):
        write_mp4(gradient(5), tmp_path / "one.mp4")
    assert list(tmp_path.iterdir()) == []


def test_without_an_encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    for attempt in (require_encoder, lambda: write_mp4(gradient(3), tmp_path / "one.mp4")):
        with pytest.raises(UserError, match=r"pip install 'dopr-lightning\[video\]'"):
            attempt()


@pytest.mark.parametrize(
    ("frames", "rate", "shown", "milliseconds"), [(50, 10.0, 50, 100), (250, 25.0, 84, 120), (50, 100.0, 50, 20)]
)
def test_an_animation_is_short_and_as_fast(frames: int, rate: float, shown: int, milliseconds: int) -> None:
    large = Film([np.full((200, 100, 3), i, np.uint8) for i in range(frames)], rate)
    gif = Image.open(io.BytesIO(animation(large)))
    assert (gif.format, gif.size, gif.n_frames) == ("GIF", (80, 160), shown)  # type: ignore[attr-defined]
    stride = -(-frames // shown)
    for i in (0, 7, shown - 1):
        gif.seek(i)
        assert gif.info["duration"] == milliseconds
        assert np.asarray(gif.convert("RGB")).mean() == i * stride


def episode(seed: int, value: float, length: int = 9) -> Episode:
    return Episode(seed, value, value, value, length, None, 0, np.zeros((length, 1), np.float32))


def test_the_best_and_the_worst() -> None:
    some: list[Any] = [episode(1, 0.2), episode(2, 1.0), episode(3, 1.0, length=4), episode(4, 0.0), episode(5, 0.1)]

    def chosen(count: int) -> dict[str, int]:
        return {name: e.seed for name, e in best_and_worst(some, count).items()}

    assert chosen(0) == {}
    assert chosen(1) == {"best": 3}
    assert chosen(2) == {"best": 3, "worst": 4}
    assert chosen(3) == {"best": 3, "worst": 4, "best_2": 2}
    assert sorted(chosen(9).values()) == [1, 2, 3, 4, 5]
    assert list(chosen(9)) == ["best", "worst", "best_2", "worst_2", "best_3"]
