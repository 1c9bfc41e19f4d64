"""What does every policy network take and return?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

from dopr_lightning.errors import UserError

Role = Literal["input", "readout"]


class ActionNetwork(nn.Module, ABC):
    """Observations to an action chunk; or, when it denoises, to the velocity of a noisy chunk.

    One network class serves both algorithms, chosen at construction by ``denoise``: with it the network has
    inputs for the noisy action and the time, without it these inputs do not exist (they are not fed zeros),
    so that no weight is dead and regression is the plain network of the paper.

    Subclasses name their first layer ``input`` where it has one and their last layer ``readout``, register
    the layers in the order of the forward pass, and implement :meth:`compute` and :meth:`parameter_roles`.

    Args:
        observation_dim: O, size of one observation.
        action_dim: A, size of one action.
        observe: To, observations given.
        horizon: T, actions returned.
        denoise: Whether a noisy action and a time are inputs: the algorithm's ``denoises``.

    Raises:
        UserError: A size is below 1.
    """

    def __init__(self, observation_dim: int, action_dim: int, observe: int, horizon: int, denoise: bool) -> None:
        super().__init__()
        check_positive(self, observation_dim=observation_dim, action_dim=action_dim, observe=observe, horizon=horizon)
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.observe = observe
        self.horizon = horizon
        self.denoise = denoise

    def forward(self, action: Tensor | None, time: Tensor | None, observation: Tensor) -> Tensor:
        """Return an action chunk, or its velocity, (B, T, A).

        Args:
            action: The noisy action, (B, T, A); None unless ``denoise``.
            time: Its time in [0, 1], (B,); None unless ``denoise``.
            observation: Normalised observations, oldest first, (B, To, O).

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
        self._check_shape("observations", observation, self.observe, self.observation_dim)
        if action is not None:
            self._check_shape("actions", action, self.horizon, self.action_dim)
        return self.compute(action, time, observation)

    def _check_shape(self, what: str, value: Tensor, length: int, dim: int) -> None:
        if value.ndim != 3 or value.shape[1:] != (length, dim):
            raise UserError(
                f"{type(self).__name__}: built for {what} of shape (batch, {length}, {dim}), got "
                f"{tuple(value.shape)}; the data and the network's sizes must agree"
            )

    @abstractmethod
    def compute(self, action: Tensor | None, time: Tensor | None, observation: Tensor) -> Tensor:
        """Do the work of :meth:`forward` on checked arguments."""

    @abstractmethod
    def parameter_roles(self) -> dict[str, Role]:
        """Name the weights that touch a dimension fixed by the task, for the optimizer's and muP's rules.

        Returns:
            Parameter name to ``"input"`` (fan-in is fixed by the task) or ``"readout"`` (fan-out is).
            Parameters not named are for the optimizer to classify.
        """


def check_positive(network: nn.Module, **sizes: int) -> None:
    """Raise a UserError that names the first of ``sizes`` below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{type(network).__name__}: {name} must be at least 1, got {size}")
