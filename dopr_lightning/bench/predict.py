"""From FLOPs and bytes to seconds: what will a step cost?

The FLOPs, bytes and memory are counts (:mod:`dopr_lightning.preconditioner.cost`). The seconds take rates,
measured in the same run or assumed, and counts of operator calls, taken from profiles of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dopr_lightning.bench.machine import LAYER_CALLS, TRACKED, Rates
from dopr_lightning.bench.plan import Planned
from dopr_lightning.preconditioner.cost import apply_flops
from dopr_lightning.preconditioner.distributed import assign
from dopr_lightning.preconditioner.replay import small_enough

PHASES = ("statistics", "reduce", "solve", "apply")

REFRESH_CALLS = 80
"""Small operators' worth of host time per layer that a refresh takes beside those of every step: the hooks and nodes in
forward and backward, counting, accepting."""

RENEWAL_CALLS = 300
STACK_CALLS = 55
"""The same of the low-rank solver's refresh, whatever the number of layers: for each number of directions tracked, and
for each size of layer."""

REPLAY_CALLS = 20
LAYER_REPLAY_CALLS = 0.5
"""The same of a step whose rewrites are recorded, in all and per layer."""

LEAST_REWRITE = 18e-6
"""Seconds a GPU takes for one layer's rewrite, however small: four or five kernels in a row (measured, H200)."""

COLUMNS = 16
"""Products with few columns take about as long as with the next multiple of this (measured, CPU with AVX-512)."""

SUBSTITUTION = 1.3
"""Time of two triangular substitutions, in products of as many FLOPs (measured on CPU)."""


@dataclass(frozen=True)
class Prediction:
    """Of one rank, on average over the steps between refreshes.

    Attributes:
        seconds: Per step, by phase.
        floor: Seconds per step if all FLOPs went at the speed of square products and nothing else took time.
        flops: Per step.
        held: Bytes between steps.
        sent: Bytes per step handed to collectives.
    """

    seconds: dict[str, float]
    floor: float
    flops: float
    held: int
    sent: float

    @property
    def total(self) -> float:
        """Seconds per step that preconditioning adds."""
        return sum(self.seconds.values())


def predict(
    planned: Sequence[Planned],
    rates: Rates,
    *,
    update_every: int,
    ranks: int = 1,
    host_bound: bool = False,
    overlap: bool = False,
) -> Prediction:
    """What preconditioning adds to a step.

    Args:
        planned: The layers.
        rates: Of the machine.
        update_every: Steps per refresh.
        ranks: Ranks that pool statistics and share exact inverses.
        host_bound: Whether a GPU waits for its host when it trains without preconditioning, rather than the other way
            round. Without ``rates.overlap`` it does not matter.
        overlap: Whether refreshes are finished in the next step. Without ``rates.overlap`` it brings nothing.
    """
    costs = [layer.cost for layer in planned]
    statistics = _together(
        REFRESH_CALLS * rates.call * len(planned),
        sum(_statistics(layer, rates) for layer in planned),
        rates,
        host_bound,
    )
    apply = _together(
        _step_calls(planned, rates) * rates.call, sum(_apply(layer, rates) for layer in planned), rates, host_bound
    )
    # Else the host waits for the device there, and the device for the host.
    aside = overlap and rates.overlap
    solve, share = _solve(planned, rates, ranks, aside=aside, hidden=aside and not host_bound)
    pooled = ranks > 1
    sent = sum(cost.summed + cost.gathered for cost in costs) if pooled else 0
    reduce = 0.0
    if pooled and rates.network is not None:
        # A ring passes a sum round twice, a broadcast once.
        travel = sum(2 * cost.summed + cost.gathered for cost in costs) * (ranks - 1) / ranks
        reduce = travel / rates.network + 3 * rates.latency
    flops = share + sum(cost.statistics for cost in costs)
    flops = flops / update_every + sum(cost.apply for cost in costs)
    return Prediction(
        seconds={
            "statistics": statistics / update_every,
            "reduce": reduce / update_every,
            "solve": solve / update_every,
            "apply": apply,
        },
        floor=flops / rates.square,
        flops=flops,
        held=sum(cost.held for cost in costs),
        sent=sent / update_every,
    )


def _together(host: float, device: float, rates: Rates, host_bound: bool) -> float:
    """What both cost: on a CPU they take turns, on a GPU whoever is ahead of the other has time to spare."""
    if not rates.overlap:
        return host + device
    return max(host, device) if host_bound else device


def _step_calls(planned: Sequence[Planned], rates: Rates) -> float:
    """Operators' worth of host time that the rewrites of one step take."""
    methods = (layer.method for layer in planned)
    kept = [method.solver == "lowrank" or (method.solver == "exact" and not method.factor) for method in methods]
    recordable = [layer for layer, keeps in zip(planned, kept, strict=True) if keeps]
    entries = sum(layer.size.blocks * layer.size.m * layer.size.dim for layer in recordable)
    if not (rates.overlap and small_enough(entries, len(recordable))):
        return LAYER_CALLS * len(planned)
    launched = len(planned) - len(recordable)
    return REPLAY_CALLS + LAYER_REPLAY_CALLS * len(recordable) + LAYER_CALLS * launched


def _statistics(layer: Planned, rates: Rates) -> float:
    lowrank = layer.method.solver == "lowrank"
    speed = rates.skinny if lowrank else rates.square
    passes = 2 if layer.method.solver == "woodbury" else 0
    rows = 4.0 * layer.size.blocks * layer.size.rows * layer.size.dim
    if layer.method.solver == "diagonal":
        rows = 8.0 * layer.size.rows
    copies = 2 * layer.copies_rows * rows / rates.rearranged
    reading = rows / 4 * rates.read if lowrank else passes * rows / rates.bandwidth
    return layer.cost.statistics / speed + reading + copies


def _apply(layer: Planned, rates: Rates) -> float:
    entries = layer.size.blocks * layer.size.m * layer.size.dim
    seconds = 4 * layer.copies_gradient * 4.0 * entries / rates.strided  # there and back
    if layer.method.solver in ("lowrank", "woodbury"):  # in place
        used = layer.method.rank if layer.method.solver == "lowrank" else layer.size.rows
        columns = -(-used // COLUMNS) * COLUMNS
        flops = layer.size.blocks * apply_flops(layer.size.m, layer.size.dim, columns)
        seconds += flops / rates.skinny + entries * rates.touch
    else:
        speed = rates.square / (SUBSTITUTION if layer.method.factor else 1)
        seconds += layer.cost.apply / speed + 3 * 4.0 * entries / rates.bandwidth
    return max(seconds, LEAST_REWRITE) if rates.overlap else seconds


def _solve(planned: Sequence[Planned], rates: Rates, ranks: int, *, aside: bool, hidden: bool) -> tuple[float, float]:
    """Seconds of one refresh on the busiest rank, and its FLOPs: exact inverses are shared, the rest is done by all.

    A thread may solve the host's eigenproblems ``aside``; and what else the host does may be ``hidden`` by the device.
    """
    exact = [layer for layer in planned if layer.method.solver == "exact"]
    groups = sorted({layer.size.dim for layer in exact}, reverse=True)
    counts = [sum(layer.size.blocks for layer in exact if layer.size.dim == dim) for dim in groups]
    shares = assign(counts, [float(dim) ** 3 for dim in groups], ranks)
    busiest = max(
        sum((share[r].stop - share[r].start) * float(dim) ** 3 for dim, share in zip(groups, shares, strict=True))
        for r in range(ranks)
    )
    # Some keep factors, a third of the FLOPs: the busiest rank is taken to have as many of them as any.
    cubes = sum(layer.size.blocks * layer.size.dim**3.0 for layer in exact)
    kept = sum(layer.cost.solve for layer in exact) / max(1.0, cubes)
    seconds = busiest * (1 / (3 * rates.factor) + max(0.0, kept - 1 / 3) / rates.inverse)
    flops = busiest * kept
    tracked = {layer.method.tracked for layer in planned if layer.method.solver == "lowrank"}
    sizes = {layer.size.dim for layer in planned if layer.method.solver == "lowrank"}
    if not hidden:
        seconds += rates.call * (RENEWAL_CALLS * len(tracked) + STACK_CALLS * len(sizes))
    for layer in planned:
        if layer.method.solver == "exact":
            continue
        flops += layer.cost.solve
        if layer.method.solver == "lowrank" and not aside:
            seconds += (
                layer.cost.solve / rates.nystrom
                + layer.size.blocks * rates.small * (layer.method.tracked / TRACKED) ** 2
            )
        else:
            seconds += layer.cost.solve / rates.square
    return seconds, flops
