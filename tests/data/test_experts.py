from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dopr_lightning.data import BuiltinExpert, experts
from dopr_lightning.data.experts import recipe
from dopr_lightning.data.experts.expert import Expert
from dopr_lightning.errors import UserError

# The real files, before any test replaces the folder.
SHIPPED = experts.shipped()


def network(in_features: int, out_features: int) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(in_features, 16),
        torch.nn.Tanh(),
        torch.nn.Linear(16, 16),
        torch.nn.Tanh(),
        torch.nn.Linear(16, out_features),
    )


@pytest.fixture
def walker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random network in place of the shipped experts."""
    save_file(network(17, 6).state_dict(), tmp_path / "Walker2d-v5.safetensors", {"env_id": "Walker2d-v5"})
    monkeypatch.setattr(experts, "DIRECTORY", tmp_path)
    return tmp_path / "Walker2d-v5.safetensors"


def test_an_expert_ships() -> None:
    assert SHIPPED, "no expert ships with the package; make one with dopr_lightning.data.experts.recipe"


@pytest.mark.parametrize("env_id", SHIPPED)
def test_shipped_experts_are_good_and_small(env_id: str) -> None:
    file = SHIPPED[env_id]
    assert file.stat().st_size < 200_000
    returns = recipe.evaluate(file, env_id)
    assert len(returns) == 20
    assert np.mean(returns) >= 3000
    with safe_open(file, "numpy") as held:
        metadata = held.metadata()
    assert metadata["env_id"] == env_id
    assert {"hidden", "mean_return", "recipe", "versions"} <= set(metadata)
    assert float(metadata["mean_return"]) == pytest.approx(np.mean(returns), rel=0.1)  # another CPU rounds otherwise


def test_the_network_equals_torch(tmp_path: Path) -> None:
    reference = network(11, 3)
    save_file(reference.state_dict(), tmp_path / "expert.safetensors")
    space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    expert = Expert.load(tmp_path / "expert.safetensors", space)
    observation = np.random.default_rng(0).normal(size=11) * 3
    with torch.no_grad():
        expected = reference(torch.from_numpy(observation).float()).numpy()
    action = expert.act(observation)
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, expected, rtol=1e-5, atol=1e-6)


def test_the_action_bounds_clip(tmp_path: Path) -> None:
    reference = network(11, 3)
    with torch.no_grad():
        reference[4].weight.zero_()
        reference[4].bias.copy_(torch.tensor([-5.0, 2.5, 5.0]))
    save_file(reference.state_dict(), tmp_path / "expert.safetensors")
    space = gymnasium.spaces.Box(np.array([-1, -2, 0], np.float32), np.array([1, 3, 0.5], np.float32))
    expert = Expert.load(tmp_path / "expert.safetensors", space)
    np.testing.assert_array_equal(expert.act(np.ones(11)), np.array([-1, 2.5, 0.5], np.float32))


def test_actions_replay_to_the_observations(walker: Path) -> None:
    data = BuiltinExpert("Walker2d-v5", episodes=3, seed=7).load()
    env = gymnasium.make("Walker2d-v5")
    starts = [0, *data.episode_ends[:-1]]
    for i, (start, end) in enumerate(zip(starts, data.episode_ends, strict=True)):
        observation, _ = env.reset(seed=7 + i)
        over = False
        for step in range(start, end):
            assert not over
            np.testing.assert_array_equal(observation.astype(np.float32), data.observations[step])
            observation, _, terminated, truncated, _ = env.step(data.actions[step])
            over = terminated or truncated
        assert over  # the whole episode
    env.close()


def test_demonstrations_are_a_function_of_the_seed(walker: Path) -> None:
    one, same, other = (BuiltinExpert("Walker2d-v5", episodes=2, seed=seed).load() for seed in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256
    np.testing.assert_array_equal(one.observations, same.observations)
    np.testing.assert_array_equal(one.actions[one.episode_ends[0] :], other.actions[: other.episode_ends[0]])


def test_environment(walker: Path) -> None:
    spec = BuiltinExpert().environment
    assert (spec.id, spec.max_steps, spec.metric) == ("Walker2d-v5", 1000, "return")


def test_no_such_expert(walker: Path) -> None:
    with pytest.raises(UserError, match=r"'Ant-v5'; choose one of: Walker2d-v5"):
        BuiltinExpert("Ant-v5").load()
    with pytest.raises(UserError, match="at least 1"):
        BuiltinExpert("Walker2d-v5", episodes=0).load()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_expert(walker: Path, content: bytes) -> None:
    walker.write_bytes(content)
    with pytest.raises(UserError, match="not an expert"):
        BuiltinExpert("Walker2d-v5").load()


def stand_in(reference: torch.nn.Sequential) -> SimpleNamespace:
    """A PPO model as far as the recipe looks: Stable-Baselines3's attribute names."""
    extractor = SimpleNamespace(policy_net=reference[:4])
    return SimpleNamespace(policy=SimpleNamespace(mlp_extractor=extractor, action_net=reference[4]))


def test_export_folds_the_normalisation(tmp_path: Path) -> None:
    """The file on raw observations equals the policy on normalised ones."""
    reference = network(11, 3)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    rng = np.random.default_rng(0)
    mean, var = rng.normal(size=11) * 3, 10 ** rng.uniform(-2, 2, 11)
    recipe.export(stand_in(reference), mean, var, tmp_path / "expert.safetensors", {"env_id": "Walker2d-v5"})

    with safe_open(tmp_path / "expert.safetensors", "numpy") as held:
        assert held.metadata() == {"env_id": "Walker2d-v5"}
    tensors = load_file(tmp_path / "expert.safetensors")
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        name: (value.shape, value.dtype) for name, value in before.items()
    }
    for name, value in reference.state_dict().items():
        assert torch.equal(value, before[name]), "the model itself must not change"

    space = gymnasium.spaces.Box(-0.1, 0.1, (3,), np.float32)
    expert = Expert.load(tmp_path / "expert.safetensors", space)
    normalised = rng.normal(size=(50, 11))
    with torch.no_grad():
        unclipped = reference(torch.from_numpy(normalised).float()).numpy()
    assert 0 < (abs(unclipped) > 0.1).mean() < 1  # both kinds occur
    actions = [expert.act(x) for x in mean + normalised * np.sqrt(var + 1e-8)]
    np.testing.assert_allclose(actions, np.clip(unclipped, -0.1, 0.1), rtol=1e-4, atol=1e-5)


def test_finish_adds_the_mean_return(tmp_path: Path) -> None:
    output = tmp_path / "expert.safetensors"
    trained = recipe.Trained(stand_in(network(17, 6)), np.zeros(17), np.ones(17))
    returns = recipe.finish(trained, output, {"env_id": "Walker2d-v5"})
    assert returns == recipe.evaluate(output, "Walker2d-v5")
    with safe_open(output, "numpy") as held:
        assert held.metadata() == {"env_id": "Walker2d-v5", "mean_return": f"{np.mean(returns):.1f}"}
    assert list(tmp_path.iterdir()) == [output]
    assert output.stat().st_mode & 0o777 == 0o644


def test_the_recipe_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(UserError, match=r"dopr-lightning\[expert\]"):
        recipe.main(["--env", "Walker2d-v5", "--output", str(tmp_path / "x.safetensors")])
