from __future__ import annotations

import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.environments import make


def test_the_time_limit_is_the_spec_s() -> None:
    env = make(EnvironmentSpec("Hopper-v5", max_steps=3, metric="return", kwargs={"terminate_when_unhealthy": False}))
    env.reset(seed=0)
    truncated = [env.step(env.action_space.sample())[3] for _ in range(3)]
    assert truncated == [False, False, True]
    env.close()


def test_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    spec = EnvironmentSpec("gym_pusht/PushT-v0", 300, "max_reward", extra="pusht", module="gym_pusht")
    with pytest.raises(UserError, match=r"gym_pusht is not installed; run: pip install 'dopr-lightning\[pusht\]'"):
        make(spec)


def test_a_module_of_ones_own_is_in_no_extra() -> None:
    spec = EnvironmentSpec("mine/Robot-v0", 10, "return", module="my_robot_env")
    with pytest.raises(
        UserError, match=r"'mine/Robot-v0' .* module 'my_robot_env', and there is No module named .*; ins"
    ):
        make(spec)


@pytest.mark.parametrize("env_id", ["Hoper-v5", "Hopper-v99", "nobody/Here-v0", "not an id"])
def test_unknown_ids(env_id: str) -> None:
    with pytest.raises(UserError, match=env_id) as caught:
        make(EnvironmentSpec(env_id, 10, "return"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "said"), [("CartPole-v1", "actions are Discrete"), ("Blackjack-v1", "observations")]
)
def test_only_vectors(env_id: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(EnvironmentSpec(env_id, 10, "return"))


STATE, FRAMES = Box(-1, 1, (3,)), Box(0, 255, (8, 9, 3), np.uint8)


class Filmed(gymnasium.Env[Any, Any]):
    """What it observes is up to the test."""

    def __init__(self, observes: Any) -> None:
        self.observation_space = observes
        self.action_space = Box(-1, 1, (1,))


gymnasium.register("DoprFilmed-v0", entry_point=Filmed)  # type: ignore[arg-type]


def filmed(observes: Any, *cameras: str) -> EnvironmentSpec:
    return EnvironmentSpec("DoprFilmed-v0", 10, "return", kwargs={"observes": observes}, cameras=cameras)


def test_a_spec_with_cameras_wants_images() -> None:
    both = Dict({"state": STATE, "images": Dict({"left": FRAMES, "right": FRAMES})})
    for cameras in (("left",), ("right", "left")):
        assert make(filmed(both, *cameras)).observation_space == both
    make(filmed(STATE))


@pytest.mark.parametrize(
    ("observes", "cameras", "said"),
    [
        (STATE, ("left",), "must be a Dict of a flat Box 'state' and a Dict 'images'"),
        (Dict({"state": FRAMES, "images": Dict({"left": FRAMES})}), ("left",), "must be a Dict of a flat Box 'state'"),
        (Dict({"state": STATE, "left": FRAMES}), ("left",), "must be a Dict of a flat Box 'state' and a Dict 'images'"),
        (Dict({"state": STATE, "images": Dict({"right": FRAMES})}), ("left",), "no camera 'left', only right"),
        (Dict({"state": STATE, "images": Dict({"left": STATE})}), ("left",), "'left' must be uint8 of shape"),
        (
            Dict({"state": STATE, "images": Dict({"left": Box(0, 1, (8, 9, 3))})}),
            ("left",),
            r"'left' must be uint8 of shape \(height, width, 3\)",
        ),
        (Dict({"state": STATE, "images": Dict({"left": FRAMES})}), (), "not a flat Box"),
    ],
)
def test_images_that_do_not_fit_the_spec(observes: Any, cameras: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(filmed(observes, *cameras))
