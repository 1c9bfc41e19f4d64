"""Flow matching against a Gaussian target, for which everything is known in closed form.

With x0 ~ N(0, I) and x1 ~ N(mu, S) independent, x_t is N(t mu, C_t), C_t = (1-t)^2 I + t^2 S, and
E[x1 - x0 | x_t] = mu + (t S - (1-t) I) C_t^-1 (x_t - t mu). That velocity carries z to t mu + C_t^(1/2) z.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dopr_lightning.policies.flow import euler_sample, flow_matching_loss, interpolate

T, A = 2, 3
D = T * A


class Gaussian:
    """The target and its exact velocity, on flattened chunks."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.mean = torch.randn(D, generator=generator, dtype=torch.float64)
        self.covariance = root @ root.T / D + 0.1 * torch.eye(D, dtype=torch.float64)

    def affine(self, t: float) -> tuple[Tensor, Tensor]:
        eye = torch.eye(D, dtype=torch.float64)
        covariance = (1 - t) ** 2 * eye + t**2 * self.covariance
        weight = (t * self.covariance - (1 - t) * eye) @ covariance.inverse()
        return weight, self.mean - weight @ (t * self.mean)

    def velocity(self, x: Tensor, t: Tensor, condition: None) -> Tensor:
        assert (t == t[0]).all()
        weight, bias = self.affine(t[0].item())
        return (x.flatten(1) @ weight.T + bias).unflatten(1, (T, A))

    def sampler(self, steps: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the sampler's output: it is affine in its start, so D + 1 starts tell all."""
        starts = torch.cat([torch.zeros(1, D), torch.eye(D)]).double().unflatten(1, (T, A))
        out = euler_sample(self.velocity, starts, None, steps).flatten(1)
        linear = (out[1:] - out[0]).T
        return out[0], linear @ linear.T


def test_interpolate_takes_one_time_per_row() -> None:
    x0, x1 = torch.zeros(3, T, A), torch.ones(3, T, A)
    t = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(interpolate(x0, x1, t), t[:, None, None].expand(3, T, A))


def test_sampler_evaluates_at_equal_steps_from_zero() -> None:
    seen: list[float] = []

    def clock(x: Tensor, t: Tensor, condition: None) -> Tensor:
        seen.append(t[0].item())
        return t[:, None, None].expand_as(x)

    out = euler_sample(clock, torch.zeros(2, T, A, dtype=torch.float64), None, 5)
    assert seen == [0, 0.2, 0.4, 0.6, 0.8]
    torch.testing.assert_close(out, torch.full_like(out, 0.4))  # the left Riemann sum of the integral of t


def test_sampler_reproduces_the_target_at_first_order() -> None:
    target = Gaussian()
    errors = [(target.sampler(steps)[1] - target.covariance).norm().item() for steps in (64, 128, 256, 512)]
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1
    assert errors[-1] < 0.02 * target.covariance.norm()


def test_each_sample_follows_the_exact_flow() -> None:
    target = Gaussian()
    values, vectors = torch.linalg.eigh(target.covariance)
    root = vectors @ values.sqrt().diag() @ vectors.T
    z = torch.randn(4, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = target.mean + z @ root

    def error(steps: int) -> float:
        out = euler_sample(target.velocity, z.unflatten(1, (T, A)), None, steps).flatten(1)
        return (out - exact).norm().item()

    assert error(400) < 0.02 * exact.norm()
    assert 1.9 < error(200) / error(400) < 2.1


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_the_origin_flows_to_the_mean(steps: int) -> None:
    """The origin's path is the straight line t mu, so any number of steps is exact; one is the regression policy."""
    target = Gaussian()
    out = euler_sample(target.velocity, torch.zeros(1, T, A, dtype=torch.float64), None, steps)
    torch.testing.assert_close(out.flatten(), target.mean)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.9])
def test_loss_is_least_at_the_closed_form_among_affine_velocities(time: float) -> None:
    """On samples whose moments are exact, the gradient vanishes at the closed form; the loss is convex there."""
    target = Gaussian()
    n = 50
    white = torch.randn(n, 2 * D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T @ white / n)).T
    root = torch.linalg.cholesky(target.covariance)
    x0, x1 = white[:, :D], target.mean + white[:, D:] @ root.T
    t = torch.full((n,), time, dtype=torch.float64)

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        return flow_matching_loss(
            lambda x, t, c: (x.flatten(1) @ weight.T + bias).unflatten(1, (T, A)),
            x1.unflatten(1, (T, A)),
            None,
            x0=x0.unflatten(1, (T, A)),
            t=t,
        )

    weight, bias = (p.requires_grad_() for p in target.affine(time))
    best = loss(weight, bias)
    for gradient in torch.autograd.grad(best, [weight, bias]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    assert loss(weight + 0.01, bias) > best
    # What remains is the variance of x1 - x0 that x_t does not explain.
    identity = torch.eye(D, dtype=torch.float64)
    cross = time * target.covariance - (1 - time) * identity
    residual = target.covariance + identity - weight @ cross.T
    torch.testing.assert_close(best, residual.trace() / D)


def test_condition_is_passed_through() -> None:
    x = torch.zeros(2, T, A)
    condition = {"observation": torch.ones(2, 1, 1)}
    out = euler_sample(lambda x, t, c: x + c["observation"], x, condition, 1)
    torch.testing.assert_close(out, torch.ones_like(x))
    loss = flow_matching_loss(lambda x, t, c: c["observation"] * x, x + 1, condition, x0=x, t=torch.zeros(2))
    torch.testing.assert_close(loss, torch.tensor(1.0))
