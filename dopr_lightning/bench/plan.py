"""What has the preconditioner to do for a model: which sizes, how many rows, which solver?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dopr_lightning.preconditioner import ActivationPreconditioner
from dopr_lightning.preconditioner.cost import Cost, LayerSize, Method, layer_cost
from dopr_lightning.preconditioner.coverage import find_coverage
from dopr_lightning.preconditioner.exact import ExactStack
from dopr_lightning.preconditioner.layers import DenseLayer, DiagonalLayer, Layer
from dopr_lightning.preconditioner.lowrank import LowRankStack
from dopr_lightning.preconditioner.solvers import Solver
from dopr_lightning.preconditioner.stack import Stack
from dopr_lightning.preconditioner.woodbury import WoodburyStack

RANK = 24
"""Directions in use of the low-rank solver where nothing is known of the data: what policies needed was 5 to 30 of the
48 it starts with (docs/results/rank)."""


@dataclass(frozen=True)
class Planned:
    """One layer and how it is solved.

    Attributes:
        size: What the preconditioner sees of it.
        method: How it is solved.
        copies_rows: Whether its input is rearranged, at the cost of a copy.
        copies_gradient: Whether its gradient is, there and back.
    """

    size: LayerSize
    method: Method
    copies_rows: bool
    copies_gradient: bool

    @property
    def cost(self) -> Cost:
        """In FLOPs and bytes."""
        return layer_cost(self.size, self.method)


def plan(
    model: nn.Module,
    rows: Mapping[str, int] | int,
    *,
    solver: Solver = "auto",
    update_every: int = 10,
    ranks: int = 1,
    shards: int = 1,
    rank: int = RANK,
) -> list[Planned]:
    """What will be done, before any of it is; nothing is computed, so ``model`` may lie on the meta device.

    Args:
        model: The model.
        rows: Rows per step and rank, by the weight's name as from :func:`count_rows`; or one number for all layers.
        solver: As in the preconditioner.
        update_every: As in the preconditioner.
        ranks: Ranks over which statistics are pooled.
        shards: Ranks over which each gradient is sharded (FSDP2, by rows).
        rank: Directions that low-rank layers use, at most those tracked.
    """
    preconditioner = ActivationPreconditioner(model, solver=solver, update_every=update_every)
    preconditioner.remove()
    planned = []
    for stack in preconditioner._stacks:
        counts = {layer.name: rows if isinstance(rows, int) else rows[layer.name] for layer in stack.layers}
        # What a WoodburyStack decides once it meets the rows, and what takes its place where there are several ranks.
        if isinstance(stack, WoodburyStack) and (ranks > 1 or any(2 * n >= stack.dim for n in counts.values())):
            stack = ExactStack(stack.layers, stack.options)
        for index, layer in enumerate(stack.layers):
            method = _method(stack, index)
            if isinstance(stack, LowRankStack):
                method = replace(method, rank=min(rank, method.tracked))
            planned.append(_planned(layer, counts[layer.name], method, shards))
    return planned


def observed(preconditioner: ActivationPreconditioner) -> list[Planned]:
    """What is being done, after some steps of one process: the solvers and ranks that the data has led to."""
    return [
        _planned(layer, stack.records[index].rows_seen, _method(stack, index))
        for stack in preconditioner._stacks
        for index, layer in enumerate(stack.layers)
    ]


def held_bytes(preconditioner: ActivationPreconditioner) -> int:
    """Bytes of all tensors that the preconditioner keeps between steps, each storage once."""
    storages: dict[int, int] = {}
    _collect([*map(vars, preconditioner._stacks), preconditioner._replay._recordings], storages)
    return sum(storages.values())


def count_rows(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, int]:
    """Rows of every layer's input in one forward, by the weight's name; costs nothing on the meta device."""
    rows: dict[str, int] = {}

    def hook(layer: Layer) -> Any:
        def add(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = layer.input(args, kwargs)
            if isinstance(layer, DenseLayer):
                count = layer.rows(x).shape[1]
            else:
                assert isinstance(layer, DiagonalLayer)
                count = layer.tokens(x)[0].numel()
            rows[layer.name] = rows.get(layer.name, 0) + count

        return add

    handles = [
        module.register_forward_hook(hook(layer), with_kwargs=True)
        for layer in find_coverage(model).layers
        for module in layer.modules
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return rows


def _method(stack: Stack, index: int) -> Method:
    if isinstance(stack, LowRankStack):
        return Method(stack.solver, stack.tracked, stack.ranks[index])
    return Method(stack.solver, factor=isinstance(stack, ExactStack) and stack.factors)


def _planned(layer: Layer, rows: int, method: Method, shards: int = 1) -> Planned:
    weight = layer.weight
    held = weight.grad
    weight.grad = torch.empty_like(weight)  # whose shape as a matrix is asked
    blocks, m, dim = layer.gradient().shape
    weight.grad = held
    size = LayerSize(layer.name, blocks, -(-m // shards), dim, rows)
    # A convolution's channels lie apart in its input, and if the kernel has several taps in its gradient.
    copies_gradient = layer.kind == "conv" and weight[0, 0].numel() > 1
    return Planned(size, method, copies_rows=layer.kind.startswith("conv"), copies_gradient=copies_gradient)


def _collect(value: Any, storages: dict[int, int]) -> None:
    if isinstance(value, torch.Tensor):
        if not isinstance(value, nn.Parameter):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, storages)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, storages)
    elif type(value).__module__.startswith("dopr_lightning") and not isinstance(value, Layer):
        _collect(vars(value), storages)
