"""How does a flow policy learn, and how does it act?

The linear path of flow matching (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003), in
the form used for robot policies by much-ado-about-noising. Time 0 is noise and time 1 is the action. Every
function takes its noise from the caller, so seeding has one place, and works in whatever dtype and on
whatever device the tensors are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Condition = TypeVar("Condition")
Velocity = Callable[[Tensor, Tensor, Condition], Tensor]
"""``velocity(x_t (B, T, A), t (B,), condition) -> (B, T, A)``, actions per unit of time."""


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Return the point of the straight path from ``x0`` to ``x1`` at time ``t``: x_t = (1 - t) x0 + t x1.

    Args:
        x0: Noise, (B, ...).
        x1: Actions, the shape of ``x0``.
        t: Times in [0, 1], (B,): one per row.
    """
    t = t.reshape(-1, *[1] * (x1.ndim - 1))
    return (1 - t) * x0 + t * x1


def flow_matching_loss(
    velocity: Velocity[Condition], x1: Tensor, condition: Condition, *, x0: Tensor, t: Tensor
) -> Tensor:
    """Return the mean squared error of the velocity, per coordinate: ``E |v(x_t, t, c) - (x1 - x0)|^2``.

    Its minimiser is ``v(x, t, c) = E[x1 - x0 | x_t = x, c]``, the velocity of a flow that carries noise to
    actions.

    Args:
        velocity: The model.
        x1: Actions, (B, T, A), normalised.
        condition: What the model sees besides ``x_t`` and ``t``; passed through.
        x0: Noise from N(0, I), the shape of ``x1``.
        t: Times from U(0, 1), (B,).

    Returns:
        A scalar.
    """
    target = x1 - x0
    return (velocity(interpolate(x0, x1, t), t, condition) - target).square().mean()


def euler_sample(velocity: Velocity[Condition], x0: Tensor, condition: Condition, steps: int) -> Tensor:
    """Follow dx/dt = v(x, t, c) from t = 0 to t = 1 with ``steps`` equal Euler steps.

    Args:
        velocity: The model; it is evaluated ``steps`` times, at t = 0, 1/steps, ..., 1 - 1/steps.
        x0: Where to start, (B, T, A): noise for samples, zeros for one deterministic action. From zeros, a
            single step returns E[x1 | c], the regression policy.
        condition: Passed through to ``velocity``.
        steps: Number of evaluations, at least 1. The error falls like 1/steps.

    Returns:
        Actions, the shape of ``x0``.
    """
    x = x0
    for k in range(steps):
        t = torch.full(x.shape[:1], k / steps, dtype=x.dtype, device=x.device)
        x = x + velocity(x, t, condition) / steps
    return x
