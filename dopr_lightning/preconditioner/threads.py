"""How many of the machine's cores does PyTorch use, and for what?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many."""
    before = torch.get_num_threads()
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


def _alone(function: Callable[[Tensor], tuple[Tensor, ...]], part: Tensor) -> tuple[Tensor, ...]:
    torch.set_num_threads(1)  # of this thread, and of new ones until ``threads`` restores what they begin with
    return function(part)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dopr")


if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
