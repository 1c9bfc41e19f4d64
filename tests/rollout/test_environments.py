from __future__ import annotations

import sys

import pytest

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
