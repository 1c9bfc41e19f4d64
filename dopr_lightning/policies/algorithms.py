"""What does a policy ask of an algorithm? A loss to train on and a way to act; here are the two we have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from dopr_lightning.errors import UserError
from dopr_lightning.policies.flow import euler_sample, flow_matching_loss
from dopr_lightning.policies.networks.base import ActionNetwork
from dopr_lightning.policies.regression import regression_loss

Start = Literal["zeros", "noise"]


class Algorithm(Protocol):
    """An objective and its sampler, over a network it is handed. It has no parameters and no state.

    Random numbers come from the generators it is handed and from nowhere else. They live on the CPU, whose
    stream is the same on every machine; what is drawn is then moved to the device of the data.
    """

    denoises: ClassVar[bool]
    """Whether its network takes a noisy action and a time: the network's ``denoise`` argument."""

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
        if start not in get_args(Start):
            raise UserError(f"FlowMatching: start must be one of {', '.join(get_args(Start))}, got {start!r}")
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
        if self.start == "zeros":
            x0 = observation.new_zeros(shape)
        else:
            if len(generators) != shape[0]:
                raise ValueError(f"{shape[0]} rows need as many generators, got {len(generators)}")
            x0 = torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(observation)
        return euler_sample(network, x0, observation, self.steps)


class Regression:
    """Mean squared error on the action chunk: the plain behaviour cloning of the paper's Humanoid experiment."""

    denoises: ClassVar[bool] = False

    def loss(self, network: ActionNetwork, observation: Tensor, action: Tensor, generator: torch.Generator) -> Tensor:
        """See :meth:`Algorithm.loss`; ``generator`` is left alone."""
        return regression_loss(lambda seen: network(None, None, seen), action, observation)

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
