"""What does the host do meanwhile, and with how many of its cores?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads."""
    before = torch.get_num_threads()
    if before == count:  # set by whoever started this thread, and restored there
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(function: Callable[[Tensor], tuple[Tensor, ...]], matrices: Tensor, count: int) -> tuple[Tensor, ...]:
    """``function(matrices)`` by several threads, each with matrices of its own.

    The results are those of one thread, bit for bit. On two idle cores two threads take 0.6 to 0.8 of the time of one
    for 22 to 46 eigenproblems of 48 x 48 to 64 x 64, and as long as one for eight; after operators whose threads still
    wait for more on the same cores, nothing is gained.

    Args:
        function: One long operator on each matrix by itself. Of short ones, sixteen threads that take turns at Python's
            lock need twice as long as one (measured beside an H200).
        matrices: On the host, (B, ...).
        count: Threads, each held to one core; no more than there are matrices.
    """
    used = min(count, len(matrices))
    with threads(1):
        if used < 2:
            return function(matrices)
        first, *others = matrices.tensor_split(used)
        running = [_pool().submit(_alone, function, part) for part in others]
        results = [function(first), *(future.result() for future in running)]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def in_background(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Begin ``function()`` in a thread; what is returned waits for its result, or raises what it raised.

    Args:
        function: What to do.
        device: What it waits for. A thread begins with the first GPU, where it would take memory from another rank's.
    """

    def task() -> Result:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return function()

    return _background().submit(task).result


def pinned(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers on the host, where a GPU can fetch them from without the host waiting for what is queued there."""
    return numbers.pin_memory() if device.type == "cuda" else numbers


class ToHost:
    """Tensors on their way from devices: the host goes on, until it waits for them."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=tensor.device.type == "cuda") for tensor in tensors]
        devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        self._arrived = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait(self) -> list[Tensor]:
        """The tensors on the host, once they are there."""
        for event in self._arrived:
            event.synchronize()
        return self._tensors


def _alone(function: Callable[[Tensor], tuple[Tensor, ...]], part: Tensor) -> tuple[Tensor, ...]:
    torch.set_num_threads(1)  # of this thread, and of new ones until ``threads`` restores what they begin with
    return function(part)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dopr")


@cache
def _background() -> ThreadPoolExecutor:
    # Apart from the pool, whose threads it waits for.
    return ThreadPoolExecutor(1, thread_name_prefix="dopr-background")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_background.cache_clear)
