"""torch's Muon for weights of any shape: a convolution's kernel is the matrix C_out x (C_in * K).

And what such optimizers are made of: parameters as matrices, many of one shape at once, made orthogonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim._muon import _adjust_lr

_STACK = 2**24
"""Matrices are orthogonalised together up to this many entries: many small ones, but large ones one by one, whose
temporary copies would cost memory and gain no time."""


class MatrixOptimizer(Optimizer):
    """Steps parameters that are matrices of one shape together; a subclass says how in ``_step``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure``, if any, is evaluated before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Of layers that may have no inputs, a condition's say, the weights may be empty.
            for parameters in stackable(p for p in group["params"] if p.grad is not None and p.numel()):
                self._step(parameters, group)
        return loss

    def _step(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Step parameters that are matrices of one shape."""
        raise NotImplementedError

    def _directions(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The gradients as matrices, averaged by the momentum, or by Nesterov's."""
        gradients = [p.grad.flatten(1) for p in parameters]  # type: ignore[union-attr]
        momenta, beta = self._buffers(parameters, "momentum_buffer"), group["momentum"]
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        return list(torch._foreach_lerp(gradients, momenta, beta)) if group["nesterov"] else momenta

    def _buffers(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        """A state of every parameter, 0 at first, as matrices."""
        for p in parameters:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [as_matrix(self.state[p][name]) for p in parameters]


class Muon(MatrixOptimizer, torch.optim.Muon):
    """:class:`torch.optim.Muon` that also takes parameters of more than two dimensions, flattened behind the first.

    Matrices of one shape are orthogonalised together, and on the CPU not in bfloat16, which is slow there.

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

    def _step(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        weights = [as_matrix(p) for p in parameters]
        stacked = torch.stack(self._directions(parameters, group))
        updates = orthogonalize(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], weights[0].shape)
        torch._foreach_add_(weights, list(updates.unbind()), alpha=-rate)


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
    return parameter.flatten(1)


def stackable(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that are matrices of one shape and kind, not too many at once."""
    alike: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        rows = parameter.shape[0]
        # The mesh it is sharded over, if any, which tensor parallelism gives to some layers only.
        kind = parameter.dtype, parameter.device, getattr(parameter, "device_mesh", None)
        alike.setdefault((rows, parameter.numel() // rows, *kind), []).append(parameter)
    for (rows, cols, *_), members in alike.items():
        count = max(1, _STACK // (rows * cols))
        for start in range(0, len(members), count):
            yield members[start : start + count]


def orthogonalize(
    stacked: Tensor,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> Tensor:
    """Matrices (k, rows, cols) with their singular values brought between 0.7 and 1.2, save for those near 0.

    By the iteration of Newton and Schulz: in bfloat16 on accelerators, as torch's Muon, but on the CPU, where that is
    several times slower, in the precision given or float32.
    """
    a, b, c = coefficients
    on_cpu = stacked.device.type == "cpu"
    x = stacked.to(torch.promote_types(stacked.dtype, torch.float32) if on_cpu else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stacked.dtype)
