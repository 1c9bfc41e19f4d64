r"""From sums and counts to a damped covariance.

:math:`\Sigma = \frac{1}{n} \sum_i z_i z_i^\top`, uncentred (paper, Section 4); the damping is relative to its trace.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

DampingScale = Literal["trace", "mean"]


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
    return trace * (gamma if scale == "trace" else gamma / dim)


def trace(covariance: Tensor, diagonal: bool) -> Tensor:
    """Trace of each covariance: (..., d, d) -> (...), or (..., d) -> (...) if diagonal."""
    return (covariance if diagonal else covariance.diagonal(dim1=-2, dim2=-1)).sum(-1)


class RunningCovariance:
    """Covariances averaged over refreshes, the mean corrected for the zero it starts from (as in Adam).

    Args:
        like: A tensor of the covariances' shape, (blocks, d, d) or (blocks, d), dtype and device.
        ema: Weight of the past, in [0, 1). 0, the paper's choice, takes each refresh's rows alone.

    Attributes:
        value: The covariances, zero before the first update.
        weight: Weight collected so far, 1 - ema^t after t updates, (blocks,).
    """

    def __init__(self, like: Tensor, ema: float) -> None:
        self.ema = ema
        self.value = torch.zeros_like(like)
        self.weight = like.new_zeros(like.shape[0])

    def update(self, covariance: Tensor, valid: Tensor) -> None:
        """Average ``covariance`` in where ``valid`` (blocks,): one NaN batch must not poison the average."""
        weight = self.ema * self.weight + (1 - self.ema)
        shape = (-1, *[1] * (covariance.dim() - 1))
        # lerp is exact at step 1, that is, without an EMA.
        averaged = torch.lerp(self.value, covariance, ((1 - self.ema) / weight).view(shape))
        self.value = torch.where(valid.view(shape), averaged, self.value)
        self.weight = torch.where(valid, weight, self.weight)
