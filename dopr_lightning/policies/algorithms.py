"""What does a policy ask of an algorithm? A loss to train on and a way to act; here are the three we have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from dopr_lightning.errors import UserError
from dopr_lightning.policies.diffusion import (
    Prediction,
    Sampler,
    alpha_bars,
    diffusion_loss,
    diffusion_sample,
    reverse_process,
)
from dopr_lightning.policies.flow import euler_sample, flow_matching_loss
from dopr_lightning.policies.networks.base import ActionNetwork

Start = Literal["zeros", "noise"]

STILL_NOISE = 0.3
"""Sampling begins with noise alone, so it must begin where x holds no more of the action than this: at step 80 of 100,
or later. Diffusion Policy's 16 evaluations begin at step 90."""


class Algorithm(Protocol):
    """An objective and its sampler, over a network it is handed. It has no parameters and no state.

    Random numbers come from the generators it is handed and from nowhere else. They live on the CPU, whose
    stream is the same on every machine; what is drawn is then moved to the device of the data.
    """

    denoises: ClassVar[bool]
    """The network's ``denoise`` argument, whether it takes a noisy action and a time."""

    def loss(self, network: ActionNetwork, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """Return the training loss, a scalar.

        Args:
            network: Built with ``denoise=self.denoises``.
            observation: Normalised observations, (B, To, O).
            action: Normalised actions, (B, T, A).
            generator: Source of the batch's noise, on the CPU.
        """
        ...

    def sample(
        self,
        network: ActionNetwork,
        observation: Tensor,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Return normalised actions of ``shape``, without gradients.

        Args:
            network: Built with ``denoise=self.denoises``.
            observation: Normalised observations, (B, To, O).
            shape: (B, T, A).
            generators: One per row, on the CPU. A row's action depends on its own generator alone, so an
                episode does not depend on its neighbours in the batch.
        """
        ...


class FlowMatching:
    """Flow matching along straight paths, sampled with Euler steps.

    Args:
        steps: Network evaluations per action chunk. 9, as much-ado-about-noising evaluates.
        start: ``"zeros"`` follows the flow from the middle of the noise, which makes the policy
            deterministic, and is that benchmark's default; ``"noise"`` samples from the learnt distribution.

    Raises:
        UserError: ``steps`` is below 1, or ``start`` is neither.
    """

    denoises: ClassVar[bool] = True

    def __init__(self, steps: int = 9, start: Start = "zeros") -> None:
        if steps < 1:
            raise UserError(f"FlowMatching: steps must be at least 1, got {steps}")
        _check_choice(self, "start", start, Start)
        self.steps = steps
        self.start = start

    def loss(self, network: ActionNetwork, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Algorithm.loss`."""
        x0 = torch.randn(action.shape, generator=generator).to(action)
        t = torch.rand(len(action), generator=generator).to(action)
        return flow_matching_loss(network, action, observation, x0=x0, t=t)

    @torch.no_grad()
    def sample(
        self,
        network: ActionNetwork,
        observation: Tensor,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """See :meth:`Algorithm.sample`."""
        x0 = observation.new_zeros(shape) if self.start == "zeros" else _noise(shape, generators).to(observation)
        return euler_sample(network, x0, observation, self.steps)


class Diffusion:
    """Denoising diffusion with the squared-cosine schedule, sampled with diffusers' DDPM or DDIM.

    The defaults are Diffusion Policy's. The network's time is the step's share of ``train_steps``: 0 is almost the
    action.

    Args:
        train_steps: Steps from action to noise.
        sample_steps: Network evaluations per action chunk. Few narrow the distribution: of a Gaussian of standard
            deviation 0.1 a perfect network leaves 0.64 of the width with 10 steps of DDIM and 0.93 with 100.
        sampler: ``"ddpm"`` adds noise at every step, ``"ddim"`` as much as ``eta`` says.
        prediction: What the network predicts: ``"epsilon"`` the noise, ``"sample"`` the action, or ``"v"``.
        clip: Clip the action that each step supposes to [-1, 1], where min-max normalised actions lie: in the first
            steps a predicted noise is a little wrong and the action it supposes far outside (100 steps multiply the
            error by 2000). With ``action_normalizer: standard``, whose actions go beyond, it must be false.
        eta: For DDIM: 0 has no noise but the first, 1 has DDPM's.

    Raises:
        UserError: A number is out of range, a choice is none of those, ``eta`` is given to DDPM, or sampling would
            begin where the action still shows.
    """

    denoises: ClassVar[bool] = True

    def __init__(
        self,
        train_steps: int = 100,
        sample_steps: int = 100,
        sampler: Sampler = "ddpm",
        prediction: Prediction = "epsilon",
        clip: bool = True,
        eta: float = 0.0,
    ) -> None:
        if train_steps < 1:
            raise UserError(f"Diffusion: train_steps must be at least 1, got {train_steps}")
        if not 1 <= sample_steps <= train_steps:
            raise UserError(f"Diffusion: sample_steps must be from 1 to train_steps={train_steps}, got {sample_steps}")
        _check_choice(self, "sampler", sampler, Sampler)
        _check_choice(self, "prediction", prediction, Prediction)
        if not 0 <= eta <= 1:
            raise UserError(f"Diffusion: eta must be from 0 to 1, got {eta}")
        if eta and sampler == "ddpm":
            raise UserError(f"Diffusion: eta={eta} is for the sampler ddim; ddpm adds all its noise, leave eta at 0")
        self.train_steps, self.sample_steps = train_steps, sample_steps
        self.sampler, self.prediction, self.clip, self.eta = sampler, prediction, clip, eta
        self._alpha_bars = alpha_bars(train_steps)
        self._reverse = reverse_process(sampler, train_steps, sample_steps, prediction, clip, eta)
        first = int(self._reverse.scheduler.timesteps[0])
        left = self._alpha_bars[first].sqrt().item()
        if left > STILL_NOISE:
            raise UserError(
                f"Diffusion: sample_steps={sample_steps} of train_steps={train_steps} would begin at step {first}, "
                f"where x still holds {left:.2f} of the action; take all of them, or a divisor such as a tenth"
            )

    def loss(self, network: ActionNetwork, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Algorithm.loss`."""
        return diffusion_loss(
            network,
            action,
            observation,
            epsilon=torch.randn(action.shape, generator=generator).to(action),
            t=torch.randint(self.train_steps, action.shape[:1], generator=generator),
            alpha_bars=self._alpha_bars,
            prediction=self.prediction,
        )

    @torch.no_grad()
    def sample(
        self,
        network: ActionNetwork,
        observation: Tensor,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """See :meth:`Algorithm.sample`."""
        noise = _noise(shape, generators).to(observation)
        return diffusion_sample(network, noise, observation, self._reverse, generators)


class Regression:
    """Mean squared error on the action chunk: the plain behaviour cloning of the paper's Humanoid experiment."""

    denoises: ClassVar[bool] = False

    def loss(self, network: ActionNetwork, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Algorithm.loss`; ``generator`` is left alone. The minimiser is E[action | observation]."""
        return (network(None, None, observation) - action).square().mean()

    @torch.no_grad()
    def sample(
        self,
        network: ActionNetwork,
        observation: Tensor,
        shape: tuple[int, int, int],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """See :meth:`Algorithm.sample`; ``generators`` are left alone."""
        return network(None, None, observation)


def _noise(shape: tuple[int, int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """Each row from its own generator."""
    if len(generators) != shape[0]:
        raise ValueError(f"{shape[0]} rows need as many generators, got {len(generators)}")
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


def _check_choice(algorithm: Algorithm, name: str, value: str, literal: Any) -> None:
    """Raise a UserError unless ``value`` is one of the Literal's."""
    if value not in get_args(literal):
        known = ", ".join(get_args(literal))
        raise UserError(f"{type(algorithm).__name__}: {name} must be one of {known}, got {value!r}")
