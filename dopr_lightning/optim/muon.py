"""torch's Muon for weights of any shape: a convolution's kernel is the matrix C_out x (C_in * K)."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """:class:`torch.optim.Muon` that also takes parameters of more than two dimensions, flattened behind the first.

    Raises:
        ValueError: A parameter has fewer than two dimensions, or is not laid out so that it can be flattened.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        groups = [dict(g) if isinstance(g, dict) else {"params": [g]} for g in params]
        originals = [list(group["params"]) for group in groups]
        for group, parameters in zip(groups, originals, strict=True):
            group["params"] = [as_matrix(p.detach()) for p in parameters]
        super().__init__(groups, **options)  # checks what it is given: matrices
        for group, parameters in zip(self.param_groups, originals, strict=True):
            group["params"] = parameters

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> bool:
        complex_found = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        # Views: what is written into them reaches the parameter and its state.
        params_with_grad[:] = map(as_matrix, params_with_grad)
        grads[:] = [grad.reshape(p.shape) for grad, p in zip(grads, params_with_grad, strict=True)]
        muon_momentum_bufs[:] = map(as_matrix, muon_momentum_bufs)
        return complex_found


def as_matrix(parameter: Tensor, algorithm: str = "Muon") -> Tensor:
    """A view of ``parameter`` as a matrix, flattened behind its first dimension.

    Raises:
        ValueError: It has fewer than two dimensions, or its memory layout allows no such view.
    """
    if parameter.dim() < 2:
        raise ValueError(f"{algorithm} takes matrices, not a parameter of shape {tuple(parameter.shape)}")
    if not parameter.is_contiguous():
        raise ValueError(
            f"{algorithm} sees a kernel of shape {tuple(parameter.shape)} as a matrix, which its memory layout "
            "(channels_last?) does not allow; make the parameter contiguous"
        )
    return parameter.view(parameter.shape[0], -1)
