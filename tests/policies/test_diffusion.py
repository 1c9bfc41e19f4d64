"""Diffusion against a Gaussian target, for which everything is known in closed form.

With x_0 ~ N(mu, S) and epsilon ~ N(0, I) independent, x_t = a x_0 + s epsilon (a^2 = alpha_bar_t, a^2 + s^2 = 1) is
N(a mu, C), C = a^2 S + s^2 I, and what the model predicts is jointly Gaussian with x_t: its posterior mean is affine.
Chunks are (rows, T, A) with T independent draws of an A-dimensional Gaussian each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor
from toy_task import ToyTask, train

from dopr_lightning.policies.algorithms import Diffusion
from dopr_lightning.policies.diffusion import (
    Prediction,
    Sampler,
    alpha_bars,
    diffuse,
    diffusion_loss,
    diffusion_sample,
    prediction_target,
    reverse_process,
)
from dopr_lightning.policies.module import PolicyModule
from dopr_lightning.policies.networks.time_embedding import sinusoidal_embedding
from dopr_lightning.training import resolve

A = 3
EYE = torch.eye(A, dtype=torch.float64)
PREDICTIONS = get_args(Prediction)
all_predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Gaussian:
    """The target: correlated, not isotropic, not centred."""

    def __init__(self) -> None:
        root = randn(A, A, seed=1)
        self.mean = randn(A, seed=2)
        self.covariance = root @ root.T / A + 0.1 * EYE

    def joint(self, prediction: Prediction, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of what is predicted, at steps ``alpha_bar`` (n,): mean (n, A), covariance and that with x_t (n, A, A)."""
        a, s = alpha_bar.sqrt()[:, None], (1 - alpha_bar).sqrt()[:, None]
        in_x0, in_epsilon = {"epsilon": (0 * a, 0 * s + 1), "sample": (0 * a + 1, 0 * s), "v": (-s, a)}[prediction]
        covariance = (in_x0**2)[..., None] * self.covariance + (in_epsilon**2)[..., None] * EYE
        cross = (in_x0 * a)[..., None] * self.covariance + (in_epsilon * s)[..., None] * EYE
        return in_x0 * self.mean, covariance, cross

    def affine(self, prediction: Prediction, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior mean, weight @ x_t + bias: (n, A, A) and (n, A)."""
        mean, _, cross = self.joint(prediction, alpha_bar)
        noisy = alpha_bar[:, None, None] * self.covariance + (1 - alpha_bar)[:, None, None] * EYE
        weight = cross @ noisy.inverse()
        return weight, mean - (weight @ self.mean) * alpha_bar.sqrt()[:, None]

    def risk(self, prediction: Prediction, alpha_bar: Tensor) -> Tensor:
        """The variance, per coordinate, that x_t does not explain: (n,)."""
        _, covariance, cross = self.joint(prediction, alpha_bar)
        weight, _ = self.affine(prediction, alpha_bar)
        return (covariance - weight @ cross.mT).diagonal(dim1=-2, dim2=-1).mean(-1)

    def predictor(self, prediction: Prediction, steps: int) -> Callable[[Tensor, Tensor, Any], Tensor]:
        """The exact model: ``predict(x_t, t / steps, anything)``."""
        weight, bias = self.affine(prediction, alpha_bars(steps))

        def predict(x: Tensor, time: Tensor, condition: Any) -> Tensor:
            t = (time * steps).round().long()
            return x @ weight[t].mT + bias[t][:, None]

        return predict

    def law(self, steps: int, sample_steps: int, eta: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the sampler's output, from equation 12 of DDIM (2010.02502), with the exact model."""
        schedule = [1.0, *alpha_bars(steps).tolist()]  # before step 0 there is no noise
        stride = steps // sample_steps
        mean, covariance = torch.zeros(A, dtype=torch.float64), EYE
        for t in range(stride * (sample_steps - 1) + 1, 0, -stride):
            now, then = schedule[t], schedule[max(t - stride, 0)]
            noise = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
            weight, bias = (p[0] for p in self.affine("sample", torch.tensor([now], dtype=torch.float64)))
            # x <- sqrt(then) f(x) + sqrt(1 - then - noise^2) (x - sqrt(now) f(x)) / sqrt(1 - now) + noise z
            keep = math.sqrt(max(1 - then - noise**2, 0) / (1 - now))
            take = math.sqrt(then) - keep * math.sqrt(now)
            linear = take * weight + keep * EYE
            mean, covariance = linear @ mean + take * bias, linear @ covariance @ linear.T + noise**2 * EYE
        return mean, covariance


def deterministic_law(prediction: Prediction, steps: int, sample_steps: int) -> tuple[Tensor, Tensor]:
    """What DDIM with the exact model makes of N(0, I): it is affine in its start, so A + 1 starts tell all."""
    starts = torch.cat([torch.zeros(1, A), torch.eye(A)]).double()[:, None]
    reverse = reverse_process("ddim", steps, sample_steps, prediction, clip=False)
    predict = Gaussian().predictor(prediction, steps)
    out = diffusion_sample(predict, starts, None, reverse, generators(A + 1)).squeeze(1)
    linear = (out[1:] - out[0]).T
    return out[0], linear @ linear.T


# The forward process.


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_the_schedule_is_the_squared_cosine(steps: int) -> None:
    """Nichol & Dhariwal, equation 17; diffusers holds its betas in float32."""
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    betas = torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(f)], dtype=torch.float64)
    schedule = alpha_bars(steps)
    assert schedule.dtype == torch.float64
    before = torch.cat([torch.ones(1).double(), schedule[:-1]])
    torch.testing.assert_close(1 - schedule / before, betas, atol=1e-7, rtol=0)


def test_noise_and_velocity_are_those_of_diffusers() -> None:
    steps = 100
    theirs = DDPMScheduler(steps, beta_schedule="squaredcos_cap_v2")
    t = torch.arange(steps)
    x0, epsilon = randn(steps, 2, A, seed=1), randn(steps, 2, A, seed=2)
    schedule = alpha_bars(steps)
    torch.testing.assert_close(
        diffuse(x0, epsilon, schedule), theirs.add_noise(x0, epsilon, t), atol=1e-5, rtol=0, msg="x_t"
    )
    torch.testing.assert_close(
        prediction_target("v", x0, epsilon, schedule), theirs.get_velocity(x0, epsilon, t), atol=1e-5, rtol=0, msg="v"
    )


def pair(prediction: Prediction, value: Tensor, x: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """The action and the noise, from x_t and a prediction: solve two linear equations."""
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "epsilon":
        return (x - s * value) / a, value
    if prediction == "sample":
        return value, (x - a * value) / s
    return a * x - s * value, s * x + a * value


@pytest.mark.parametrize(("given", "wanted"), product(PREDICTIONS, PREDICTIONS))
def test_each_prediction_determines_the_others(given: Prediction, wanted: Prediction) -> None:
    schedule = alpha_bars(100)
    x0, epsilon = randn(100, 2, A, seed=1), randn(100, 2, A, seed=2)
    x = diffuse(x0, epsilon, schedule)
    found = pair(given, prediction_target(given, x0, epsilon, schedule), x, schedule[:, None, None])
    torch.testing.assert_close(
        prediction_target(wanted, *found, schedule),
        prediction_target(wanted, x0, epsilon, schedule),
        atol=1e-10,
        rtol=0,
    )


# The loss.


@all_predictions
@pytest.mark.parametrize("step", [0, 40, 99])
def test_loss_is_least_at_the_posterior_mean(prediction: Prediction, step: int) -> None:
    """On samples whose moments are exact, the gradient vanishes there; in an affine model the loss is convex."""
    target, n = Gaussian(), 50
    white = randn(n, 2 * A)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / n)).T
    x0 = target.mean + white[:, :A] @ torch.linalg.cholesky(target.covariance).T
    schedule = alpha_bars(100)

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        return diffusion_loss(
            lambda x, t, c: x @ weight.T + bias,
            x0[:, None],
            None,
            epsilon=white[:, None, A:],
            t=torch.full((n,), step),
            alpha_bars=schedule,
            prediction=prediction,
        )

    now = schedule[step : step + 1]
    weight, bias = (p[0].requires_grad_() for p in target.affine(prediction, now))
    best = loss(weight, bias)
    for gradient in torch.autograd.grad(best, [weight, bias]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    torch.testing.assert_close(best, target.risk(prediction, now)[0], atol=1e-12, rtol=0)
    for seed in range(5):
        assert loss(weight + 0.01 * randn(A, A, seed=seed), bias + 0.01 * randn(A, seed=seed)) > best


@all_predictions
def test_the_exact_model_has_the_bayes_risk_over_all_steps(prediction: Prediction) -> None:
    """And a shift of every prediction by 0.2 costs 0.04 more: noise and steps are drawn as they should be."""
    target, steps, batches, rows = Gaussian(), 100, 50, 1000
    algorithm = Diffusion(steps, prediction=prediction)
    exact = target.predictor(prediction, steps)
    root = torch.linalg.cholesky(target.covariance)
    losses = torch.zeros(batches, 2, dtype=torch.float64)
    for i in range(batches):
        x0 = target.mean + randn(rows, 1, A, seed=i) @ root.T
        for j, shift in enumerate((0.0, 0.2)):
            losses[i, j] = algorithm.loss(
                lambda x, t, c, shift=shift: exact(x, t, c) + shift,  # type: ignore[arg-type]
                torch.zeros(rows, 1, 1),
                x0,
                torch.Generator().manual_seed(1000 + i),
            )
    found, error = losses.mean(0), losses.std(0) / batches**0.5
    risk = target.risk(prediction, alpha_bars(steps)).mean()
    assert error[0] < 0.02 * risk
    assert (found[0] - risk).abs() < 4 * error[0]
    cost = losses[:, 1] - losses[:, 0]
    assert cost.std() / batches**0.5 < 0.1 * 0.04
    assert (cost.mean() - 0.04).abs() < 4 * cost.std() / batches**0.5


def test_the_model_is_asked_at_the_steps_share_of_all() -> None:
    """In training and in sampling, so that the network sees no time that it was not trained at."""
    seen: list[float] = []

    def clock(x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        seen.extend(time.tolist())
        assert condition.shape == (4, 1, 1)
        return x

    x, condition = randn(4, 2, A), torch.ones(4, 1, 1)
    t = torch.tensor([0, 1, 33, 99])
    diffusion_loss(clock, x, condition, epsilon=x, t=t, alpha_bars=alpha_bars(100), prediction="v")
    assert seen == [0, 0.01, 0.33, 0.99]
    for sampler in get_args(Sampler):
        seen.clear()
        diffusion_sample(clock, x, condition, reverse_process(sampler, 100, 10, "v", True), generators(4))
        assert seen[::4] == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]
        assert seen[1::4] == seen[::4]


@pytest.mark.parametrize(("steps", "apart"), [(100, 2.0), (1000, 1.0)])
def test_a_network_can_tell_the_steps_apart(steps: int, apart: float) -> None:
    features = sinusoidal_embedding(torch.arange(steps) / steps)
    distance = torch.cdist(features, features) + 100 * torch.eye(steps)
    assert distance.min() > apart


# The samplers.


@all_predictions
def test_ddim_reproduces_the_target_at_first_order(prediction: Prediction) -> None:
    target = Gaussian()
    laws = [deterministic_law(prediction, steps, steps) for steps in (50, 100, 200, 400)]
    errors = [(covariance - target.covariance).norm().item() for _, covariance in laws]
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1
    assert errors[-1] < 0.01 * target.covariance.norm()
    assert (laws[-1][0] - target.mean).norm() < 1e-3 * target.mean.norm()


@all_predictions
@pytest.mark.parametrize("sample_steps", [10, 16, 100])
def test_ddim_makes_the_steps_of_its_paper(prediction: Prediction, sample_steps: int) -> None:
    for found, expected in zip(
        deterministic_law(prediction, 100, sample_steps), Gaussian().law(100, sample_steps, 0.0), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "sample_steps", "eta"), [("ddpm", 100, 1.0), ("ddpm", 20, 1.0), ("ddim", 100, 0.5), ("ddim", 10, 1.0)]
)
def test_samples_have_the_law_of_the_sampler(sampler: Sampler, sample_steps: int, eta: float) -> None:
    """Of 100,000 samples, mean and covariance, within four of their standard errors."""
    target, rows, n = Gaussian(), 4, 25_000
    reverse = reverse_process(sampler, 100, sample_steps, "epsilon", clip=False, eta=eta)
    noise = randn(rows, n, A, seed=3)
    out = diffusion_sample(target.predictor("epsilon", 100), noise, None, reverse, generators(rows))
    samples = out.flatten(0, 1)
    mean, covariance = target.law(100, sample_steps, eta)
    variances = covariance.diagonal()
    assert ((samples.mean(0) - mean) ** 2 < 16 * variances / len(samples)).all()
    # Of a Gaussian's covariance, Isserlis.
    error = ((variances[:, None] * variances + covariance**2) / len(samples)).sqrt()
    assert (error < 0.01 * (variances[:, None] * variances).sqrt()).all()
    assert ((samples.T.cov() - covariance).abs() < 4 * error).all()


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_law_of_many_steps_is_the_target(eta: float) -> None:
    """At first order. At the 100 steps in use less than 5 % of the covariance is missing."""
    target = Gaussian()
    laws = [target.law(steps, steps, eta) for steps in (100, 200, 400, 800)]
    errors = [(covariance - target.covariance).norm().item() for _, covariance in laws]
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1
    assert errors[0] < 0.05 * target.covariance.norm()
    for mean, _ in laws:
        assert (mean - target.mean).norm() < 1e-3 * target.mean.norm()


@pytest.mark.parametrize(("sample_steps", "width"), [(10, 0.64), (100, 0.93)])
def test_few_steps_narrow_the_distribution(sample_steps: int, width: float) -> None:
    """The numbers in Diffusion's docstring, for standard deviation 0.1."""
    schedule = alpha_bars(100)

    def predict(x: Tensor, time: Tensor, condition: None) -> Tensor:
        now = schedule[(time * 100).round().long()][:, None, None]
        return (1 - now).sqrt() / (now * 0.01 + 1 - now) * x

    reverse = reverse_process("ddim", 100, sample_steps, "epsilon", clip=False)
    out = diffusion_sample(predict, torch.ones(1, 1, 1).double(), None, reverse, generators(1))
    assert abs(out.item() / 0.1 - width) < 0.005


def opinion(x: Tensor, time: Tensor) -> Tensor:
    """Some model of the action, that is often outside [-1, 1]."""
    return 1.5 * torch.tanh(3 * x.flip(-1) + time[:, None, None]) - 0.3


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_samplers_agree_on_converted_predictions(sampler: Sampler, eta: float, clip: bool) -> None:
    schedule = alpha_bars(100)
    outs = []
    for prediction in PREDICTIONS:

        def predict(x: Tensor, time: Tensor, condition: None, prediction: Prediction = prediction) -> Tensor:
            now = schedule[(time * 100).round().long()]
            x0 = opinion(x, time)
            return prediction_target(prediction, *pair("sample", x0, x, now[:, None, None]), now)

        reverse = reverse_process(sampler, 100, 20, prediction, clip, eta)
        outs.append(diffusion_sample(predict, randn(4, 2, A), None, reverse, generators(4)))
    for other in outs[1:]:
        torch.testing.assert_close(other, outs[0], atol=1e-10, rtol=0)
    assert (outs[0].abs().max() <= 1) == clip


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sample_steps", [100, 10])
def test_ddim_with_all_its_noise_is_ddpm(sample_steps: int, clip: bool) -> None:
    outs = []
    for sampler in get_args(Sampler):
        reverse = reverse_process(sampler, 100, sample_steps, "sample", clip, eta=1.0)
        outs.append(diffusion_sample(lambda x, t, c: opinion(x, t), randn(4, 2, A), None, reverse, generators(4)))
    torch.testing.assert_close(*outs, atol=1e-10, rtol=0)


def test_a_small_error_of_the_first_step_stays_small_with_clipping() -> None:
    """Where almost nothing of the action is left, the noise determines it badly."""
    exact = Gaussian().predictor("epsilon", 100)
    noise = randn(4, 2, A)

    def moved(clip: bool) -> float:
        reverse = reverse_process("ddim", 100, 100, "epsilon", clip)
        outs = [
            diffusion_sample(
                lambda x, t, c, error=error: exact(x, t, c) + error * (t == 0.99)[:, None, None],
                noise,
                None,
                reverse,
                generators(4),
            )
            for error in (0.0, 0.01)
        ]
        return (outs[1] - outs[0]).abs().max().item()

    assert 2000 < alpha_bars(100)[-1].sqrt().reciprocal() < 2100  # as Diffusion's docstring has it
    assert moved(clip=False) > 0.1
    assert moved(clip=True) < 0.02


def test_a_model_of_16_bits_is_sampled_in_32() -> None:
    """As under autocast."""

    def predict(x: Tensor, time: Tensor, condition: None) -> Tensor:
        return (0.5 * x).bfloat16()

    noise = randn(4, 2, A).float()
    half, single = (
        diffusion_sample(model, noise, None, reverse_process("ddpm", 100, 10, "sample", True), generators(4))
        for model in (predict, lambda x, t, c: predict(x, t, c).float())
    )
    assert half.dtype == torch.float32
    assert torch.equal(half, single)


# In use.


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_policy_learns_the_toy_task_and_is_rebuilt_from_its_checkpoint(tmp_path: Path) -> None:
    """It walks as its demonstrations do, from where they were."""
    cli = train(
        tmp_path,
        "--model.algorithm=dopr_lightning.policies.algorithms.Diffusion",
        "--model.algorithm.sampler=ddim",
        "--model.algorithm.sample_steps=10",
        "--model.network.width=64",
        "--trainer.max_steps=600",
        "--trainer.check_val_every_n_epoch=150",
    )
    shown = ToyTask().load()
    starts = [0, *shown.episode_ends[:-1]]
    present = [t for a, b in zip(starts, shown.episode_ends, strict=True) for t in range(a + 1, b - 1)]
    seen = torch.tensor(np.stack([shown.observations[t - 1 : t + 1] for t in present])).float()
    walked = torch.tensor(np.stack([shown.actions[t : t + 2] for t in present]))

    def act(policy: PolicyModule) -> Tensor:
        return policy.eval().predict(seen, generators(len(seen)))

    live = act(cli.model)
    assert (live - walked).square().mean() < 0.2 * walked.square().mean()

    rebuilt = PolicyModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(act(rebuilt), live)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_the_configuration_takes_the_place_of_another_algorithm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = resolve(["--config", "pusht.yaml"])
    stacked = resolve(["--config", "pusht.yaml", "--config", "diffusion.yaml"])
    algorithm = stacked["model"].pop("algorithm")
    assert alone["model"].pop("algorithm")["class_path"] != algorithm["class_path"]
    assert stacked == alone
    policy = {"train_steps": 100, "sample_steps": 100, "sampler": "ddpm", "prediction": "epsilon", "clip": True}
    assert algorithm["init_args"] == policy | {"eta": 0.0}
    assert policy.items() <= vars(Diffusion()).items()
