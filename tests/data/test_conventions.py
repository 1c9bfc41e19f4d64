"""What sources say of their numbers, held against the environments and the arrays themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robomimic_file import write
from shared_data import shared_data

from dopr_lightning.data import BuiltinExpert, Convention, Minari, PushT, Source
from dopr_lightning.data.robomimic import KEYS, Robomimic
from dopr_lightning.rollout.environments import make


def assert_bounds(source: Source) -> None:
    """They are the environment's."""
    env: Any = make(source.environment)
    convention = source.convention()
    np.testing.assert_array_equal(np.float32(convention.low), env.action_space.low)
    np.testing.assert_array_equal(np.float32(convention.high), env.action_space.high)
    env.close()


def test_pusht() -> None:
    assert_bounds(PushT())
    state, seen = PushT().convention(), PushT(images=True).convention()
    assert (state.actions, state.rotation) == ("absolute", None)
    assert state.observation_keys == ("agent_x", "agent_y", "block_x", "block_y", "block_angle")
    assert seen.observation_keys == ("agent_x", "agent_y")
    for source in (PushT(), PushT(images=True)):
        assert source.environment.simulators == ("gym-pusht", "pymunk")


def test_mujoco(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(shared_data("minari")))
    for source in (BuiltinExpert(), Minari("mujoco/humanoid/expert-demos-v0")):
        assert_bounds(source)
        assert (source.convention().observation_keys, source.convention().actions) == (("observation",), "native")
        assert source.environment.simulators == ("mujoco",)


@pytest.mark.parametrize("robosuite", ["1.4.1", "1.5.1"])
def test_robomimic(tmp_path: Path, robosuite: str) -> None:
    path = str(write(tmp_path / "low_dim.hdf5", robosuite=robosuite))
    offsets = Robomimic(path=path).convention()
    assert offsets == Convention(KEYS, "relative", "axis_angle", (-1.0,) * 7, (1.0,) * 7)
    poses = Robomimic(path=path, keys=("object",), absolute=True).convention()
    free = (np.inf,) * 9
    assert poses == Convention(("object",), "absolute", "6d", (*np.negative(free), -1.0), (*free, 1.0))
    assert Robomimic(path=path).environment.simulators == ("robosuite", "mujoco")


def test_an_expert_is_known_by_what_decides_its_episodes() -> None:
    """Not by their numbers, which another processor rounds otherwise."""
    digests = [
        BuiltinExpert(episodes=count, seed=seed).load().sha256 for count, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
