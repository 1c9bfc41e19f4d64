from __future__ import annotations

import sys
from pathlib import Path

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
        torch.nn.ReLU(),
        torch.nn.Linear(16, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, out_features),
    )


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random network in place of the shipped experts."""
    save_file(network(11, 3).state_dict(), tmp_path / "Hopper-v5.safetensors", {"env_id": "Hopper-v5"})
    monkeypatch.setattr(experts, "DIRECTORY", tmp_path)
    return tmp_path / "Hopper-v5.safetensors"


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
    space = gymnasium.spaces.Box(np.array([-1, -2, 0], np.float32), np.array([1, 3, 0.5], np.float32))
    expert = Expert.load(tmp_path / "expert.safetensors", space)
    observation = np.random.default_rng(0).normal(size=11) * 3
    with torch.no_grad():
        unit = torch.tanh(reference(torch.from_numpy(observation).float())).numpy()
    expected = [unit[0], 0.5 + 2.5 * unit[1], 0.25 + 0.25 * unit[2]]  # middle + half range
    np.testing.assert_allclose(expert.act(observation), expected, rtol=1e-5, atol=1e-6)


def test_actions_replay_to_the_observations(hopper: Path) -> None:
    data = BuiltinExpert("Hopper-v5", episodes=3, seed=7).load()
    env = gymnasium.make("Hopper-v5")
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


def test_demonstrations_are_a_function_of_the_seed(hopper: Path) -> None:
    one, same, other = (BuiltinExpert("Hopper-v5", episodes=2, seed=seed).load() for seed in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256
    np.testing.assert_array_equal(one.observations, same.observations)
    np.testing.assert_array_equal(one.actions[one.episode_ends[0] :], other.actions[: other.episode_ends[0]])


def test_environment(hopper: Path) -> None:
    spec = BuiltinExpert("Hopper-v5").environment
    assert (spec.id, spec.max_steps, spec.metric) == ("Hopper-v5", 1000, "return")


def test_no_such_expert(hopper: Path) -> None:
    with pytest.raises(UserError, match=r"'Ant-v5'; choose one of: Hopper-v5"):
        BuiltinExpert("Ant-v5").load()
    with pytest.raises(UserError, match="at least 1"):
        BuiltinExpert("Hopper-v5", episodes=0).load()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_damaged_expert(hopper: Path, content: bytes) -> None:
    hopper.write_bytes(content)
    with pytest.raises(UserError, match="not an expert"):
        BuiltinExpert("Hopper-v5").load()


def test_export_reads_back(tmp_path: Path) -> None:
    """The recipe's exporter, on a stand-in with Stable-Baselines3's attribute names."""

    class Actor:
        latent_pi = network(11, 3)[:4]
        mu = network(11, 3)[4]

    class Policy:
        actor = Actor()

    class Model:
        policy = Policy()

    recipe.export(Model(), tmp_path / "expert.safetensors", {"env_id": "Hopper-v5"})
    tensors = load_file(tmp_path / "expert.safetensors")
    for name, value in network(11, 3).state_dict().items():
        assert torch.equal(tensors[name], value)
    with safe_open(tmp_path / "expert.safetensors", "numpy") as held:
        assert held.metadata() == {"env_id": "Hopper-v5"}


def test_the_recipe_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(UserError, match=r"dopr-lightning\[expert\]"):
        recipe.main(["--env", "Hopper-v5", "--output", str(tmp_path / "x.safetensors")])
