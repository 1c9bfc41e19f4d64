"""Which solver for which layers?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Literal

from dopr_lightning.preconditioner.cost import low_rank_is_cheaper
from dopr_lightning.preconditioner.diagonal import DiagonalStack
from dopr_lightning.preconditioner.exact import ExactStack
from dopr_lightning.preconditioner.layers import DiagonalLayer, Layer
from dopr_lightning.preconditioner.lowrank import FIRST_RANK, LowRankStack
from dopr_lightning.preconditioner.stack import Stack, StackOptions, gradient_shape
from dopr_lightning.preconditioner.woodbury import WoodburyStack

Solver = Literal["exact", "lowrank", "auto"]

STACKS: dict[str, type[Stack]] = {
    kind.solver: kind for kind in (ExactStack, WoodburyStack, LowRankStack, DiagonalStack)
}


def make_stacks(layers: Sequence[Layer], options: StackOptions, solver: Solver, *, pooled: bool) -> list[Stack]:
    """Sort layers into stacks by the size, dtype and device of their covariance.

    Args:
        layers: All covered layers.
        options: How covariances are estimated and damped.
        solver: What the user asked for.
        pooled: Whether rows are spread over ranks.

    Returns:
        The stacks, largest covariances first: their sums are sent first, so that smaller ones arrive while they are
        inverted.
    """

    def key(layer: Layer) -> tuple[Any, ...]:
        return -layer.dim, isinstance(layer, DiagonalLayer), str(layer.weight.dtype), str(layer.weight.device)

    def kind(layer: Layer) -> type[Stack]:
        if isinstance(layer, DiagonalLayer):
            return DiagonalStack
        if solver == "lowrank" or (
            solver == "auto" and low_rank_is_cheaper(layer.dim, FIRST_RANK, options.update_every)
        ):
            return LowRankStack
        return ExactStack if pooled or options.ema else WoodburyStack

    in_order = sorted(layers, key=lambda layer: (key(layer), gradient_shape(layer)))
    groups = [list(group) for _, group in groupby(in_order, key=key)]
    return [kind(group[0])(group, options) for group in groups]
