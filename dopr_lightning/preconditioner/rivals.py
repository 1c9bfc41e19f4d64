"""Has another preconditioner rewritten this gradient already?"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet, ref

from torch import Tensor

from dopr_lightning.preconditioner.layers import Layer

Stamp = tuple[int, int]


class Rivals:
    """Other preconditioners of the same weights, for as long as they live.

    Having one is no mistake: it may be in disuse, a notebook's say, or serve another loss. That both rewrite one
    gradient is.

    Args:
        layers: Of one's own preconditioner.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = {id(layer.weight): layer for layer in layers}
        self._shared: list[tuple[ref[Rivals], Layer]] = []
        self._rewritten: dict[Tensor, Stamp] = {}
        for other in _living:
            common = next((weight for weight in other._layers if weight in self._layers), None)
            if common is not None:  # one layer tells
                self._shared.append((ref(other), self._layers[common]))
                other._shared.append((ref(self), other._layers[common]))
        _living.add(self)

    def refuse_twice(self) -> None:
        """Raise RuntimeError where the gradients are as another has left them."""
        for other, layer in self._shared:
            rival, gradient = other(), layer.weight.grad
            if rival is not None and gradient is not None and rival._rewritten.get(layer.weight) == _stamp(gradient):
                raise RuntimeError(
                    f"{layer.name}: another preconditioner has rewritten this gradient already, and twice would be "
                    "wrong; call remove() of one of them, or exclude the module in one"
                )

    def note(self) -> None:
        """The gradients have been rewritten."""
        self._rewritten = {
            layer.weight: _stamp(gradient) for _, layer in self._shared if (gradient := layer.weight.grad) is not None
        }

    def leave(self) -> None:
        """Nothing will be rewritten any more."""
        _living.discard(self)
        self._rewritten = {}


def _stamp(gradient: Tensor) -> Stamp:
    """What tells a gradient from another, and from itself once it has been written to."""
    gradient = getattr(gradient, "_local_tensor", gradient)  # a DTensor's is what is written to
    return id(gradient), gradient._version


_living: WeakSet[Rivals] = WeakSet()
