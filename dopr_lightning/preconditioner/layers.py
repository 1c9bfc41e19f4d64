r"""Which rows does a layer's weight multiply, and how does its gradient look as a matrix over them?

Every covered layer computes, perhaps after a rearrangement, :math:`y = W z` for many rows :math:`z`. A
:class:`Layer` says what these rows are, and shows the gradient as the matrix :math:`G` whose columns are the
coordinates of :math:`z`, so that :math:`M = G (\Sigma + \lambda I)^{-1}` is the same product for all of them.
A new layer type is one class here and one line in :data:`LAYER_TYPES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvCovariance = Literal["channel", "patch"]


class Layer(ABC):
    """One covered weight.

    Args:
        name: The public name of the weight, ``"blocks.2.fc1.weight"``.
        module: The module that owns it.
        conv: The covariance of a convolution, see :class:`Convolution`; other layers ignore it.
        bias: Treat the bias as the weight of a homogeneous coordinate appended to every row (paper, Prop. 4.2:
            needed for invariance to *affine* maps of the input). Ignored where the layer has no such bias.

    Attributes:
        blocks: Number of independent covariances: the groups of a convolution, else 1.
        dim: Size of one covariance, d_in (with the homogeneous coordinate where there is one).
        diagonal: The covariance is diagonal and is kept as a vector of size ``dim``.
    """

    kind: ClassVar[str]
    diagonal: ClassVar[bool] = False
    blocks: int = 1
    dim: int

    def __init__(self, name: str, module: nn.Module, *, conv: ConvCovariance, bias: bool) -> None:
        self.name = name
        self.module = module
        self.conv = conv
        own_bias = getattr(module, "bias", None)
        self.homogeneous = bias and own_bias is not None and own_bias.requires_grad

    @property
    def weight(self) -> nn.Parameter:
        """The covered parameter, looked up anew since ``load_state_dict(assign=True)`` replaces it."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter:
        """The bias, for layers with :attr:`homogeneous`."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def has_gradient(self) -> bool:
        """Whether there is a gradient to rewrite."""
        return self.weight.grad is not None and (not self.homogeneous or self.bias.grad is not None)

    @property
    def parameter_names(self) -> list[str]:
        """Public names of the parameters whose gradients :meth:`write` rewrites."""
        return [self.name, self.name.removesuffix("weight") + "bias"] if self.homogeneous else [self.name]

    @abstractmethod
    def add_second_moment(self, x: Tensor, total: Tensor) -> int:
        """Add the sum of z z^T over the rows of ``x`` to ``total``, (blocks, dim, dim) or (1, dim) if diagonal.

        Returns:
            The number of rows n, per block.
        """

    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient as a matrix over the rows' coordinates, (blocks, m, dim); (1, dim, m) if diagonal."""

    @abstractmethod
    def write(self, matrix: Tensor) -> None:
        """Put a matrix shaped like :meth:`gradient` back into ``.grad``."""


class _DenseLayer(Layer):
    """A layer with a full covariance over explicit rows."""

    homogeneous_value = 1.0

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """The rows z that the weight multiplies, (blocks, n, dim without the homogeneous coordinate)."""

    def add_second_moment(self, x: Tensor, total: Tensor) -> int:
        # The dtype of `total` decides, not the user's autocast: bf16 sums lose small directions, fp16 overflows.
        rows = self.rows(x).to(total.dtype)
        if self.homogeneous:
            rows = F.pad(rows, (0, 1), value=self.homogeneous_value)
        total.baddbmm_(rows.transpose(1, 2), rows)
        return rows.shape[1]


class Linear(_DenseLayer):
    """:class:`torch.nn.Linear` with any leading dimensions: every leading position is a row."""

    kind = "linear"
    module: nn.Linear

    def __init__(self, name: str, module: nn.Linear, *, conv: ConvCovariance, bias: bool) -> None:
        super().__init__(name, module, conv=conv, bias=bias)
        self.dim = module.in_features + self.homogeneous

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, self.module.in_features)

    def gradient(self) -> Tensor:
        grad = _grad(self.weight)
        if self.homogeneous:
            grad = torch.cat([grad, _grad(self.bias)[:, None]], dim=1)
        return grad[None]

    def write(self, matrix: Tensor) -> None:
        _grad(self.weight).copy_(matrix[0, :, : self.module.in_features])
        if self.homogeneous:
            _grad(self.bias).copy_(matrix[0, :, -1])


class Convolution(_DenseLayer):
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
    module: nn.modules.conv._ConvNd

    def __init__(self, name: str, module: nn.modules.conv._ConvNd, *, conv: ConvCovariance, bias: bool) -> None:
        super().__init__(name, module, conv=conv, bias=bias)
        self.blocks = module.groups
        self.kernel_elements = math.prod(module.kernel_size)
        self.channels = module.in_channels // module.groups
        if conv == "channel":
            self.taps, self.features = self.kernel_elements, self.channels
        else:
            self.taps, self.features = 1, self.channels * self.kernel_elements
        self.homogeneous_value = self.taps**-0.5
        self.dim = self.features + self.homogeneous

    def rows(self, x: Tensor) -> Tensor:
        if self.conv == "patch":
            return self._patches(x)
        x = self._batched(x).flatten(2)  # (B, C, positions)
        x = x.unflatten(1, (self.blocks, self.channels))
        return x.permute(1, 0, 3, 2).reshape(self.blocks, -1, self.channels)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.module.kernel_size) + 2 else x[None]

    def _patches(self, x: Tensor) -> Tensor:
        """The kernel patches after padding, (blocks, B * output positions, C / groups * kernel elements)."""
        module, x = self.module, self._batched(x)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        spatial = len(module.kernel_size)
        for axis, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # (B, C, *positions, *kernel) -> (blocks, B * positions, C / groups * kernel elements)
        x = x.unflatten(1, (self.blocks, self.channels))
        positions = list(range(3, 3 + spatial))
        kernel = list(range(3 + spatial, 3 + 2 * spatial))
        return x.permute(1, 0, *positions, 2, *kernel).reshape(self.blocks, -1, self.features)

    def gradient(self) -> Tensor:
        grad = _grad(self.weight).flatten(2)  # (C_out, C_in / groups, K)
        grad = grad.unflatten(0, (self.blocks, -1))  # (blocks, C_out / groups, C_in / groups, K)
        if self.conv == "channel":
            grad = grad.transpose(2, 3)
        grad = grad.reshape(self.blocks, -1, self.taps, self.features)
        if self.homogeneous:
            share = _grad(self.bias).reshape(self.blocks, -1, 1, 1) * self.homogeneous_value
            grad = torch.cat([grad, share.expand(-1, -1, self.taps, 1)], dim=-1)
        return grad.flatten(1, 2)

    def write(self, matrix: Tensor) -> None:
        matrix = matrix.unflatten(1, (-1, self.taps))  # (blocks, C_out / groups, taps, dim)
        if self.homogeneous:
            _grad(self.bias).copy_(matrix[..., -1].sum(2).flatten() * self.homogeneous_value)
            matrix = matrix[..., :-1]
        if self.conv == "channel":
            matrix = matrix.transpose(2, 3)
        grad = _grad(self.weight)
        grad.copy_(matrix.reshape(grad.shape))


class TransposedConvolution(_DenseLayer):
    """A transposed convolution: each input position is multiplied by the whole kernel, once, as in a Linear layer.

    So the channel covariance already is the full one, and ``conv`` makes no difference. The bias stays outside: with a
    stride, output positions differ in how many kernel taps reach them, so no bias can absorb a shift of the input.
    """

    kind = "conv_transpose"
    module: nn.modules.conv._ConvTransposeNd

    def __init__(
        self, name: str, module: nn.modules.conv._ConvTransposeNd, *, conv: ConvCovariance, bias: bool
    ) -> None:
        super().__init__(name, module, conv=conv, bias=False)
        self.blocks = module.groups
        self.dim = module.in_channels // module.groups

    def rows(self, x: Tensor) -> Tensor:
        x = x if x.dim() == len(self.module.kernel_size) + 2 else x[None]
        x = x.flatten(2).unflatten(1, (self.blocks, self.dim))
        return x.permute(1, 0, 3, 2).reshape(self.blocks, -1, self.dim)

    def gradient(self) -> Tensor:
        grad = _grad(self.weight).flatten(1)  # (C_in, C_out / groups * K)
        return grad.unflatten(0, (self.blocks, self.dim)).transpose(1, 2)

    def write(self, matrix: Tensor) -> None:
        grad = _grad(self.weight)
        grad.copy_(matrix.transpose(1, 2).reshape(grad.shape))


class Embedding(Layer):
    """An embedding: its rows are one-hot, so the covariance is the diagonal of the tokens' frequencies."""

    kind = "embedding"
    diagonal = True
    module: nn.Embedding

    def __init__(self, name: str, module: nn.Embedding, *, conv: ConvCovariance, bias: bool) -> None:
        super().__init__(name, module, conv=conv, bias=False)
        self.dim = module.num_embeddings

    def add_second_moment(self, x: Tensor, total: Tensor) -> int:
        total[0].index_add_(0, x.flatten(), torch.ones_like(x, dtype=total.dtype).flatten())
        return x.numel()

    def gradient(self) -> Tensor:
        return _grad(self.weight)[None]

    def write(self, matrix: Tensor) -> None:
        _grad(self.weight).copy_(matrix[0])


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # the preconditioner leaves layers without a gradient out
    return parameter.grad


LAYER_TYPES: dict[type[nn.Module], type[Layer]] = {
    nn.Linear: Linear,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.ConvTranspose1d: TransposedConvolution,
    nn.Embedding: Embedding,
}
"""Module types by the exact class; subclasses count as their nearest listed ancestor."""


def layer_type(module: nn.Module) -> type[Layer] | None:
    """The :class:`Layer` for a module, or None if its type is not covered."""
    return next((LAYER_TYPES[cls] for cls in type(module).__mro__ if cls in LAYER_TYPES), None)
