r"""From sums and counts to a damped covariance.

:math:`\Sigma = \frac{1}{n} \sum_i z_i z_i^\top`, uncentred (paper, Section 4); the damping is relative to its trace.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

DampingScale = Literal["trace", "mean"]


def damping_values(trace: Tensor, dim: int | Tensor, gamma: float, scale: DampingScale) -> Tensor:
    r"""The damping :math:`\lambda` per covariance.

    Args:
        trace: Traces of the covariances, any shape.
        dim: Their size d, or each one's.
        gamma: Relative damping.
        scale: ``"trace"`` for :math:`\gamma \operatorname{tr} \Sigma`, which grows like the largest eigenvalue as the
            layer widens, so that a gamma tuned narrow keeps its meaning wide; ``"mean"`` for
            :math:`\gamma \operatorname{tr} \Sigma / d`, which weakens with width.
    """
    return trace * gamma if scale == "trace" else trace * gamma / dim


def mean_over_rows(sums: Tensor, counts: Tensor) -> None:
    """Divide sums (blocks, ...) by their counts (blocks,) in place; blocks without rows stay 0."""
    sums.div_(counts.clamp(min=1).to(sums.dtype).view(-1, *[1] * (sums.dim() - 1)))


def usable(counts: Tensor, trace: Tensor) -> Tensor:
    """Which covariances can be inverted, (blocks,).

    A row with NaN or infinity shows in the trace. A layer whose inputs are all 0 learns nothing from them.
    """
    return (counts > 0) & trace.isfinite() & (trace > torch.finfo(trace.dtype).tiny)


class RunningMean:
    """Statistics averaged over refreshes, the mean corrected for the zero it starts from (as in Adam).

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

    def share(self, valid: Tensor) -> Tensor:
        """Collect the weight of one more refresh where ``valid`` (blocks,); returns the new statistics' share of it."""
        weight = self.ema * self.weight + (1 - self.ema)
        self.weight = torch.where(valid, weight, self.weight)
        return (1 - self.ema) / weight

    def update(self, new: Tensor, valid: Tensor) -> None:
        """Average ``new`` in where ``valid``: one NaN batch must not poison the average."""
        shape = (-1, *[1] * (new.dim() - 1))
        share = torch.where(valid, self.share(valid), 0).view(shape)
        self.value.lerp_(torch.where(valid.view(shape), new, 0), share)
