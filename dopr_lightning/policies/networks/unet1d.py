"""The temporal U-Net of Diffusion Policy: convolutions over the action chunk, conditioned by FiLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks.base import ActionNetwork, Role, check_positive
from dopr_lightning.policies.networks.time_embedding import TIME_FEATURES, sinusoidal_embedding


class Sizes(NamedTuple):
    """What all residual blocks share: convolution kernel, groups of a GroupNorm, size of the condition."""

    kernel: int
    groups: int
    condition: int


class ConvBlock(nn.Sequential):
    """Conv1d, GroupNorm, Mish; (B, inputs, T) to (B, outputs, T)."""

    def __init__(self, inputs: int, outputs: int, sizes: Sizes) -> None:
        super().__init__(
            nn.Conv1d(inputs, outputs, sizes.kernel, padding=sizes.kernel // 2),
            nn.GroupNorm(sizes.groups, outputs),
            nn.Mish(),
        )


class ResidualBlock(nn.Module):
    """Two convolutions with a FiLM between them (Perez et al. 2018, arXiv 1709.07871), and a shortcut around."""

    def __init__(self, inputs: int, outputs: int, sizes: Sizes, *, project: bool) -> None:
        super().__init__()
        self.conv1 = ConvBlock(inputs, outputs, sizes)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(sizes.condition, 2 * outputs))
        self.conv2 = ConvBlock(outputs, outputs, sizes)
        self.skip = nn.Conv1d(inputs, outputs, 1) if project else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (B, inputs, T) and (B, condition) to (B, outputs, T)."""
        scale, bias = self.film(condition).unsqueeze(-1).chunk(2, dim=1)
        return self.conv2(scale * self.conv1(x) + bias) + self.skip(x)


class Stage(nn.Module):
    """Two residual blocks at one resolution.

    Args:
        inputs: Channels.
        outputs: Channels.
        sizes: What all blocks share.
        fixed_inputs: The task sets ``inputs``, so the first shortcut is a projection even where they equal ``outputs``:
            networks of all widths, muP's base among them, then have the same parameters.
    """

    def __init__(self, inputs: int, outputs: int, sizes: Sizes, *, fixed_inputs: bool = False) -> None:
        super().__init__()
        self.block1 = ResidualBlock(inputs, outputs, sizes, project=fixed_inputs or inputs != outputs)
        self.block2 = ResidualBlock(outputs, outputs, sizes, project=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (B, inputs, T) and (B, condition) to (B, outputs, T)."""
        return self.block2(self.block1(x, condition), condition)


class ConditionalUnet1d(ActionNetwork):
    """A U-Net along the action chunk; observations and time scale and shift its channels.

    Chi et al. 2023 (arXiv 2303.04137), at the size of much-ado-about-noising. The condition is a projection
    of the observations *plus* an MLP of the time, where both of these concatenate: the sum keeps every fan-in
    either fixed by the task or growing with the width, never a mixture, which muP needs.

    Without ``denoise`` there is no noisy chunk to convolve over. The sequence fed in its place is a code of
    the position in the chunk (constant, so nothing is learnt for it), and all that depends on the
    observations enters through FiLM.

    Args:
        observation_dim: See :class:`ActionNetwork`.
        action_dim: See :class:`ActionNetwork`.
        observe: See :class:`ActionNetwork`.
        horizon: See :class:`ActionNetwork`; each level but the first halves it.
        denoise: See :class:`ActionNetwork`.
        channels: Channels per level, finest first. The default is much-ado-about-noising's; Diffusion Policy
            has (512, 1024, 2048).
        kernel_size: Of the convolutions, in action steps; odd.
        groups: Groups per GroupNorm. Keep it when changing ``channels``: muP needs their number fixed.
        condition_dim: Size of the condition.

    Raises:
        UserError: A size is below 1, the kernel is even, ``channels`` do not divide into ``groups``, or
            ``horizon`` cannot be halved that often.
    """

    scales: ClassVar[tuple[str, ...]] = ("channels", "condition_dim")

    positions: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        observe: int,
        horizon: int,
        denoise: bool,
        channels: Sequence[int] = (128, 256, 512),
        kernel_size: int = 5,
        groups: int = 8,
        condition_dim: int = 256,
    ) -> None:
        super().__init__(observation_dim, action_dim, observe, horizon, denoise)
        check_positive(self, kernel_size=kernel_size, groups=groups, condition_dim=condition_dim, levels=len(channels))
        factor = 2 ** (len(channels) - 1)
        if horizon % factor:
            raise UserError(
                f"ConditionalUnet1d: horizon {horizon} is not a multiple of {factor}, which {len(channels)} levels "
                "need; change horizon or channels"
            )
        if any(size < 1 or size % groups for size in channels):
            raise UserError(
                f"ConditionalUnet1d: channels {list(channels)} must be positive multiples of groups {groups}"
            )
        if kernel_size % 2 == 0:
            raise UserError(f"ConditionalUnet1d: kernel_size must be odd to keep the length, got {kernel_size}")

        self.context_dim = condition_dim
        sizes = Sizes(kernel_size, groups, condition_dim)
        self.observation = nn.Linear(observe * observation_dim, condition_dim)
        if denoise:
            self.time = nn.Sequential(
                nn.Linear(TIME_FEATURES, 4 * condition_dim), nn.Mish(), nn.Linear(4 * condition_dim, condition_dim)
            )
        else:
            code = sinusoidal_embedding(torch.arange(horizon) / horizon)
            self.register_buffer("positions", code.T.unsqueeze(0), persistent=False)

        first = action_dim if denoise else TIME_FEATURES
        finer, coarser = channels[:-1], channels[1:]
        self.input = Stage(first, channels[0], sizes, fixed_inputs=True)
        self.shrink = nn.ModuleList(nn.Conv1d(size, size, 3, stride=2, padding=1) for size in finer)
        self.down = nn.ModuleList(Stage(a, b, sizes) for a, b in zip(finer, coarser, strict=True))
        self.middle = Stage(channels[-1], channels[-1], sizes)
        # Each level but the finest hands its output across, beside what comes from below: twice its channels.
        self.up = nn.ModuleList(Stage(2 * b, a, sizes) for a, b in zip(finer[::-1], coarser[::-1], strict=True))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(size, size, 4, stride=2, padding=1) for size in finer[::-1])
        self.final = ConvBlock(channels[0], channels[0], sizes)
        self.readout = nn.Conv1d(channels[0], action_dim, 1)

    def compute(
        self, action: Tensor | None, time: Tensor | None, observation: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """See :meth:`ActionNetwork.compute`."""
        condition = self.observation(observation.flatten(1))
        if context is not None:
            condition = condition + context
        if action is not None and time is not None:
            x = action.transpose(1, 2)
            condition = condition + self.time(sinusoidal_embedding(time))
        else:
            x = self.positions.expand(len(observation), -1, -1)

        x = self.input(x, condition)
        across = []
        for shrink, stage in zip(self.shrink, self.down, strict=True):
            x = stage(shrink(x), condition)
            across.append(x)
        x = self.middle(x, condition)
        for stage, grow in zip(self.up, self.grow, strict=True):
            x = grow(stage(torch.cat([x, across.pop()], dim=1), condition))
        return self.readout(self.final(x)).transpose(1, 2)

    def parameter_roles(self) -> dict[str, Role]:
        """See :meth:`ActionNetwork.parameter_roles`."""
        roles: dict[str, Role] = {
            "observation.weight": "input",
            "input.block1.conv1.0.weight": "input",
            "input.block1.skip.weight": "input",
            "readout.weight": "readout",
        }
        for name, module in self.named_modules():
            if isinstance(module, ResidualBlock):
                roles[f"{name}.film.1.weight"] = "condition"
        if self.denoise:
            roles |= {"time.0.weight": "input", "time.2.weight": "condition"}
        return roles
