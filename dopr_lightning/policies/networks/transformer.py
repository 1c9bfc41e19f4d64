"""A transformer over the action chunk, conditioned as DiT: a token per action, adaptive layer norms."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks.base import ActionNetwork, Role, check_positive
from dopr_lightning.policies.networks.time_embedding import TIME_FEATURES, sinusoidal_embedding


class Attention(nn.Module):
    """Multi-head self-attention whose logits are scaled by 8 / d, d the size of a head.

    Queries and keys that have learnt to agree have a product like d, not like the d^1/2 of random ones, so muP
    (arXiv 2203.03466, Definition 4.1) wants 1/d. 8 makes it the usual d^-1/2 at the usual d = 64.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) to (B, T, width)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=8 / q.shape[-1])
        return self.output(mixed.transpose(1, 2).flatten(2))


class AdaptiveNorm(nn.Module):
    """norm(x) (1 + scale) + shift. The norm has no gain of its own: scale is one, and a trained gain hurts transfer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Map (B, T, width) to the same, by a shift and a scale of shape (B, 1, width)."""
        return self.norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """Attention, then an MLP, each after an adaptive norm and behind a gate; all six modulations from the condition."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.norm1 = AdaptiveNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = AdaptiveNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (B, T, width) and (B, 1, width) to (B, T, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x, shift1, scale1))
        return x + gate2 * self.mlp(self.norm2(x, shift2, scale2))


class ActionTransformer(ActionNetwork):
    """DiT (Peebles & Xie 2023, arXiv 2212.09748) with a token per step of the action chunk.

    A token enters as the noisy action beside a code of its position, through one Linear: both have fixed sizes, so it
    is a pure input layer. Without ``denoise`` there is only the code. The condition is a projection of the
    observations *plus* an MLP of the time (as in the U-Net, for muP) and acts through the adaptive norms alone.

    Modulations and readout start at zero, as DiT's do: every block is the identity and the output is 0. For muP that is
    the best start (arXiv 2203.03466, D.2): what a random readout adds to outputs and gradients differs between widths.
    The gradient then arrives in stages: at the first step only the readout's is not zero, at the third all are.

    Args:
        observation_dim: See :class:`ActionNetwork`.
        action_dim: See :class:`ActionNetwork`.
        observe: See :class:`ActionNetwork`.
        horizon: See :class:`ActionNetwork`; the number of tokens.
        denoise: See :class:`ActionNetwork`.
        width: Features per token; a multiple of ``heads``.
        depth: Blocks.
        heads: Attention heads. Keep their number when changing ``width``: for muP the heads grow instead.
        mlp_ratio: Hidden units of a block's MLP, in widths.

    Raises:
        UserError: A size is below 1, or ``width`` does not divide into ``heads``.
    """

    scales: ClassVar[tuple[str, ...]] = ("width",)

    positions: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        observe: int,
        horizon: int,
        denoise: bool,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__(observation_dim, action_dim, observe, horizon, denoise)
        check_positive(self, width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        if width % heads:
            raise UserError(
                f"ActionTransformer: width {width} is not a multiple of heads {heads}; change width, or heads at every "
                "width"
            )
        self.context_dim = width
        self.observation = nn.Linear(observe * observation_dim, width)
        if denoise:
            self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("positions", sinusoidal_embedding(torch.arange(horizon) / horizon), persistent=False)
        self.input = nn.Linear((action_dim if denoise else 0) + TIME_FEATURES, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(depth))
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.norm = AdaptiveNorm(width)
        self.readout = zeroed(nn.Linear(width, action_dim))

    def compute(
        self, action: Tensor | None, time: Tensor | None, observation: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """See :meth:`ActionNetwork.compute`."""
        condition = self.observation(observation.flatten(1))
        if context is not None:
            condition = condition + context
        tokens = self.positions.expand(len(observation), -1, -1)
        if action is not None and time is not None:
            condition = condition + self.time(sinusoidal_embedding(time))
            tokens = torch.cat([action, tokens], dim=2)

        condition = F.silu(condition).unsqueeze(1)
        x = self.input(tokens)
        for block in self.blocks:
            x = block(x, condition)
        return self.readout(self.norm(x, *self.modulation(condition).chunk(2, dim=-1)))

    def parameter_roles(self) -> dict[str, Role]:
        """See :meth:`ActionNetwork.parameter_roles`."""
        roles: dict[str, Role] = {
            "observation.weight": "input",
            "input.weight": "input",
            "readout.weight": "readout",
            "modulation.weight": "condition",
        }
        for index in range(len(self.blocks)):
            roles[f"blocks.{index}.modulation.weight"] = "condition"
        if self.denoise:
            roles |= {"time.0.weight": "input", "time.2.weight": "condition"}
        return roles


def zeroed(linear: nn.Linear) -> nn.Linear:
    """Set weight and bias to zero, and return the layer."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
