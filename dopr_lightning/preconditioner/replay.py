"""How does a GPU get many small rewrites without the host launching each of them?

A layer's rewrite is three to five launches, and for a small layer they take the host longer than the GPU: on an H200 4
ms for the 50 layers of a 1-D U-Net, of which the GPU works 0.8. So they are recorded once as a CUDA graph, and then are
one launch: 0.1 ms of the host's time, and about as much to see that the same is asked for. A graph reads and writes
fixed addresses and gradients have none, so it works on copies: two more passes over the gradients, which pay only where
these are small.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dopr_lightning.preconditioner.stack import Stack

log = logging.getLogger(__name__)

LARGEST = 1 << 20
"""Mean entries of a layer's gradient up to which launches take longer than copies (4 MiB in fp32: 4 us on an H200)."""

MOST = 1 << 26
"""Entries of all copies (256 MiB in fp32)."""

KEPT = 4
"""Recordings: which layers have a gradient may alternate between steps."""


Task = tuple[tuple[Hashable, ...], ...]
"""What a recording reads, which layers have inverses, and which parameters gradients of which kinds."""


class Replay:
    """Applies stacks; records those on a GPU that can be recorded when they are to do the same for the second time."""

    def __init__(self) -> None:
        self._recordings: dict[Task, _Recording | None] = {}  # None: would not pay
        self._last: Task | None = None
        self._failed = False

    def apply(self, stacks: Sequence[Stack]) -> None:
        """Rewrite the gradients of all layers of ``stacks``."""
        together = [] if self._failed else [stack for stack in stacks if _recordable(stack)]
        task, parameters = _task(together)
        if together and task not in self._recordings and not _pays(together, parameters):
            self._make_room(task)
        recording = self._recordings.get(task)
        if recording is None and task in self._recordings:
            together = []
        _launch([stack for stack in stacks if stack not in together])
        if recording is not None:
            recording.play(parameters)
        elif together:
            for stack in together:
                stack.apply(fixed=True)
            if task == self._last:
                self._record(task, together, parameters)
            self._last = task

    def _record(self, task: Task, stacks: Collection[Stack], parameters: Sequence[nn.Parameter]) -> None:
        self._make_room(task)
        try:
            self._recordings[task] = _Recording(stacks, parameters)
        except RuntimeError as error:  # what else runs on this GPU may forbid it
            self._failed = True
            log.warning("rewrites of gradients are launched one by one, since they cannot be recorded: %s", error)

    def _make_room(self, task: Task) -> None:
        # What reads tensors that a stack has replaced will not be asked for again.
        kept = {other: recording for other, recording in self._recordings.items() if other[0] == task[0]}
        self._recordings = ({} if len(kept) == KEPT else kept) | {task: None}


class _Recording:
    """The launches of ``stacks`` on copies of the gradients of ``parameters``."""

    def __init__(self, stacks: Collection[Stack], parameters: Sequence[nn.Parameter]) -> None:
        gradients = _gradients(parameters)
        self._copies = [torch.empty_like(gradient) for gradient in gradients]
        self._graph = torch.cuda.CUDAGraph()
        try:
            for parameter, copy in zip(parameters, self._copies, strict=True):
                parameter.grad = copy
            # Other threads, which load data or wait for collectives, may call what is forbidden while recording.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                for stack in stacks:
                    stack.apply(fixed=True)
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    def play(self, parameters: Sequence[nn.Parameter]) -> None:
        gradients = _gradients(parameters)
        torch._foreach_copy_(self._copies, gradients)
        self._graph.replay()
        torch._foreach_copy_(gradients, self._copies)


def _here(stack: Stack) -> bool:
    return stack.device.type == "cuda" and stack.device.index == torch.cuda.current_device()


def _recordable(stack: Stack) -> bool:
    return _here(stack) and stack.addresses is not None


def _launch(stacks: Sequence[Stack]) -> None:
    """Launch rewrites one by one; on a GPU into two queues.

    A product with a few tens of columns occupies a fraction of the GPU's processors: two at once take little longer.
    The second queue has a workspace of cuBLAS's (32 MiB on an H200) and temporaries of its own.
    """
    beside = _half([stack for stack in stacks if _here(stack)])
    if beside:
        queue, current = _second_queue(beside[0].device), torch.cuda.current_stream()
        queue.wait_stream(current)
        with torch.cuda.stream(queue):
            for stack in beside:
                stack.apply()
    for stack in stacks:
        if stack not in beside:
            stack.apply()
    if beside:
        current.wait_stream(queue)


def _half(stacks: Sequence[Stack]) -> list[Stack]:
    """Some of them, with about half of all weights; none of one."""
    halves: tuple[list[Stack], list[Stack]] = [], []
    for stack in sorted(stacks, key=lambda stack: stack.entries, reverse=True):
        min(halves, key=lambda half: sum(other.entries for other in half)).append(stack)
    return halves[1]


@cache
def _second_queue(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _pays(stacks: Collection[Stack], parameters: Sequence[nn.Parameter]) -> bool:
    """Whether there is a gradient, all are dense tensors of this process alone, and small enough."""
    if any(g.layout != torch.strided or isinstance(g, DTensor) for g in _gradients(parameters)):
        return False
    entries = sum(parameter.numel() for parameter in parameters)
    return small_enough(entries, sum(len(stack.layers) for stack in stacks))


def small_enough(entries: int, layers: int) -> bool:
    """Whether so many layers whose gradients have so many entries in all take longer to launch than to copy."""
    return 0 < entries <= min(MOST, LARGEST * layers)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _task(stacks: Sequence[Stack]) -> tuple[Task, list[nn.Parameter]]:
    """What the launches depend on besides numbers on the device, and the parameters that have a gradient."""
    # Every step asks. Layers may share a parameter.
    parameters = list(dict.fromkeys([p for stack in stacks for layer in stack.layers for p in layer.tensors]))
    gradients = [parameter.grad for parameter in parameters]
    kinds = [None if gradient is None else (gradient.dtype, gradient.layout) for gradient in gradients]
    task = (
        tuple([stack.addresses for stack in stacks]),
        tuple([step is None for stack in stacks for step in stack.refreshed_at]),
        tuple(map(id, parameters)),
        tuple(kinds),
    )
    return task, [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
