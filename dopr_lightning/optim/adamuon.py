"""AdaMuon (arXiv 2507.11005): orthogonal updates of signs, divided entry by entry by their running size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dopr_lightning.optim.muon import MatrixOptimizer, as_matrix, orthogonalize

Scale = Literal["rms", "spectral"]

_RMS = 0.2
"""Root mean square of AdamW's updates, as the paper takes it from "Muon is Scalable for LLM Training"."""

_POWER_STEPS = 3
"""One is enough once the direction is found; the others find it in the first updates, which are the largest."""


class AdaMuon(MatrixOptimizer):
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
    updates the root mean square of AdamW's, whose learning rates then serve. It leaves their spectral norm open, on
    which transfer over widths hangs. A matrix of signs has full rank unless almost all agree, and the iteration lifts
    all of it, so that the norm grows like width^1/2, as Muon's with ``match_rms_adamw``: 0.44 to 0.58 in residual MLPs
    of 64 to 512 units with 17 outputs, for batches of 4 to 256 and with activation preconditioning. Where one direction
    dominates, as in the first steps with a single output, it is up to width^0.9. ``"spectral"``,
    :math:`0.2 \sqrt{\max(A, B)} / \|\hat O\|_2`, has the exponent 1/2 for any update and equals the other for an
    orthogonal one. The norm is estimated by power iteration that starts from the last step's direction, and never
    taken for less than a matrix with these entries must have: no update is larger than with ``"rms"``.

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

    def _step(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        weights = [as_matrix(p) for p in parameters]
        directions, variances = self._directions(parameters, group), self._buffers(parameters, "variance")
        beta, eps = group["momentum"], group["eps"]

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
        """Of every matrix of the stack, estimated from below: power iteration from where the last step's ended."""
        states = [self.state[p] for p in parameters]
        for state in states:
            if "direction" not in state:
                # Noise, since anything regular may be orthogonal to the matrix, as ones are behind a LayerNorm.
                noise = torch.randn(stacked.shape[2], generator=torch.Generator().manual_seed(0), device="cpu")
                state["direction"] = _like(noise / noise.norm(), stacked)
        right = torch.stack([state["direction"] for state in states]).unsqueeze(2)
        for _ in range(_POWER_STEPS):
            found = stacked.mT @ _unit(stacked @ right)
            norms = found.norm(dim=1, keepdim=True)
            right = torch.where(norms > 0, _unit(found), right)
        for state, direction in zip(states, right.squeeze(2).unbind(), strict=True):
            state["direction"] = direction
        return norms


def _like(values: Tensor, other: Tensor) -> Tensor:
    """``values`` to compute with ``other``; whole on every rank where FSDP2 shards that."""
    values = values.to(device=other.device, dtype=other.dtype)
    if not hasattr(other, "device_mesh"):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values, other.device_mesh)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
