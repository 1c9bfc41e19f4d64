"""A policy rebuilt from its checkpoint alone acts as the rollouts did that judged it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from toy_environment import SPEC
from toy_task import CONFIG, ToyTask, train
from toy_views import VIEWS, ToyViews

from dopr_lightning import load_policy
from dopr_lightning.data import Convention
from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.deploy import DeployedPolicy, speed
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.environments import make
from dopr_lightning.rollout.evaluate import Episode, evaluate

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    train(folder, "--trainer.max_steps=8")
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    train(folder, *VIEWS, "--trainer.max_steps=4")
    return folder / "last.ckpt"


class Bounded(ToyTask):
    """The toy task, that says what its environment takes."""

    def convention(self) -> Convention:
        return Convention(low=(-1.0,), high=(1.0,))


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounded")
    train(folder, "--data.source=test_deploy.Bounded", "--trainer.max_steps=8")
    return folder / "last.ckpt"


def drive(policy: DeployedPolicy, env: gymnasium.Env[Any, Any], seed: int) -> float:
    """An episode's return, as the README plays it."""
    policy.reset(seed)
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(policy.act(observation))
        total += float(reward)
        over = terminated or truncated
    return total


def test_an_episode_is_worth_what_it_was_in_the_evaluation(bounded: Path) -> None:
    """The toy environment takes nothing out of bounds, and the policy asks for it."""
    policy, env = load_policy(bounded), make(SPEC)
    episodes = evaluate(load_policy(bounded).policy, SPEC, [40, 45, 47], num_envs=1)
    assert all(np.abs(episode.actions).max() > 1 for episode in episodes)
    assert [drive(policy, env, episode.seed) for episode in episodes] == [episode.return_ for episode in episodes]


def test_the_bounds_are_of_each_number_of_an_action() -> None:
    class Far:
        observe, act, observation_dim, action_dim, cameras = 1, 1, 1, 3, ()
        device = torch.device("cpu")

        def predict(self, observations: Any, generators: Any) -> torch.Tensor:
            return torch.tensor([[[-9.0, 0.5, 9.0]]])

    def acted(**bounds: Any) -> list[float]:
        action = DeployedPolicy(Far(), record={"action": bounds}).act(np.zeros(1))
        assert action.dtype == np.float32
        return action.tolist()

    assert acted(low=[-1.0, -1.0, -np.inf], high=[1.0, 0.25, np.inf]) == [-1, 0.25, 9]
    assert acted(low=None, high=[1.0, 0.25, 1.0]) == [-9, 0.25, 1]
    assert acted() == [-9, 0.5, 9]


def test_an_action_that_is_not_finite_does_not_reach_the_robot() -> None:
    class Diverged:
        observe, act, observation_dim, action_dim, cameras = 1, 2, 1, 1, ()
        device = torch.device("cpu")

        def predict(self, observations: Any, generators: Any) -> torch.Tensor:
            return torch.tensor([[[0.5], [np.nan]]])

    policy = DeployedPolicy(Diverged(), record={"action": {"low": [-1.0], "high": [1.0]}})
    policy.act(np.zeros(1))
    with pytest.raises(UserError, match="action is not finite; the training diverged"):
        policy.act(np.zeros(1))


def by_act(policy: DeployedPolicy, spec: EnvironmentSpec, seed: int) -> np.ndarray:
    """An episode as a user of the policy would write it."""
    env: gymnasium.Env[Any, Any] = make(spec)
    policy.reset(seed)
    observation, _ = env.reset(seed=seed)
    actions, over = [], False
    while not over:
        actions.append(policy.act(observation))
        clipped = np.clip(actions[-1], env.action_space.low, env.action_space.high)  # type: ignore[attr-defined]
        observation, _, terminated, truncated, _ = env.step(clipped)
        over = terminated or truncated
    env.close()
    return np.array(actions)


@pytest.mark.parametrize("kind", ["state", "images"])
def test_an_episode_by_act_is_that_of_the_evaluation(kind: str, request: pytest.FixtureRequest) -> None:
    """Seed 45's episode of 4 steps ends with a prediction; that of seed 44 lasts 3, and leaves one action over."""
    path, spec = request.getfixturevalue(kind), SPEC if kind == "state" else ToyViews().environment
    policy = load_policy(path)
    other = load_policy(path).policy  # nothing shared
    for seed in (44, 45, 47):
        expected: Episode
        (expected,) = evaluate(other, spec, [seed], num_envs=1)
        np.testing.assert_array_equal(by_act(policy, spec, seed), expected.actions)
    assert not np.array_equal(by_act(policy, spec, 45)[:3], by_act(policy, spec, 44)[:3])


def test_it_acts_with_the_average_in_eval_mode(state: Path) -> None:
    saved = torch.load(state, weights_only=True)
    policy: Any = load_policy(state).policy
    assert not policy.training
    for name, value in policy.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
    assert not torch.equal(saved["current_model_state"]["network.input.weight"], policy.network.input.weight)


def test_demonstrations_and_simulator_may_be_elsewhere(state: Path) -> None:
    """In a process that knows neither the toy's demonstrations nor its environment."""
    code = (
        "import sys, numpy; from dopr_lightning import load_policy; policy = load_policy(sys.argv[1]); "
        "print(policy.act(numpy.array([1.0, 0.0])).shape, sorted({'mujoco', 'toy_task'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(state)], capture_output=True, text=True, check=True)
    assert done.stdout == "(1,) []\n"


def test_the_caller_may_write_to_what_it_gave(state: Path) -> None:
    one, other = load_policy(state), load_policy(state)
    buffer = np.zeros(2)
    for step in range(6):
        buffer[:] = [1.0, step]
        action = one.act(buffer)
        buffer[:] = 99.0
        np.testing.assert_array_equal(action, other.act(np.array([1.0, step])))


def test_a_reset_begins_anew(state: Path) -> None:
    policy = load_policy(state)

    def play(seed: int) -> list[np.ndarray]:
        policy.reset(seed)
        return [policy.act(np.array([1.0, step])) for step in range(3)]

    first = play(0)
    assert not np.array_equal(first, play(1))
    np.testing.assert_array_equal(first, play(0))


VIEW = np.zeros((12, 12, 3), np.uint8)
WRONG: list[tuple[str, Any, str]] = [
    ("state", np.zeros(3), r"shape \(2,\) \(observation\), and got \(3,\); one observation, not a batch"),
    ("state", np.zeros((1, 2)), r"got \(1, 2\)"),
    ("state", np.array([0.0, np.nan]), "state 1 is not finite"),
    ("state", (np.zeros(2), {}), r"needs numbers .* got tuple; give what reset\(\) or step\(\) observed"),
    ("state", {"state": np.zeros(2)}, "observes a vector and no images"),
    ("images", np.zeros(2), "observes {'state'.*got no dictionary"),
    ("images", {"state": np.zeros(2)}, "got keys state; give it both"),
    ("images", {"state": np.zeros(2), "images": VIEW}, "images by camera, and got ndarray; give {'front': ...}"),
    ("images", {"state": np.zeros(2), "images": {"top": VIEW}}, "needs images of camera 'front', and got top"),
    ("images", {"state": np.zeros(2), "images": {"front": VIEW[:8]}}, r"\(12, 12, 3\), uint8, and got \(8, 12, 3\)"),
    ("images", {"state": np.zeros(2), "images": {"front": VIEW / 255}}, "uint8, and got .*float64"),
]


@pytest.mark.parametrize(("kind", "observation", "said"), WRONG, ids=[said for _, _, said in WRONG])
def test_a_wrong_observation_is_refused(kind: str, observation: Any, said: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match=said):
        load_policy(request.getfixturevalue(kind)).act(observation)


def test_its_speed_is_said(images: Path) -> None:
    policy = load_policy(images)
    assert re.fullmatch(
        r"\S+ ms per prediction of 2 actions, \S+ actions per second on cpu \(median of [1-9]\d* after 3 to warm up\)",
        speed(policy.policy, {"front": (12, 12)}),
    )


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_not_the_checkpoints_fault(device: str, state: Path) -> None:
    with pytest.raises(UserError, match=f"^device='{device}': .*; device='cpu' is everywhere"):
        load_policy(state, device)


def test_what_is_no_checkpoint_of_ours_is_refused(state: Path, tmp_path: Path) -> None:
    held = torch.load(state, weights_only=True)
    other = tmp_path / "other.ckpt"
    for change, said in (
        ({"dopr": None}, "does not say which configuration.*--config FILES --ckpt_path .*load_from_checkpoint"),
        ({"dopr": held["dopr"] | {"format": 2}}, "in format 2, .* reads 1; install dopr-lightning=="),
        ({"dopr": held["dopr"] | {"policy": {"class": "nowhere.Policy"}}}, "nowhere.Policy, which cannot be imported"),
        ({"hyper_parameters": {}}, "made of objects in Python"),
    ):
        torch.save(held | change, other)
        with pytest.raises(UserError, match=said):
            load_policy(other)
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / ".metadata").touch()
    for path, said in (
        (tmp_path / "none.ckpt", "no such file"),
        (tmp_path / "text.ckpt", "damaged"),
        (tmp_path, "a folder, not a file"),
        ("", r"^\.: a folder, not a file"),
        (tmp_path / "sharded", "a folder of shards"),
    ):
        with pytest.raises(UserError, match=said):
            load_policy(path)
    assert Path(CONFIG).is_file()
