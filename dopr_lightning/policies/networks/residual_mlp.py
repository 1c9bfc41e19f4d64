"""The residual MLP: the network of the paper's Humanoid experiment."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from dopr_lightning.policies.networks.base import ActionNetwork, Role, check_positive
from dopr_lightning.policies.networks.time_embedding import TIME_FEATURES, sinusoidal_embedding


class ResidualBlock(nn.Module):
    """x + W2 gelu(W1 norm(x)), all of one width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, width) to (B, width)."""
        return x + self.fc2(self.activation(self.fc1(self.norm(x))))


class ResidualMLP(ActionNetwork):
    """Linear, ``depth`` pre-norm residual blocks, LayerNorm, Linear.

    Denoising, the flattened observations, the noisy action and the time's features enter one Linear side by
    side. All three have sizes fixed by the task, so for muP this is a pure input layer (what breaks muP is a
    concatenation with features that grow with the width), and activation preconditioning sees in one
    covariance how they go together.

    Args:
        observation_dim: See :class:`ActionNetwork`.
        action_dim: See :class:`ActionNetwork`.
        observe: See :class:`ActionNetwork`.
        horizon: See :class:`ActionNetwork`.
        denoise: See :class:`ActionNetwork`.
        width: Units per layer.
        depth: Residual blocks.

    Raises:
        UserError: A size is below 1.
    """

    scales: ClassVar[tuple[str, ...]] = ("width",)

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        observe: int,
        horizon: int,
        denoise: bool,
        width: int = 256,
        depth: int = 3,
    ) -> None:
        super().__init__(observation_dim, action_dim, observe, horizon, denoise)
        check_positive(self, width=width, depth=depth)
        self.context_dim = width
        inputs = observe * observation_dim + (horizon * action_dim + TIME_FEATURES if denoise else 0)
        self.input = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, horizon * action_dim)

    def compute(
        self, action: Tensor | None, time: Tensor | None, observation: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """See :meth:`ActionNetwork.compute`."""
        x = observation.flatten(1)
        if action is not None and time is not None:
            x = torch.cat([x, action.flatten(1), sinusoidal_embedding(time)], dim=1)
        x = self.input(x)
        if context is not None:
            x = x + context
        x = self.readout(self.norm(self.blocks(x)))
        return x.unflatten(1, (self.horizon, self.action_dim))

    def parameter_roles(self) -> dict[str, Role]:
        """See :meth:`ActionNetwork.parameter_roles`."""
        return {"input.weight": "input", "readout.weight": "readout"}
