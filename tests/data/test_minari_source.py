from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from shared_data import shared_data

from dopr_lightning.data.minari_source import Minari
from dopr_lightning.errors import UserError

ID = "mujoco/humanoid/expert-demos-v0"


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Path:
    path = shared_data("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
    return path


def test_humanoid(root: Path) -> None:
    """Counts from the data's README; arrays and rewards straight from the hdf5 file."""
    data = Minari(ID).load()
    file = root / ID / "data" / "main_data.hdf5"
    assert data.num_episodes == 25
    assert data.observations.shape == (25_000, 348)
    assert data.actions.shape == (25_000, 17)
    np.testing.assert_array_equal(data.episode_ends, np.arange(1, 26) * 1000)
    assert data.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    returns = []
    with h5py.File(file) as raw:
        for i in range(25):
            episode = raw[f"episode_{i}"]
            rows = slice(1000 * i, 1000 * (i + 1))
            np.testing.assert_array_equal(data.observations[rows], episode["observations"][:1000])
            np.testing.assert_array_equal(data.actions[rows], episode["actions"][:])
            returns.append(float(np.sum(episode["rewards"][:], dtype=np.float64)))
    assert np.mean(returns) == pytest.approx(9637, abs=1)


def test_environment(root: Path) -> None:
    spec = Minari(ID).environment
    assert (spec.id, spec.max_steps, spec.metric, spec.first_seed) == ("Humanoid-v5", 1000, "return", 100_000)


def test_only_the_first_episodes_are_read(root: Path) -> None:
    read = Minari(ID, episodes=3).load()
    assert read.episode_ends.tolist() == [1000, 2000, 3000]
    assert read.numbers.tolist() == [0, 1, 2]


@pytest.mark.parametrize("episodes", [0, -3])
def test_no_episodes_cannot_be_read(episodes: int) -> None:
    with pytest.raises(UserError, match=f"episodes={episodes}: read at least 1, or None for all"):
        Minari(ID, episodes)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_formats(data_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari")
    if data_format != "hdf5":
        pytest.importorskip("pyarrow")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    rng = np.random.default_rng(0)
    episodes = [
        EpisodeBuffer(
            id=number,
            seed=number,
            observations=list(rng.normal(size=(6, 3)).astype(np.float32)),
            actions=list(rng.normal(size=(5, 1)).astype(np.float32)),
            rewards=[0.0] * 5,
            terminations=[False] * 5,
            truncations=[False] * 4 + [True],
            infos={},
        )
        for number in range(3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it lacks to be published
        minari.create_dataset_from_buffers(
            "toy/walk-v0", buffer=episodes, env=gymnasium.make("Pendulum-v1"), data_format=data_format
        )
    data = Minari("toy/walk-v0").load()
    np.testing.assert_array_equal(data.actions, np.concatenate([episode.actions for episode in episodes]))
    np.testing.assert_array_equal(data.observations, np.concatenate([e.observations[:5] for e in episodes]))
    assert len(data.sha256) == 64
    if data_format != "hdf5":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.delitem(sys.modules, "minari.dataset._storages.arrow_storage")
        with pytest.raises(UserError, match="'toy/walk-v0': pyarrow is not installed"):
            Minari("toy/walk-v0").load()


def test_a_missing_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"'mujoco/humanoid/expert-v0'.*minari download mujoco/humanoid/expert-v0"):
        Minari().load()
    with pytest.raises(UserError, match="minari download"):
        _ = Minari().environment


def copy_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **metadata: Any) -> Path:
    """A dataset of one tiny episode with the real one's metadata, changed."""
    source = shared_data("minari") / ID / "data"
    folder = tmp_path / ID / "data"
    folder.mkdir(parents=True)
    read = json.loads((source / "metadata.json").read_text()) | {"total_episodes": 1, "total_steps": 2}
    (folder / "metadata.json").write_text(json.dumps(read | metadata))
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        episode = file.create_group("episode_0")
        episode.attrs.update({"id": 0, "seed": 0, "total_steps": 2})
        episode["observations"] = np.zeros((3, 348))
        episode["actions"] = np.zeros((2, 17), np.float32)
        episode["rewards"] = np.zeros(2)
        episode["terminations"] = np.zeros(2, bool)
        episode["truncations"] = np.zeros(2, bool)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return folder


def test_a_truncated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_with(tmp_path, monkeypatch)
    assert len(Minari(ID).load().actions) == 2  # the copy is sound until it is cut
    whole = (folder / "main_data.hdf5").read_bytes()
    (folder / "main_data.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="minari download --force") as caught:
        Minari(ID).load()
    assert "\n" not in str(caught.value)


def test_damaged_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_with(tmp_path, monkeypatch)
    (folder / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Minari(ID).load()
    shutil.rmtree(folder)


def test_actions_must_be_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_with(
        tmp_path, monkeypatch, action_space=json.dumps({"type": "Discrete", "n": 4, "start": 0, "dtype": "int64"})
    )
    with pytest.raises(UserError, match="actions are Discrete"):
        Minari(ID).load()


def test_the_environment_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = json.loads(json.loads((shared_data("minari") / ID / "data" / "metadata.json").read_text())["env_spec"])
    copy_with(tmp_path, monkeypatch, env_spec=json.dumps(spec | {"max_episode_steps": None}))
    with pytest.raises(UserError, match="max_episode_steps"):
        _ = Minari(ID).environment


def test_wrappers_around_the_environment_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("Humanoid-v5"))
    for wrapped in (env, gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)):
        assert wrapped.spec is not None
        copy_with(tmp_path / wrapped.class_name(), monkeypatch, env_spec=wrapped.spec.to_json())
        if wrapped is env:  # it only watches
            assert Minari(ID).environment.id == "Humanoid-v5"
    with pytest.raises(UserError, match="recorded in Humanoid-v5 within RescaleAction, and rollouts would be without"):
        _ = Minari(ID).environment
