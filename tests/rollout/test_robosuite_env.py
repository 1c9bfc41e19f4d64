"""robomimic's tasks in robosuite 1.5, from the env_args of either version of the files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from robomimic_file import env_args, needs_opengl, needs_robosuite, write
from scipy.spatial.transform import Rotation
from torch import Tensor

from dopr_lightning.data.environment import EnvironmentSpec
from dopr_lightning.data.robomimic import Robomimic
from dopr_lightning.data.robomimic.absolute import gripper_poses
from dopr_lightning.data.robomimic.lift import LiftExpert
from dopr_lightning.data.robomimic.rotations import six_from_actions
from dopr_lightning.data.robomimic.simulator import Simulator
from dopr_lightning.errors import UserError
from dopr_lightning.rollout.environments import make
from dopr_lightning.rollout.evaluate import evaluate

pytestmark = needs_robosuite


def spec(tmp_path: Path, robosuite: str = "1.5.1", **options: Any) -> EnvironmentSpec:
    return Robomimic(path=str(write(tmp_path / "low_dim.hdf5", robosuite=robosuite)), **options).environment


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    made = Simulator(env_args())
    yield made
    made.close()


def walk(simulator: Simulator, seed: int, steps: int = 5) -> np.ndarray:
    """A few steps of noise from a seed, and where they lead."""
    simulator.reset(seed)
    for action in np.random.default_rng(0).uniform(-1, 1, (steps, 7)):
        simulator.step(action)
    return simulator.state


def test_an_episode_is_a_function_of_its_seed(simulator: Simulator) -> None:
    """Whatever came before it, and in another instance; the cube's size included."""
    first, scene = walk(simulator, 7), simulator.model
    other = walk(simulator, 8)
    assert np.abs(other - first).max() > 1e-3
    assert simulator.model != scene
    np.testing.assert_array_equal(walk(simulator, 7), first)
    assert simulator.model == scene
    twin = Simulator(env_args())
    np.testing.assert_array_equal(walk(twin, 7), first)
    twin.close()


def test_what_is_observed_is_the_present_state(simulator: Simulator) -> None:
    """Against kinematics; what robosuite's own step returns is up to a control step older."""
    walk(simulator, 7)
    seen = simulator.observe()
    positions, rotations = gripper_poses(simulator.model, simulator.state[None])
    np.testing.assert_allclose(seen["robot0_eef_pos"], positions[0, 0], atol=1e-6)
    site = Rotation.from_quat(seen["robot0_eef_quat_site"]).as_matrix()
    np.testing.assert_allclose(site, rotations[0, 0], atol=1e-5)
    cube = simulator.state[1 + 9 : 1 + 12]
    np.testing.assert_allclose(seen["object"][:3], cube, atol=1e-12)
    np.testing.assert_allclose(seen["object"][7:], cube - seen["robot0_eef_pos"], atol=1e-12)


def test_old_settings_move_the_arm_as_new_ones_do(simulator: Simulator) -> None:
    """A controller of robosuite 1.4, converted; and the sign of its gripper_to_cube_pos."""
    old = Simulator(env_args("1.4.1"))
    np.testing.assert_array_equal(walk(old, 7), walk(simulator, 7))
    then, now = old.observe()["object"], simulator.observe()["object"]
    np.testing.assert_array_equal(then, [*now[:7], *-now[7:]])
    old.close()


def test_object_poses_in_the_order_of_either_version() -> None:
    """Can: 1.4 had world pose, relative pose, of the same moment; 1.5 has relative pose, world pose."""
    old, new = Simulator(env_args("1.4.1", "PickPlaceCan")), Simulator(env_args("1.5.1", "PickPlaceCan"))
    for one in (old, new):
        walk(one, 3)
    np.testing.assert_array_equal(old.state, new.state)
    then, now = old.observe(), new.observe()
    np.testing.assert_array_equal(then["object"][:7], now["object"][7:])
    # The can does not move, so that the poses of two moments are alike.
    np.testing.assert_allclose(then["object"][7:], now["object"][:7], atol=1e-5)
    hand = Rotation.from_quat(then["robot0_eef_quat"])
    relative = hand.inv().apply(then["object"][:3] - then["robot0_eef_pos"])
    np.testing.assert_allclose(then["object"][7:10], relative, atol=1e-6)
    old.reset(4)
    new.reset(4)
    np.testing.assert_allclose(
        new.observe()["object"][:7], old.observe()["object"][7:], atol=1e-9
    )  # from the first step
    old.close()
    new.close()


def test_absolute_actions_are_reached(tmp_path: Path) -> None:
    """A pose with a 6-D rotation, held for three seconds, is where the gripper then is."""
    env = make(spec(tmp_path, absolute=True, keys=("robot0_eef_pos", "robot0_eef_quat_site")))
    assert env.action_space.shape == (10,)
    seen, _ = env.reset(seed=5)
    position = seen[:3] + np.array([0.03, -0.04, 0.05])
    turned = Rotation.from_rotvec([0.02, -0.04, 0.08]) * Rotation.from_quat(seen[3:])
    action = six_from_actions(np.concatenate([position, turned.as_rotvec(), [-1.0]]))
    for _ in range(60):
        seen, *_ = env.step(action.astype(np.float32))
    np.testing.assert_allclose(seen[:3], position, atol=2e-3)
    assert (Rotation.from_quat(seen[3:]).inv() * turned).magnitude() < 0.01
    env.close()


def test_two_arms(tmp_path: Path) -> None:
    """Transport with its old name for two facing robots; the second moves along the world's axes, not its own."""
    args = env_args("1.4.1", "TwoArmTransport", robots=["Panda", "Panda"], env_configuration="single-arm-opposed")
    one = Simulator(args)
    one.reset(0)
    before = one.observe()["robot1_eef_pos"]
    action = np.zeros(14)
    action[7] = 1.0
    for _ in range(5):
        one.step(action)
    moved = one.observe()["robot1_eef_pos"] - before
    assert moved[0] > 0.04 > 5 * np.abs(moved[1:]).max()
    one.close()


class Expert:
    """Lift's script as a policy, on the observations a policy gets."""

    observe, act, observation_dim, action_dim = 2, 3, 19, 7

    def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        latest = observations[:, -1].numpy().astype(float)
        names = ("cube_pos", "cube_quat", "gripper_to_cube_pos", "robot0_eef_pos", "robot0_eef_quat")
        actions = []
        for parts in zip(*np.split(latest, [3, 7, 10, 13, 17], axis=1), strict=True):
            seen = dict(zip([*names, "robot0_gripper_qpos"], parts, strict=True))
            actions.append(LiftExpert(np.random.default_rng(0)).act(seen))
        return torch.tensor(np.array(actions))[:, None].expand(-1, self.act, -1)


def test_a_policy_that_can_do_it_succeeds(tmp_path: Path) -> None:
    """Through evaluate(): success ends an episode and is worth 1, failure is worth 0 after max_steps."""
    task = spec(tmp_path, max_steps=80)
    episodes = evaluate(Expert(), task, [100_000, 100_001], num_envs=1)
    for episode in episodes:
        assert (episode.value, episode.return_, episode.success) == (1.0, 1.0, True)
        assert episode.length < 80

    class Idle(Expert):
        def predict(self, observations: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
            return torch.zeros(len(observations), self.act, self.action_dim)

    (idle,) = evaluate(Idle(), spec(tmp_path, max_steps=7), [100_000])
    assert (idle.value, idle.success, idle.length) == (0.0, False, 7)


def test_observations_are_side_by_side_as_in_the_data(tmp_path: Path, simulator: Simulator) -> None:
    keys = ("robot0_gripper_qpos", "object", "robot0_eef_pos")
    env = make(spec(tmp_path, keys=keys))
    seen, _ = env.reset(seed=11)
    simulator.reset(11)
    wanted = simulator.observe()
    np.testing.assert_array_equal(seen, np.concatenate([wanted[key] for key in keys]).astype(np.float32))
    assert env.observation_space.shape == (15,)
    assert env.action_space.shape == (7,)
    env.close()


def test_what_the_simulator_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="robosuite observes no 'robot0_eef_vel_lin'; choose keys from: cube_pos, "):
        make(spec(tmp_path, keys=("object", "robot0_eef_vel_lin")))
    with pytest.raises(UserError, match=r"robosuite 1\.5\.\d has no task 'Lifting'"):
        Simulator(env_args(name="Lifting"))
    with pytest.raises(UserError, match=r"cannot make the Lift of env_args: .*bicycle"):
        Simulator(env_args(bicycle=True))


@pytest.mark.parametrize("package", ["robosuite", "mujoco"])
def test_wrong_versions(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    monkeypatch.setattr(sys.modules[package], "__version__", {"robosuite": "1.4.1", "mujoco": "4.0.0"}[package])
    with pytest.raises(UserError, match=rf"{package} (1.4.1|4.0.0) is installed.*dopr-lightning\[robomimic\]"):
        make(spec(tmp_path))


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(UserError, match=r"robosuite is not installed; run: pip install 'dopr-lightning\[robomimic\]'"):
        make(spec(tmp_path))


@needs_opengl
def test_images_and_films(tmp_path: Path) -> None:
    """Beside the state, and what the camera sees: upright, the bright table below the wall at the back."""
    task = spec(tmp_path, keys=("robot0_eef_pos",))
    seen = {"images": {"agentview": 84}, "render_mode": "rgb_array"}
    env = make(replace(task, cameras=("agentview",), kwargs=task.kwargs | seen))
    observation, _ = env.reset(seed=0)
    assert observation["state"].shape == (3,)
    frame, film = observation["images"]["agentview"], env.render()
    assert (frame.shape, film.shape) == ((84, 84, 3), (256, 256, 3))
    assert frame[42:].mean() > frame[:16].mean()
    assert film[128:].mean() > film[:48].mean()
    moved, *_ = env.step(np.array([1, 0, 0, 0, 0, 0, 0], np.float32))
    assert np.abs(moved["images"]["agentview"].astype(float) - frame).max() > 50
    env.close()
