"""What does every policy network take and return?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from dopr_lightning.errors import UserError

Role = Literal["input", "readout", "condition"]


class VisualObservation(TypedDict):
    """What a policy with cameras observes; see :class:`~dopr_lightning.policies.networks.vision.Vision`."""

    state: Tensor
    images: Mapping[str, Tensor]


class ActionNetwork(nn.Module, ABC):
    """Observations to an action chunk; or, when it denoises, to the velocity of a noisy chunk.

    One network class serves both algorithms, chosen at construction by ``denoise``: with it the network has
    inputs for the noisy action and the time, without it these inputs do not exist (they are not fed zeros),
    so that no weight is dead and regression is the plain network of the paper.

    A chunk takes one :meth:`encode` and as many forwards, on what that returned, as the sampler has steps.

    Subclasses name their first layer ``input`` where it has one and their last layer ``readout``, register
    the layers in the order of the forward pass, set :attr:`context_dim` and :attr:`scales`, and implement
    :meth:`compute` and :meth:`parameter_roles`.

    Args:
        observation_dim: O, size of one observation.
        action_dim: A, size of one action.
        observe: To, observations given.
        horizon: T, actions returned.
        denoise: Whether a noisy action and a time are inputs: the algorithm's ``denoises``.

    Attributes:
        scales: The constructor's keywords, integers or lists of them, that grow together with the network's width;
            the first is what is called its width. Everything else stays as it is.
        context_dim: Size of the embedded observations, which :meth:`compute` adds ``context`` to. It grows with the
            width.

    Raises:
        UserError: A size is below 1.
    """

    scales: ClassVar[tuple[str, ...]]
    context_dim: int

    def __init__(self, observation_dim: int, action_dim: int, observe: int, horizon: int, denoise: bool) -> None:
        super().__init__()
        check_positive(self, observation_dim=observation_dim, action_dim=action_dim, observe=observe, horizon=horizon)
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.observe = observe
        self.horizon = horizon
        self.denoise = denoise

    def encode(self, observation: Tensor | VisualObservation, generator: torch.Generator | None = None) -> Tensor:
        """Turn what is observed into what :meth:`forward` takes, once for all steps of a sampler.

        Args:
            observation: Normalised observations, oldest first, (B, To, O); or what a subclass takes in its place.
            generator: On the CPU: source of random augmentation, for training; None for none.

        Raises:
            UserError: The observation has images, which this network does not take.
        """
        if not isinstance(observation, Tensor):
            name = type(self).__name__
            raise UserError(f"{name} takes no images; use VisionMLP, VisionUnet1d or VisionTransformer")
        return observation

    def forward(self, action: Tensor | None, time: Tensor | None, observation: Tensor) -> Tensor:
        """Return an action chunk, or its velocity, (B, T, A).

        Args:
            action: The noisy action, (B, T, A); None unless ``denoise``.
            time: Its time in [0, 1], (B,); None unless ``denoise``.
            observation: What :meth:`encode` returned: the normalised observations, oldest first, (B, To, O), unless
                a subclass says otherwise.

        Raises:
            UserError: A shape differs from what the network was built for, or the noisy action and time are
                missing or given against ``denoise``.
        """
        if (action is not None) != self.denoise or (time is not None) != self.denoise:
            need = "needs both" if self.denoise else "takes neither"
            raise UserError(
                f"{type(self).__name__}: a noisy action and a time: built with denoise={self.denoise} it {need}; "
                "set denoise to the algorithm's `denoises`"
            )
        seen = self.unpack(observation)
        if action is not None:
            self.check_shape("actions", action, (self.horizon, self.action_dim))
        return self.compute(action, time, *seen)

    def unpack(self, observation: Tensor) -> tuple[Tensor, ...]:
        """Check what :meth:`encode` returned, and split it into ``observation`` and ``context`` of :meth:`compute`."""
        self.check_shape("observations", observation, (self.observe, self.observation_dim))
        return (observation,)

    def check_shape(self, what: str, value: Tensor, shape: tuple[int, ...]) -> None:
        """Raise a UserError unless ``value`` is a batch of ``shape``."""
        if value.shape[1:] != shape:
            raise UserError(
                f"{type(self).__name__}: built for {what} of shape (batch, {', '.join(map(str, shape))}), got "
                f"{tuple(value.shape)}; the data and the network's sizes must agree"
            )

    @abstractmethod
    def compute(
        self, action: Tensor | None, time: Tensor | None, observation: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Do the work of :meth:`forward` on checked arguments.

        Args:
            action: See :meth:`forward`.
            time: See :meth:`forward`.
            observation: (B, To, O).
            context: What else is observed, (B, context_dim), to be added to the embedded observations. A sum, not a
                concatenation: its size grows with the width and that of the observations does not, and for muP no
                weight may read both.
        """

    @abstractmethod
    def parameter_roles(self) -> dict[str, Role]:
        """Name the weights that an optimizer or muP cannot tell, for their rules.

        Returns:
            Parameter name to ``"input"`` (fan-in is fixed by the task), ``"readout"`` (fan-out is), or ``"condition"``
            (sees one row per sample, see :func:`~dopr_lightning.optim.roles.parameter_roles`). Parameters not named are
            for the optimizer to classify.
        """


def check_positive(network: nn.Module, **sizes: int) -> None:
    """Raise a UserError that names the first of ``sizes`` below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{type(network).__name__}: {name} must be at least 1, got {size}")
