"""Algorithms that pytorch-optimizer has right. Importing it takes most of a second: import this module when one is due.

The library's constructors swallow any keyword; these name what there is, and a wrong one is a TypeError. What the
library keeps as attributes of the instance is lost when an Optimizer is copied or pickled; those of a class are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_optimizer
from torch import Tensor


class Signum(pytorch_optimizer.SignSGD):
    """Signum (Bernstein et al. 2018, arXiv 1802.04434, Algorithm 2): the sign of the averaged gradient.

    ``m = b m + (1 - b) g``, then ``w -= lr (sign(m) + weight_decay w)``. The paper's experiments put the decay into the
    gradient; decoupled, it does what its name says however large the gradient is. Every entry moves by lr in every
    step, further than AdamW's do: take a lower rate, as for Lion. ``momentum`` 0.9 is the paper's.
    """

    maximize = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(list(params), lr=lr, weight_decay=weight_decay, momentum=momentum, foreach=foreach)


class Lion(pytorch_optimizer.Lion):
    """Lion (Chen et al. 2023, arXiv 2302.06675): Signum whose step weighs the new gradient more than its memory does.

    ``w -= lr (sign(b1 m + (1 - b1) g) + weight_decay w)``, then ``m = b2 m + (1 - b2) g``; the betas are the paper's.
    It recommends a third to a tenth of AdamW's rate, and as many times its weight decay.
    """

    maximize = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        foreach: bool | None = None,
    ) -> None:
        super().__init__(list(params), lr=lr, weight_decay=weight_decay, betas=betas, foreach=foreach)


class SOAP(pytorch_optimizer.SOAP):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321): Adam in the eigenbases of Shampoo's preconditioners.

    The defaults are the paper's. As in the authors' code, the first step only measures and moves nothing, vectors get
    Adam, and so does any dimension beyond ``max_precondition_dim``. A kernel has one basis per dimension, taps too,
    which costs less than flattening it would. The bases take (rows^2 + cols^2) entries twice over, and a QR
    decomposition every ``precondition_frequency`` steps.

    Raises:
        ValueError: Parameters are sharded, as FSDP2 does; or the rate is a tensor.
    """

    maximize = False
    data_format = "channels_first"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
    ) -> None:
        super().__init__(
            list(params),
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            precondition_frequency=precondition_frequency,
            max_precondition_dim=max_precondition_dim,
        )
        if any(isinstance(group["lr"], Tensor) for group in self.param_groups):
            # The correction of its bias would be multiplied into that tensor, in place, at every step.
            raise ValueError("SOAP needs a learning rate that is a number, not a tensor; lr=float(lr)")
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if hasattr(parameter, "device_mesh"):
                raise ValueError("SOAP needs whole matrices, which FSDP2 shards; use DDP, or another base")
