"""Steps with and without preconditioning in turn, so that whatever disturbs one disturbs the other."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dopr_lightning.bench.machine import synchronise
from dopr_lightning.bench.predict import PHASES
from dopr_lightning.bench.workloads import Batch, Workload

LEARNING_RATE = 1e-4
"""Small: the models train as usual, and none diverges."""

WARM_UP = 4
"""Steps at least before any is timed: the low-rank solver refreshes at each of the first three."""


_profile = partial(profile, acc_events=True)
"""Of one cycle, so the events are the same; without it torch 2.11 warns."""


class Preconditioner(Protocol):
    """What rewrites gradients between backward and the optimizer's step."""

    def step(self) -> None: ...


class Variant:
    """One copy of a model with its optimizer, AdamW.

    Args:
        workload: The model.
        device: Where it is trained.
        autocast: Dtype of its forward, None for its own.
        precondition: Makes the preconditioner; None for plain AdamW.
        mode: ``torch.compile``'s; None for a model that is not compiled.
    """

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        autocast: torch.dtype | None,
        precondition: Callable[[nn.Module], Preconditioner] | None,
        mode: str | None = None,
    ) -> None:
        self.model = workload.model(device)
        self.device, self.autocast = device, autocast
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE)
        self.preconditioner = None if precondition is None else precondition(self.model)
        if mode is not None:
            self.model.compile(mode=mode)

    def step(self, batch: Batch) -> None:
        """One training step."""
        inputs, target = batch
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = F.mse_loss(self.model(*inputs).float(), target)
        loss.backward()
        if self.preconditioner is not None:
            self.preconditioner.step()
        self.optimizer.step()

    def host_share(self, batches: Sequence[Batch]) -> float:
        """How much of the time of a training step the host takes to ask for it: 1 where it does not run ahead.

        Of steps one by one, the median: in a row it would wait wherever the device's queue is full.
        """
        if self.device.type == "cpu":
            return 1.0
        self.seconds(batches)  # the first steps allocate, and choose kernels
        shares = []
        for batch in batches:
            synchronise(self.device)
            start = time.perf_counter()
            self.step(batch)
            asked = time.perf_counter()
            synchronise(self.device)
            shares.append((asked - start) / (time.perf_counter() - start))
        return statistics.median(shares)

    def seconds(self, batches: Sequence[Batch]) -> float:
        """Training steps in a row, timed."""
        synchronise(self.device)
        start = time.perf_counter()
        for batch in batches:
            self.step(batch)
        synchronise(self.device)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Quartiles:
    """Of paired measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """The quartiles of some values; of one, that value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Limits:
    """How long to measure: at least and at most so many intervals, none begun after ``budget`` seconds."""

    least: int
    most: int
    budget: float


def paired_intervals(
    variants: Sequence[Variant], batches: Sequence[Batch], length: int, limits: Limits, *, turn: int = 1
) -> Iterator[list[float]]:
    """Mean seconds per step of each variant, interval after interval.

    All variants make the same steps before any makes the next, in an order that rotates. Up to five intervals are made
    beforehand and not timed, within the budget but for the first: they hold compilations, the solvers' warm-up, the
    first allocations, and most of the time in which the low-rank solver finds out how many directions the data needs.

    Args:
        variants: To compare.
        batches: Used in turn.
        length: Steps of an interval: a multiple of the steps between refreshes, so that their cost is counted in full.
        limits: How many intervals.
        turn: Steps that a variant makes in a row, a divisor of ``length``. 1 suits a CPU. On a GPU take a whole
            interval: the host runs ahead of the device as it does in training, which a wait after each step would
            forbid.
    """
    source = itertools.cycle(batches)
    start = time.perf_counter()
    for interval in range(5):
        if interval * length >= WARM_UP and time.perf_counter() - start > limits.budget:
            break
        for _ in range(length):
            batch = next(source)
            for variant in variants:
                variant.step(batch)
        if interval == 0:
            start = time.perf_counter()
    start = time.perf_counter()
    for interval in range(limits.most):
        if interval >= limits.least and time.perf_counter() - start > limits.budget:
            return
        totals = [0.0] * len(variants)
        for run in range(length // turn):
            some = [next(source) for _ in range(turn)]
            for place in range(len(variants)):
                index = (place + run + interval) % len(variants)
                totals[index] += variants[index].seconds(some)
        yield [total / length for total in totals]


def phases(variant: Variant, batches: Sequence[Batch], *, length: int) -> dict[str, float]:
    """Mean seconds per step that the preconditioner's phases take, from a profile of one interval."""
    activities = [ProfilerActivity.CPU]
    if variant.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _profile(activities=activities) as profiler:
        for _, batch in zip(range(length), itertools.cycle(batches), strict=False):
            variant.step(batch)
        synchronise(variant.device)
    # A range shows up twice: on the host, which only queues the work of a GPU, and there.
    on_gpu = variant.device.type == "cuda"
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = dict.fromkeys(PHASES, 0.0)
    for event in profiler.key_averages():
        phase = event.key.removeprefix("dopr::")
        if event.key.startswith("dopr::") and phase in found and event.device_type == where:
            found[phase] += (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6 / length
    return found


def peak_bytes(variant: Variant, batch: Batch, held: int) -> int:
    """Bytes of all tensors at the worst moment of one step.

    Args:
        variant: Its next step should be a refresh.
        batch: The step's.
        held: What the preconditioner holds beforehand.

    Returns:
        On a GPU the allocator's peak. On the CPU parameters, optimizer state and ``held``, and on top of them what the
        allocator's calls during the step add up to at most; tensors that the step replaces are counted beside the new
        ones to its end, so a refresh is slightly overestimated.
    """
    variant.optimizer.zero_grad()
    if variant.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(variant.device)
        variant.step(batch)
        synchronise(variant.device)
        return torch.cuda.max_memory_allocated(variant.device)
    tensors: list[Any] = [*variant.model.parameters(), *variant.model.buffers()]
    tensors += [x for state in variant.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    with _profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant.step(batch)
    results = profiler.profiler
    assert results is not None
    assert results.kineto_results is not None
    changes = [event.nbytes() for event in results.kineto_results.events() if event.name() == "[memory]"]
    return held + sum(x.nbytes for x in tensors) + max(0, *itertools.accumulate(changes))
