"""AdaMuon (arXiv 2507.11005): orthogonal updates of signs, divided entry by entry by their running size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from dopr_lightning.optim.muon import as_matrix

Scale = Literal["rms", "spectral"]

_RMS = 0.2
"""Root mean square of AdamW's updates, which the paper's Section 3.3 aligns to."""

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5

_STACK = 2**24
"""Matrices are orthogonalised together up to this many entries: many small ones, but large ones one by one, whose
temporary copies would cost memory and gain no time."""


class AdaMuon(Optimizer):
    r"""Implements AdaMuon (Si, Zhang and Shen 2025, arXiv 2507.11005, Algorithm 1).

    .. math::
        M_t &= \beta M_{t-1} + (1 - \beta) G_t \\
        O_t &= \mathrm{NewtonSchulz}(\mathrm{sign}(M_t)) \\
        V_t &= \beta V_{t-1} + (1 - \beta) O_t \odot O_t \\
        \hat O_t &= O_t \oslash (\sqrt{V_t} + \epsilon) \\
        W_t &= (1 - \eta \lambda) W_{t-1} - \eta \gamma_t \hat O_t

    The paper's M is a sum without the factor 1 - beta, which the sign does not see. Parameters of more than two
    dimensions are flattened behind the first. Newton and Schulz's iteration has the five steps and the coefficients of
    Muon; it runs in bfloat16 on accelerators, as there, but on the CPU, where that is several times slower, in the
    parameter's precision or float32.

    ``scale`` chooses gamma. ``"rms"``, the paper's, :math:`0.2 \sqrt{AB} / \|\hat O\|_F` for an A x B matrix, gives
    updates the root mean square of AdamW's, whose learning rates then serve. What it does not fix is their spectral
    norm: the division by the root of V takes the orthogonality away, most where few directions dominate. Over widths of
    64 to 1024 that norm grows with an exponent between 1/2, for updates of full rank, and 1, for those of rank 1, so no
    one learning rate fits all widths. ``"spectral"``, :math:`0.2 \sqrt{\max(A, B)} / \|\hat O\|_2`, is the same for an
    orthogonal update and has the exponent 1/2 for all, that of Muon with ``match_rms_adamw``: the form for muP. The
    norm is estimated by one step of power iteration from the direction of the last update, and never taken for less
    than a matrix with these entries must have, so that no update exceeds that of ``"rms"``.

    pytorch-optimizer's AdaMuon is that of the paper's first version, which takes no sign.

    Args:
        params: Parameters of two dimensions or more, or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled from the gradient.
        momentum: Beta, for both averages as in the paper; its value is the paper's.
        nesterov: Take the sign of ``beta M + (1 - beta) G`` in place of M, as the authors' code does and their
            algorithm does not.
        eps: Against division by zero where a parameter gets no gradient.
        scale: ``"rms"`` or ``"spectral"``.

    Raises:
        ValueError: A parameter has fewer than two dimensions or cannot be flattened, or a value out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = False,
        eps: float = 1e-8,
        scale: Scale = "rms",
    ) -> None:
        if scale not in get_args(Scale):
            raise ValueError(f"unknown scale {scale!r}; choose from {', '.join(get_args(Scale))}")
        if not (lr >= 0 and weight_decay >= 0 and eps >= 0 and 0 <= momentum < 1):
            raise ValueError(
                f"lr, weight_decay and eps must not be negative and momentum be in [0, 1), got {lr}, {weight_decay}, "
                f"{eps} and {momentum}"
            )
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "eps": eps}
        super().__init__(params, {**options, "scale": scale})
        for group in self.param_groups:
            for parameter in group["params"]:
                as_matrix(parameter, "AdaMuon")  # refuses what is none

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure``, if any, is evaluated before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _stackable([p for p in group["params"] if p.grad is not None]):
                self._step(parameters, group)
        return loss

    def _step(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Step parameters that are matrices of one shape."""
        weights = [as_matrix(p) for p in parameters]
        gradients = [p.grad.reshape(w.shape) for p, w in zip(parameters, weights, strict=True)]  # type: ignore[union-attr]
        momenta = [as_matrix(self._state(p)["momentum_buffer"]) for p in parameters]
        variances = [as_matrix(self._state(p)["variance"]) for p in parameters]
        beta, eps = group["momentum"], group["eps"]

        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        directions = torch._foreach_lerp(gradients, momenta, beta) if group["nesterov"] else momenta
        stacked = orthogonalize(torch.stack(list(torch._foreach_sign(directions))))
        updates = list(stacked.unbind())  # views: what is done to them is done to the stack
        torch._foreach_mul_(variances, beta)
        torch._foreach_addcmul_(variances, updates, updates, value=1 - beta)
        sizes = torch._foreach_sqrt(variances)
        torch._foreach_add_(sizes, eps)
        torch._foreach_div_(updates, sizes)

        rows, cols = weights[0].shape
        norms = stacked.norm(dim=(1, 2), keepdim=True) / math.sqrt(min(rows, cols))
        if group["scale"] == "spectral":
            norms = torch.maximum(norms, self._spectral_norms(parameters, stacked))
        stacked.mul_(_RMS * math.sqrt(max(rows, cols)) / (norms + eps))
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"])

    def _spectral_norms(self, parameters: Sequence[Tensor], stacked: Tensor) -> Tensor:
        """Of every matrix of the stack, estimated from below: one step of power iteration from where the last ended."""
        states = [self._state(p) for p in parameters]
        for state in states:
            if "direction" not in state:
                # Noise, since anything regular may be orthogonal to the matrix, as ones are behind a LayerNorm.
                noise = torch.randn(stacked.shape[2], generator=torch.Generator().manual_seed(0))
                state["direction"] = (noise / noise.norm()).to(stacked)
        before = torch.stack([state["direction"] for state in states]).unsqueeze(2)
        left = _unit(stacked @ before)
        right = stacked.mT @ left
        norms = right.norm(dim=1, keepdim=True)
        after = torch.where(norms > 0, _unit(right), before)
        torch._foreach_copy_([state["direction"] for state in states], list(after.squeeze(2).unbind()))
        return norms

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["variance"] = torch.zeros_like(parameter)
        return state


def orthogonalize(stacked: Tensor) -> Tensor:
    """Matrices, all of whose dimensions but the last two count, with their singular values brought near 1."""
    a, b, c = _NEWTON_SCHULZ
    on_cpu = stacked.device.type == "cpu"
    x = stacked.to(torch.promote_types(stacked.dtype, torch.float32) if on_cpu else torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stacked.dtype)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)


def _stackable(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters that may be seen as matrices of one shape and kind, not too many at once."""
    alike: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        rows = parameter.shape[0]
        alike.setdefault((rows, parameter.numel() // rows, parameter.dtype, parameter.device), []).append(parameter)
    for (rows, cols, *_), members in alike.items():
        count = max(1, _STACK // (rows * cols))
        for start in range(0, len(members), count):
            yield members[start : start + count]
