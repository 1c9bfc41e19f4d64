"""How does a diffusion policy learn, and how does it act?

DDPM (Ho et al. 2020, arXiv 2006.11239) with the squared-cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672),
in the form used for robot policies by Diffusion Policy (Chi et al. 2023, arXiv 2303.04137). Step 0 is almost the
action and the last step is noise: time runs the other way than in ``flow.py``. The schedule and the reverse steps are
those of diffusers, imported only when they are asked for. Noise, or the generators that draw it, comes from the
caller, so seeding has one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Condition = TypeVar("Condition")
Predictor = Callable[[Tensor, Tensor, Condition], Tensor]
"""``predict(x_t (B, T, A), t / steps (B,), condition) -> (B, T, A)``."""

Prediction = Literal["epsilon", "sample", "v"]
"""What it predicts: the noise, the action, or v = alpha_t epsilon - sigma_t x_0."""

Sampler = Literal["ddpm", "ddim"]

SCHEDULE = "squaredcos_cap_v2"


class ReverseProcess(NamedTuple):
    """From :func:`reverse_process`."""

    scheduler: Any
    """diffusers' ``DDPMScheduler`` or ``DDIMScheduler``. Its annotations know of one generator only."""
    options: dict[str, Any]
    """Of its ``step``."""


def alpha_bars(steps: int) -> Tensor:
    """Return the share of the action in the variance at each step, the product of 1 - beta_s over s <= t: (steps,).

    The squared cosine: it falls from almost 1 to almost 0. In float64, since the noise is what is left of 1.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return (1 - DDPMScheduler(steps, beta_schedule=SCHEDULE).betas.double()).cumprod(0)


def diffuse(x0: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the noisy action: x_t = alpha_t x_0 + sigma_t epsilon, alpha_t^2 = alpha_bar_t, alpha_t^2 + sigma_t^2 = 1.

    Args:
        x0: Actions, (B, T, A).
        epsilon: Noise, the shape of ``x0``.
        alpha_bar: One per row, (B,).
    """
    alpha, sigma = _weights(alpha_bar, x0)
    return alpha * x0 + sigma * epsilon


def prediction_target(prediction: Prediction, x0: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return what the model is to predict of x_t = ``diffuse(x0, epsilon, alpha_bar)``.

    Given x_t each of the three determines the others; they differ in how they weigh the steps. The noise says
    little of the action where x_t is mostly noise, the action little of the noise where it is mostly action; v
    (Salimans & Ho 2022, arXiv 2202.00512) says the one where x_t shows the other.
    """
    if prediction == "epsilon":
        return epsilon
    if prediction == "sample":
        return x0
    alpha, sigma = _weights(alpha_bar, x0)
    return alpha * epsilon - sigma * x0


def diffusion_loss(
    predict: Predictor[Condition],
    x0: Tensor,
    condition: Condition,
    *,
    epsilon: Tensor,
    t: Tensor,
    alpha_bars: Tensor,
    prediction: Prediction,
) -> Tensor:
    """Return the mean squared error of the prediction, per coordinate: E |f(x_t, t, c) - target|^2.

    Its minimiser is f(x, t, c) = E[target | x_t = x, c], from which a sampler reverses the diffusion.

    Args:
        predict: The model.
        x0: Actions, (B, T, A), normalised.
        condition: What the model sees besides x_t and t; passed through.
        epsilon: Noise from N(0, I), the shape of ``x0``.
        t: Steps from U{0, ..., steps - 1}, (B,), integers.
        alpha_bars: The schedule, (steps,), where ``t`` is.
        prediction: What the model predicts.

    Returns:
        A scalar.
    """
    alpha_bar = alpha_bars[t]
    target = prediction_target(prediction, x0, epsilon, alpha_bar)
    time = t.to(x0) / len(alpha_bars)
    return (predict(diffuse(x0, epsilon, alpha_bar), time, condition) - target).square().mean()


def reverse_process(
    sampler: Sampler, steps: int, sample_steps: int, prediction: Prediction, clip: bool, eta: float = 0.0
) -> ReverseProcess:
    """Return diffusers' way back through the steps of :func:`alpha_bars`.

    It visits every (steps // sample_steps)-th step down to step 0, as Diffusion Policy does.

    Args:
        sampler: ``"ddpm"`` draws from the posterior of the next step it visits; ``"ddim"`` (Song et al. 2020, arXiv
            2010.02502) makes room for less noise.
        steps: Of training.
        sample_steps: Of sampling, at most ``steps``.
        prediction: What the model predicts.
        clip: Clip the action that each step supposes to [-1, 1].
        eta: DDIM's share of DDPM's noise: 0 for none but the first.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler: Any = (DDPMScheduler if sampler == "ddpm" else DDIMScheduler)(
        steps,
        beta_schedule=SCHEDULE,
        prediction_type="v_prediction" if prediction == "v" else prediction,
        clip_sample=clip,
    )
    scheduler.alphas_cumprod = alpha_bars(steps)  # the loss's own, in float64
    scheduler.set_timesteps(sample_steps)
    if sampler == "ddpm":
        return ReverseProcess(scheduler, {})
    # A clipped action goes with the noise that it leaves in x, as in DDPM, not with the noise predicted: near the first
    # step x itself is the better prediction, and DDIM does not forget an error.
    return ReverseProcess(scheduler, {"eta": eta, "use_clipped_model_output": True})


def diffusion_sample(
    predict: Predictor[Condition],
    noise: Tensor,
    condition: Condition,
    reverse: ReverseProcess,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Walk from noise to actions, with one evaluation of the model per step.

    Args:
        predict: The model; what it predicts is what ``reverse`` was made for.
        noise: From N(0, I), (B, T, A).
        condition: Passed through to ``predict``.
        reverse: From :func:`reverse_process`.
        generators: One per row, on the CPU, for the noise of the steps.

    Returns:
        Actions, the shape of ``noise``.
    """
    scheduler, options = reverse
    x = noise
    for t in scheduler.timesteps.tolist():
        time = torch.full(x.shape[:1], t / len(scheduler), dtype=x.dtype, device=x.device)
        # Under autocast the model may answer in 16 bits, in which diffusers would then draw its noise.
        output = predict(x, time, condition).to(x)
        x = scheduler.step(output, t, x, generator=list(generators), **options).prev_sample
    return x


def _weights(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t, to multiply ``like`` with."""
    alpha_bar = alpha_bar.reshape(-1, *[1] * (like.ndim - 1))
    return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)
