from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from dopr_lightning.errors import UserError
from dopr_lightning.policies.algorithms import Algorithm, FlowMatching, Regression
from dopr_lightning.policies.networks import ActionNetwork, ResidualMLP
from dopr_lightning.policies.regression import regression_loss

OBS, A, TO, T, B = 5, 3, 2, 4, 6


def build(algorithm: Algorithm) -> ActionNetwork:
    torch.manual_seed(0)
    return ResidualMLP(OBS, A, TO, T, denoise=algorithm.denoises, width=16, depth=1)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, TO, OBS, generator=generator), torch.randn(B, T, A, generator=generator)


def test_regression_loss_is_least_at_the_conditional_mean() -> None:
    actions = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64)
    guess = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = regression_loss(lambda c: guess.expand(2, 1, 1), actions, None)
    assert loss.item() == 1.0
    assert torch.autograd.grad(loss, guess)[0].item() == 0.0


def test_flow_loss_draws_its_noise_from_the_generator_alone() -> None:
    algorithm = FlowMatching()
    network = build(algorithm)
    observation, action = batch()
    first = algorithm.loss(network, observation, action, *generators(3))
    torch.rand(7)  # the global stream moves on; nothing here depends on it
    state = torch.get_rng_state()
    assert torch.equal(algorithm.loss(network, observation, action, *generators(3)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(algorithm.loss(network, observation, action, *generators(4)), first)


def test_regression_matches_its_formula() -> None:
    algorithm = Regression()
    network = build(algorithm)
    observation, action = batch()
    loss = algorithm.loss(network, observation, action, *generators(0))
    prediction = algorithm.sample(network, observation, (B, T, A), [])
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction, action))


def test_a_rows_noise_depends_on_its_own_generator_alone() -> None:
    algorithm = FlowMatching(steps=3, start="noise")
    network = build(algorithm).double()
    observation = batch()[0].double()
    together = algorithm.sample(network, observation, (B, T, A), generators(*range(B)))
    for row in (0, 4):
        alone = algorithm.sample(network, observation[row : row + 1], (1, T, A), generators(row))
        torch.testing.assert_close(alone[0], together[row])
    assert not torch.allclose(together[0], together[1])
    assert together.dtype == torch.float64


def test_starting_from_zeros_is_deterministic() -> None:
    algorithm = FlowMatching()
    network = build(algorithm)
    observation = batch()[0]
    first = algorithm.sample(network, observation, (B, T, A), generators(*range(B)))
    assert torch.equal(algorithm.sample(network, observation, (B, T, A), []), first)
    assert not first.requires_grad


def test_wrong_number_of_generators() -> None:
    algorithm = FlowMatching(start="noise")
    with pytest.raises(ValueError, match="6 rows need as many generators, got 2"):
        algorithm.sample(build(algorithm), batch()[0], (B, T, A), generators(0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "steps must be at least 1, got 0"), ({"start": "ones"}, "one of zeros, noise, got 'ones'")],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowMatching(**arguments)


@pytest.mark.parametrize(("built_for", "used_by"), [(FlowMatching(), Regression()), (Regression(), FlowMatching())])
def test_network_of_the_other_algorithm_is_refused(built_for: Algorithm, used_by: Algorithm) -> None:
    with pytest.raises(UserError, match="set denoise"):
        used_by.loss(build(built_for), *batch(), *generators(0))


def test_constructible_from_a_configuration() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    parser.add_argument("--network", type=ActionNetwork)
    home = "dopr_lightning.policies"
    config = parser.parse_object(
        {
            "algorithm": {"class_path": f"{home}.algorithms.FlowMatching", "init_args": {"steps": 3, "start": "noise"}},
            "network": {
                "class_path": f"{home}.networks.ConditionalUnet1d",
                "init_args": {
                    "observation_dim": OBS,
                    "action_dim": A,
                    "observe": TO,
                    "horizon": T,
                    "denoise": True,
                    "channels": [8, 16],
                },
            },
        }
    )
    built = parser.instantiate_classes(config)
    assert (built.algorithm.steps, built.algorithm.start) == (3, "noise")
    out = built.algorithm.sample(built.network, batch()[0], (B, T, A), generators(*range(B)))
    assert out.shape == (B, T, A)


@pytest.mark.parametrize("algorithm", [FlowMatching(), Regression()])
def test_training_reduces_the_error(algorithm: Algorithm) -> None:
    """Learn a deterministic map of the observation; sampled from zeros, both algorithms then return it."""
    network = build(algorithm)
    generator = torch.Generator().manual_seed(5)
    observation = torch.randn(256, TO, OBS, generator=generator)
    weight = torch.randn(TO * OBS, T * A, generator=generator) / (TO * OBS) ** 0.5
    action = (observation.flatten(1) @ weight).unflatten(1, (T, A))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(300):
        loss = algorithm.loss(network, observation, action, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (algorithm.sample(network, observation, (256, T, A), []) - action).square().mean()
    assert error < 0.1 * action.square().mean()
