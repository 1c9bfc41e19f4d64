from __future__ import annotations

import runpy
import sys
from typing import get_args

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from dopr_lightning.errors import UserError
from dopr_lightning.policies import algorithms, diffusion
from dopr_lightning.policies.algorithms import Algorithm, Diffusion, FlowMatching, Regression
from dopr_lightning.policies.diffusion import Prediction, Sampler
from dopr_lightning.policies.networks import ActionNetwork, ResidualMLP

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
    loss = Regression().loss(lambda *_: guess.expand(2, 1, 1), torch.zeros(2, 1, 1), actions, *generators(0))
    assert loss.item() == 1.0
    assert torch.autograd.grad(loss, guess)[0].item() == 0.0


@pytest.mark.parametrize("algorithm", [FlowMatching(), Diffusion()], ids=["flow", "diffusion"])
def test_loss_draws_its_noise_from_the_generator_alone(algorithm: Algorithm) -> None:
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


SAMPLERS = {
    "flow": FlowMatching(steps=3, start="noise"),
    "ddpm": Diffusion(100, 10, "ddpm"),
    "ddim": Diffusion(100, 10, "ddim"),
    "ddim with noise": Diffusion(100, 10, "ddim", eta=0.5),
}
samplers = pytest.mark.parametrize("algorithm", SAMPLERS.values(), ids=SAMPLERS)


@samplers
def test_a_rows_noise_depends_on_its_own_generator_alone(algorithm: Algorithm) -> None:
    network = build(algorithm).double()
    observation = batch()[0].double()
    state = torch.get_rng_state()
    together = algorithm.sample(network, observation, (B, T, A), generators(*range(B)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(algorithm.sample(network, observation, (B, T, A), generators(*range(B))), together)
    for row in (0, 4):
        alone = algorithm.sample(network, observation[row : row + 1], (1, T, A), generators(row))
        torch.testing.assert_close(alone[0], together[row])
    # Rows with one observation differ by their noise, and by nothing else.
    same = observation[:1].expand(3, -1, -1)
    rows = algorithm.sample(network, same, (3, T, A), generators(0, 1, 0))
    torch.testing.assert_close(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1])
    assert together.dtype == torch.float64
    assert not together.requires_grad


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_how_much_noise_each_sampler_draws(eta: float) -> None:
    """One chunk to begin with; another at every step (DDPM: but the last) where the steps have noise."""

    def drawn(algorithm: Algorithm) -> float:
        """Chunks, by where the generator stands afterwards."""
        used, fresh = generators(7, 7)
        algorithm.sample(build(algorithm), batch()[0][:1], (1, T, A), [used])
        for count in range(20):
            if torch.equal(used.get_state(), fresh.get_state()):
                return count
            torch.randn(T, A, generator=fresh)
        raise AssertionError

    assert drawn(FlowMatching(start="noise")) == 1
    assert drawn(Diffusion(100, 10, "ddpm")) == 10
    assert drawn(Diffusion(100, 10, "ddim", eta=eta)) == (11 if eta else 1)


@pytest.mark.parametrize("sampler", get_args(Sampler))
@pytest.mark.parametrize("clip", [True, False])
def test_clipping_keeps_actions_within_their_range(sampler: Sampler, clip: bool) -> None:
    algorithm = Diffusion(100, 10, sampler, clip=clip)
    action = algorithm.sample(build(algorithm), batch()[0], (B, T, A), generators(*range(B)))
    assert (action.abs().max() <= 1) == clip


def test_starting_from_zeros_is_deterministic() -> None:
    algorithm = FlowMatching()
    network = build(algorithm)
    observation = batch()[0]
    first = algorithm.sample(network, observation, (B, T, A), generators(*range(B)))
    assert torch.equal(algorithm.sample(network, observation, (B, T, A), []), first)
    assert not first.requires_grad


@samplers
def test_wrong_number_of_generators(algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match="6 rows need as many generators, got 2"):
        algorithm.sample(build(algorithm), batch()[0], (B, T, A), generators(0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "steps must be at least 1, got 0"), ({"start": "ones"}, "one of zeros, noise, got 'ones'")],
)
def test_bad_arguments_of_flow_matching(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^FlowMatching: .*{message}"):
        FlowMatching(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_steps": 0}, "train_steps must be at least 1, got 0"),
        ({"sample_steps": 0}, "sample_steps must be from 1 to train_steps=100, got 0"),
        ({"train_steps": 50}, "sample_steps must be from 1 to train_steps=50, got 100"),
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, got 'euler'"),
        ({"prediction": "v_prediction"}, "prediction must be one of epsilon, sample, v, got 'v_prediction'"),
        ({"sampler": "ddim", "eta": 1.5}, "eta must be from 0 to 1, got 1.5"),
        ({"sampler": "ddim", "eta": -0.1}, "eta must be from 0 to 1, got -0.1"),
        ({"eta": 0.5}, "eta=0.5 is for the sampler ddim"),
        # The stride is 1, so that 60 of 100 begin at step 59; or 25, and 4 begin at step 75.
        ({"sample_steps": 60}, "begin at step 59, where x still holds 0.58 of the action; take all of them, or a"),
        ({"sample_steps": 4, "sampler": "ddim"}, "begin at step 75, where x still holds 0.37 of the action"),
    ],
)
def test_bad_arguments_of_diffusion(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^Diffusion: .*{message}"):
        Diffusion(**arguments)


@pytest.mark.parametrize(
    ("train_steps", "sample_steps"), [(100, 5), (100, 16), (100, 50), (50, 16), (1000, 16), (1, 1)]
)
def test_numbers_of_steps_in_use(train_steps: int, sample_steps: int) -> None:
    Diffusion(train_steps, sample_steps)


def test_who_does_not_use_diffusion_does_not_import_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import takes half a second."""
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # an import raises
    fresh = {name: runpy.run_path(module.__file__) for name, module in (("a", algorithms), ("d", diffusion))}
    fresh["a"]["FlowMatching"]()
    fresh["a"]["Regression"]()
    with pytest.raises(ImportError):
        fresh["d"]["alpha_bars"](100)


@pytest.mark.parametrize(
    ("built_for", "used_by"),
    [(FlowMatching(), Regression()), (Regression(), FlowMatching()), (Regression(), Diffusion())],
)
def test_network_of_the_other_algorithm_is_refused(built_for: Algorithm, used_by: Algorithm) -> None:
    with pytest.raises(UserError, match="set denoise"):
        used_by.loss(build(built_for), *batch(), *generators(0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatching", {"steps": 3, "start": "noise"}),
        ("Diffusion", {"train_steps": 50, "sample_steps": 10, "sampler": "ddim", "prediction": "v", "clip": False}),
    ],
)
def test_constructible_from_a_configuration(name: str, options: dict) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    parser.add_argument("--network", type=ActionNetwork)
    home = "dopr_lightning.policies"
    config = parser.parse_object(
        {
            "algorithm": {"class_path": f"{home}.algorithms.{name}", "init_args": options},
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
    assert type(built.algorithm).__name__ == name
    assert options.items() <= vars(built.algorithm).items()
    out = built.algorithm.sample(built.network, batch()[0], (B, T, A), generators(*range(B)))
    assert out.shape == (B, T, A)


LEARNERS = {
    "flow": FlowMatching(),
    "regression": Regression(),
    **{name: Diffusion(100, 10, "ddim", name) for name in get_args(Prediction)},
}


@pytest.mark.parametrize("algorithm", LEARNERS.values(), ids=LEARNERS)
def test_training_reduces_the_error(algorithm: Algorithm) -> None:
    """Learn a deterministic map of the observation, which all algorithms then return."""
    network = build(algorithm)
    generator = torch.Generator().manual_seed(5)
    observation = torch.randn(256, TO, OBS, generator=generator)
    weight = torch.randn(TO * OBS, T * A, generator=generator) / (TO * OBS) ** 0.5
    action = (observation.flatten(1) @ weight / 2).clamp(-1, 1).unflatten(1, (T, A))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(300):
        loss = algorithm.loss(network, observation, action, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (algorithm.sample(network, observation, (256, T, A), generators(*range(256))) - action).square().mean()
    assert error < 0.2 * action.square().mean()
