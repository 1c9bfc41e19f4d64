"""How does a GPU count the rows of many small layers without the host launching each?

A layer's statistics are five to ten launches, and for a small layer they take the host longer than the GPU: 0.35 ms for
each of the 50 layers of a 1-D U-Net on an H200's host. So small inputs are held, and those of layers alike are counted
together: at the backward's end, before which nobody can know that its input is wanted no more, or as soon as what is
held is large.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from dopr_lightning.preconditioner.engine import at_the_end_of_backward, current_backward
from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.stack import Stack

DEVICES = ("cuda",)
"""Where launches take longer than putting inputs together does."""

LARGEST = 1 << 24
"""Bytes behind an input up to which they do (16 MiB take an H200 a few tens of microseconds)."""

MOST = 1 << 26
"""Bytes that are held at once."""


class Joining:
    """Holds inputs until those of layers alike are counted together.

    Args:
        stack_of: Where each layer's statistics are.
        count: Counts the rows of a layer's input; or of several layers', see
            :meth:`~dopr_lightning.preconditioner.stack.Stack.add`.
    """

    def __init__(self, stack_of: Mapping[Layer, Stack], count: Callable[[Sequence[Layer], Tensor], None]) -> None:
        self._stack_of = stack_of
        self._count = count
        self._held: list[_Held] = []
        self._bytes = 0
        self._backward: int | None = None

    def hold(self, layer: Layer, x: Tensor) -> bool:
        """Hold the input of one call of a layer, in its backward, if that may bring anything.

        Args:
            layer: The layer.
            x: Its input, which nothing overwrites before the backward's end.

        Returns:
            Whether it is held; else it is for the caller to count.
        """
        size = x.untyped_storage().nbytes()  # all of it stays for a view
        if x.device.type not in DEVICES or x.numel() == 0 or size > LARGEST or not layer.joins(x):
            return False
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        if self._held and self._held[0].stream != stream:
            return False
        if self._bytes + size > MOST:
            self.flush()
        self._held.append(_Held(layer, x, x._version, stream))
        self._bytes += size
        backward = current_backward()
        if backward != self._backward:  # one that failed never came to its end
            self._backward = backward
            at_the_end_of_backward(self._end)
        return True

    def flush(self) -> None:
        """Count what is held.

        Raises:
            RuntimeError: An input was overwritten meanwhile.
        """
        if not self._held:
            return
        held, stream = self._held, self._held[0].stream
        self.clear()
        alike: dict[Hashable, list[tuple[int, _Held]]] = {}
        for one in held:
            if one.x._version != one.version:
                raise RuntimeError(
                    f"{one.layer.name}: its input was overwritten before the backward came to its end; exclude the "
                    "module, or leave the input as it is until then"
                )
            stack = self._stack_of[one.layer]
            kind = stack, one.layer.rearrangement, one.x.shape, one.x.dtype
            alike.setdefault(kind, []).append((stack.index_of[one.layer], one))
        with torch.cuda.stream(stream):
            for calls in alike.values():
                for run in _side_by_side(calls):
                    inputs = [one.x for one in run]
                    # This may replace a stack (Woodbury's by an exact one); the new one keeps the layers' order.
                    self._count([one.layer for one in run], inputs[0] if len(run) == 1 else torch.cat(inputs))
        if stream is not None:  # at the backward's end the engine has joined its queues already
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def clear(self) -> None:
        """Forget what is held."""
        self._held, self._bytes = [], 0

    @torch.no_grad()
    def _end(self) -> None:
        self._backward = None
        if self._held:
            with torch.autocast(self._held[0].x.device.type, enabled=False):
                self.flush()


@dataclass(frozen=True)
class _Held:
    """One call: the layer, its input as it was, and the queue of the GPU that it is in."""

    layer: Layer
    x: Tensor
    version: int
    stream: torch.cuda.Stream | None


def _side_by_side(calls: list[tuple[int, _Held]]) -> Iterator[list[_Held]]:
    """Calls of layers with numbers, in runs of consecutive ones. A layer that was called twice is in two runs."""
    in_order = enumerate(sorted(calls, key=itemgetter(0)))
    for _, run in groupby(in_order, key=lambda call: call[1][0] - call[0]):
        yield [one for _, (_, one) in run]
