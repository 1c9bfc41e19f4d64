"""How does a network read a time in [0, 1]?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIME_FEATURES = 32
"""Features per time. Fixed, whatever the width: for muP they are an input dimension like any other.

16 periods, each 1.6 times the last, separate the times of any sampler in use.
"""

LONGEST, SHORTEST = 4.0, 4e-3
"""Periods, in units of the path from noise to action; those of openpi's flow policies.

The longest is so long that its features are monotone over the path, the shortest resolves a hundred Euler
steps.
"""


def sinusoidal_embedding(t: Tensor) -> Tensor:
    """Return sines and cosines of ``t`` at periods in geometric progression from 4 to 0.004.

    Args:
        t: Times in [0, 1], any shape, floating point.

    Returns:
        ``t.shape + (TIME_FEATURES,)``, in the dtype of ``t``: all sines, then all cosines.
    """
    exponent = torch.linspace(0, 1, TIME_FEATURES // 2, dtype=t.dtype, device=t.device)
    angle = t.unsqueeze(-1) * (2 * math.pi / LONGEST) * (LONGEST / SHORTEST) ** exponent
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
