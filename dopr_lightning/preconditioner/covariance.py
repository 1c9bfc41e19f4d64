r"""From sums and counts to a damped covariance.

:math:`\Sigma = \frac{1}{n} \sum_i z_i z_i^\top`, uncentred (paper, Section 4); the damping is relative to its trace.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

DampingScale = Literal["trace", "mean"]

Numbers = TypeVar("Numbers", Tensor, NDArray[Any])
"""Per covariance, on a device or on the host."""


def damping_values(trace: Tensor, dim: int, gamma: float, scale: DampingScale) -> Tensor:
    r"""The damping :math:`\lambda` per covariance.

    Args:
        trace: Traces of the covariances, any shape.
        dim: Their size d.
        gamma: Relative damping.
        scale: ``"trace"`` for :math:`\gamma \operatorname{tr} \Sigma`, which grows like the largest eigenvalue as the
            layer widens, so that a gamma tuned narrow keeps its meaning wide; ``"mean"`` for
            :math:`\gamma \operatorname{tr} \Sigma / d`, which weakens with width.
    """
    return trace * gamma if scale == "trace" else trace * gamma / dim


def mean_over_rows(sums: Tensor, counts: Tensor) -> None:
    """Divide sums (blocks, ...) by their counts (blocks,) in place; blocks without rows stay 0."""
    sums.div_(counts.clamp(min=1).to(sums.dtype).view(-1, *[1] * (sums.dim() - 1)))


def usable(trace: Numbers, damping: Numbers, dtype: torch.dtype) -> Numbers:
    """Which covariances can be inverted in a dtype, (blocks,): all is finite, and the damping not too small a divisor.

    NaN or infinity in a row shows in the trace. It is 0 where there were no rows, or only zeros, from which a layer
    learns nothing.
    """
    limits = torch.finfo(dtype)
    return (damping > limits.tiny) & (trace + damping <= limits.max)


def collected(weight: Numbers, ema: float) -> tuple[Numbers, Numbers]:
    """How much weight an average has after one more refresh, and the share of it that is the new statistics'.

    The mean is corrected for the zero it starts from, as in Adam: 1 - ema^t after t refreshes, all of it new at first.
    """
    weight = ema * weight + (1 - ema)
    return weight, (1 - ema) / weight


class RunningMean:
    """Statistics averaged over refreshes, see :func:`collected`.

    Args:
        like: A tensor of the statistics' shape, blocks first, dtype and device.
        ema: Weight of the past, in (0, 1).

    Attributes:
        value: The averages, zero before the first update.
        weight: Weight collected so far, 1 - ema^t after t updates, (blocks,).
    """

    def __init__(self, like: Tensor, ema: float) -> None:
        self.ema = ema
        self.value = torch.zeros_like(like)
        self.weight = like.new_zeros(like.shape[0])

    def update(self, new: Tensor, valid: Tensor) -> None:
        """Average ``new`` in where ``valid``: one NaN batch must not poison the average."""
        shape = (-1, *[1] * (new.dim() - 1))
        weight, share = collected(self.weight, self.ema)
        self.weight = torch.where(valid, weight, self.weight)
        share = torch.where(valid, share, 0).view(shape)
        self.value.lerp_(torch.where(valid.view(shape), new, 0), share)
