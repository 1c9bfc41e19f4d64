"""Convolutions: the rows are the channels at each position, or the kernel's patches."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dopr_lightning.preconditioner.layers.base import ConvCovariance, MatrixLayer


class Convolution(MatrixLayer):
    r"""A convolution with any stride, padding, padding mode, dilation and groups.

    ``conv="channel"`` (the default of the preconditioner): the rows are the channels at every input position,
    d_in = C_in / groups. The linear maps of its input that a convolution's weight can absorb mix channels at every
    position alike, so this is the least covariance that makes the update invariant to them (paper, Prop. 4.2 and
    its principle), and it stays cheap.

    ``conv="patch"``: the rows are the padded kernel patches (im2col), d_in = C_in / groups * kernel size. Finer,
    and exactly the covariance of the Linear layer that the convolution is; rarely affordable.

    With the homogeneous coordinate, a channel covariance is shared by K kernel taps, but the bias is added once.
    Writing b = K^{-1/2} \sum_k b_k gives each tap its own share and the coordinate the value K^{-1/2}; then large
    damping still recovers the plain gradient of the bias, and the undamped update the affine invariance.
    """

    kind = "conv"
    rearranges = True
    outputs_first = True

    def __init__(self, name: str, module: nn.modules.conv._ConvNd, *, conv: ConvCovariance, bias: bool) -> None:
        self.channels = module.in_channels // module.groups
        shape = module.out_channels, self.channels, *module.kernel_size
        super().__init__(name, module, shape=shape, bias="bias" if bias else None)
        self.conv = conv
        self.blocks = module.groups
        # Kept here: the module may be one of several that share the weight.
        self._spatial = len(module.kernel_size)
        self._windows = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
        self._padding = module._reversed_padding_repeated_twice
        self._padding_mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        kernel_elements = math.prod(module.kernel_size)
        if conv == "channel":
            self.taps, self.features = kernel_elements, self.channels
        else:
            self.taps, self.features = 1, self.channels * kernel_elements
        self.homogeneous_value = self.taps**-0.5
        self.dim = self.features + self.homogeneous

    @property
    def rearrangement(self) -> Hashable:
        geometry = (tuple(self._windows), tuple(self._padding), self._padding_mode) if self.conv == "patch" else None
        return super().rearrangement, geometry, self.homogeneous_value if self.homogeneous else None

    def grid(self, x: Tensor) -> tuple[int, ...]:
        return _grid(x, self._spatial)

    def joins(self, x: Tensor) -> bool:
        return x.dim() == self._spatial + 2

    def vectors(self, x: Tensor) -> Tensor:
        x = x if x.dim() == self._spatial + 2 else x[None]
        if self.conv == "patch":
            return self._patches(x)
        return _channels(x, self.blocks)

    def _patches(self, x: Tensor) -> Tensor:
        """The kernel patches after padding, (blocks, B * output positions, C / groups * kernel elements)."""
        x = F.pad(x, self._padding, mode=self._padding_mode)
        for axis, (size, stride, dilation) in enumerate(self._windows, start=2):
            x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # (B, C, *positions, *kernel) -> (blocks, B * positions, C / groups * kernel elements)
        x = x.unflatten(1, (self.blocks, self.channels))
        positions = list(range(3, 3 + self._spatial))
        kernel = list(range(3 + self._spatial, 3 + 2 * self._spatial))
        return x.permute(1, 0, *positions, 2, *kernel).reshape(self.blocks, -1, self.features)

    def to_matrix(self, gradient: Tensor) -> Tensor:
        matrix = gradient.flatten(2).unflatten(0, (self.blocks, -1))  # (blocks, C_out / groups, C_in / groups, K)
        if self.conv == "channel":
            matrix = matrix.transpose(2, 3)
        return matrix.reshape(self.blocks, -1, self.features)

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        if self.conv == "channel":
            matrix = matrix.unflatten(1, (-1, self.taps)).transpose(2, 3)
        return matrix.reshape(shape)


class TransposedConvolution(MatrixLayer):
    """A transposed convolution: each input position is multiplied by the whole kernel, once, as in a Linear layer.

    So the channel covariance already is the full one, and ``conv`` makes no difference. The bias stays outside: with a
    stride, output positions differ in how many kernel taps reach them, so no bias can absorb a shift of the input.
    """

    kind = "conv_transpose"
    rearranges = True

    def __init__(
        self, name: str, module: nn.modules.conv._ConvTransposeNd, *, conv: ConvCovariance, bias: bool
    ) -> None:
        shape = module.in_channels, module.out_channels // module.groups, *module.kernel_size
        super().__init__(name, module, shape=shape)
        self.blocks = module.groups
        self.dim = module.in_channels // module.groups
        self._spatial = len(module.kernel_size)

    def grid(self, x: Tensor) -> tuple[int, ...]:
        return _grid(x, self._spatial)

    def joins(self, x: Tensor) -> bool:
        return x.dim() == self._spatial + 2

    def vectors(self, x: Tensor) -> Tensor:
        return _channels(x if x.dim() == self._spatial + 2 else x[None], self.blocks)

    def to_matrix(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(1).unflatten(0, (self.blocks, self.dim)).transpose(1, 2)

    def to_weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.transpose(1, 2).reshape(shape)


def _grid(x: Tensor, spatial: int) -> tuple[int, ...]:
    """The batch, if there is one, and the positions."""
    return *x.shape[: x.dim() - spatial - 1], *x.shape[-spatial:]


def _channels(x: Tensor, groups: int) -> Tensor:
    """The channels at every position, (groups, B * positions, C / groups)."""
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    x = x.reshape(batch, groups, channels // groups, positions)
    return x.permute(1, 0, 3, 2).reshape(groups, batch * positions, channels // groups)
