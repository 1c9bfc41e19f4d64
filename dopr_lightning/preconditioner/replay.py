"""How does a GPU get many small rewrites without the host launching each of them?

A layer's rewrite is three to five launches, and for a small layer they take the host longer than the GPU: on an H200 4
ms for the 50 layers of a 1-D U-Net, of which the GPU works 0.8. So they are recorded once as a CUDA graph, and then are
one launch: 0.1 ms of the host's time, and about as much to see that the same is asked for. A graph reads and writes
fixed addresses and gradients have none, so it works on copies: two more passes over the gradients, which pay only where
these are small.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
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
"""What a recording reads, which layers have inverses, and the dtypes of the parameters' gradients."""


class Replay:
    """Applies stacks; records those on a GPU that can be recorded when they are to do the same for the second time."""

    def __init__(self) -> None:
        self._recordings: dict[Task, _Recording | None] = {}  # None: would not pay
        self._last: Task | None = None
        self._failed = False
        self._known: _Known | None = None

    def forget(self) -> None:
        """To be called where a refresh or a new stack changes what is read, or which layers have inverses."""
        self._known = None

    def apply(self, stacks: Sequence[Stack]) -> None:
        """Rewrite the gradients of all layers of ``stacks``."""
        known = self._known
        if known is None or known.device != _current_device():
            known = self._known = _Known(stacks, recording=not self._failed)
        gradients = [at.get().grad for at in known.locations]
        task = known.task(gradients)
        if known.together and task not in self._recordings and not _pays(known.together, gradients):
            self._make_room(task)
        recording = self._recordings.get(task)
        if recording is not None:
            known.rest.launch()
            recording.play([gradient for gradient in gradients if gradient is not None])
        elif task in self._recordings or not known.together:
            known.all.launch()
        else:
            known.rest.launch()
            for stack in known.together:
                stack.apply(fixed=True)
            if task == self._last:
                self._record(task, known.together, [at.get() for at in known.locations])
            self._last = task

    def _record(self, task: Task, stacks: Sequence[Stack], parameters: Sequence[nn.Parameter]) -> None:
        self._make_room(task)
        try:
            self._recordings[task] = _Recording(stacks, parameters)
        except RuntimeError as error:  # what else runs on this GPU may forbid it
            self._failed = True
            self.forget()
            log.warning("rewrites of gradients are launched one by one, since they cannot be recorded: %s", error)

    def _make_room(self, task: Task) -> None:
        # What reads tensors that a stack has replaced will not be asked for again.
        kept = {other: recording for other, recording in self._recordings.items() if other[0] == task[0]}
        self._recordings = ({} if len(kept) == KEPT else kept) | {task: None}


class _Recording:
    """The launches of ``stacks`` on copies of the gradients of ``parameters``, of those that have one."""

    def __init__(self, stacks: Sequence[Stack], parameters: Sequence[nn.Parameter]) -> None:
        given = [(p, p.grad) for p in parameters if p.grad is not None]
        self._copies = [torch.empty_like(gradient) for _, gradient in given]
        self._graph = torch.cuda.CUDAGraph()
        try:
            for (parameter, _), copy in zip(given, self._copies, strict=True):
                parameter.grad = copy
            # Other threads, which load data or wait for collectives, may call what is forbidden while recording.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                for stack in stacks:
                    stack.apply(fixed=True)
        finally:
            for parameter, gradient in given:
                parameter.grad = gradient

    def play(self, gradients: list[Tensor]) -> None:
        torch._foreach_copy_(self._copies, gradients)
        self._graph.replay()
        torch._foreach_copy_(gradients, self._copies)


class _Known:
    """What every step asks for and only a refresh changes.

    Attributes:
        together: Stacks that can be recorded.
        locations: Where their parameters are, each once.
        rest: The other stacks.
        all: All stacks.
        device: The GPU that was current.
    """

    def __init__(self, stacks: Sequence[Stack], *, recording: bool) -> None:
        self.device = _current_device()
        self.together = [stack for stack in stacks if recording and _recordable(stack)]
        at = [location for stack in self.together for layer in stack.layers for location in layer.locations]
        self.locations = list({id(location.get()): location for location in at}.values())  # layers may share one
        self.rest = _Launches([stack for stack in stacks if stack not in self.together])
        self.all = _Launches(stacks)
        self._read = tuple([stack.addresses for stack in self.together])
        self._have = tuple([record.refreshed_at is None for stack in self.together for record in stack.records])

    def task(self, gradients: Sequence[Tensor | None]) -> Task:
        """What is to be done with these gradients of the parameters."""
        return self._read, self._have, tuple([None if gradient is None else gradient.dtype for gradient in gradients])


class _Launches:
    """Launches rewrites one by one; on a GPU into two queues.

    A product with a few tens of columns occupies a fraction of the GPU's processors: two at once take little longer.
    The second queue has a workspace of cuBLAS's (32 MiB on an H200) and temporaries of its own.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self._beside = _half([stack for stack in stacks if _here(stack)])
        self._here = [stack for stack in stacks if stack not in self._beside]

    def launch(self) -> None:
        if self._beside:
            queue, current = _second_queue(self._beside[0].device), torch.cuda.current_stream()
            queue.wait_stream(current)
            with torch.cuda.stream(queue):
                for stack in self._beside:
                    stack.apply()
        for stack in self._here:
            stack.apply()
        if self._beside:
            current.wait_stream(queue)


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _here(stack: Stack) -> bool:
    return stack.device.type == "cuda" and stack.device.index == torch.cuda.current_device()


def _recordable(stack: Stack) -> bool:
    return _here(stack) and stack.addresses is not None


def _half(stacks: Sequence[Stack]) -> list[Stack]:
    """Some of them, with about half of all weights; empty if there is only one."""
    halves: tuple[list[Stack], list[Stack]] = [], []
    for stack in sorted(stacks, key=lambda stack: stack.entries, reverse=True):
        min(halves, key=lambda half: sum(other.entries for other in half)).append(stack)
    return halves[1]


@cache
def _second_queue(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _pays(stacks: Sequence[Stack], gradients: Sequence[Tensor | None]) -> bool:
    """Whether there is a gradient, all are dense tensors of this process alone, and small enough."""
    present = [gradient for gradient in gradients if gradient is not None]
    if any(g.layout != torch.strided or isinstance(g, DTensor) for g in present):
        return False
    return small_enough(sum(g.numel() for g in present), sum(len(stack.layers) for stack in stacks))


def small_enough(entries: int, layers: int) -> bool:
    """Whether so many layers whose gradients have so many entries in all take longer to launch than to copy."""
    return 0 < entries <= min(MOST, LARGEST * layers)
