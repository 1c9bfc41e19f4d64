"""How does the spread of initial values follow the width? Seen as a factory draws them, on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dopr_lightning.mup.shapes import DELTA, Shape

_KEEPING = frozenset({"clone", "_to_copy", "add", "sub", "clamp", "erfinv"})
"""Operators whose result has the spread of their first tensor, but for a factor that is the same at every width."""

_EXACT = 1e-6
"""Of ratios of spreads, which are found by a few operations on numbers."""


class Draws(TorchDispatchMode):
    """Within this, the spread of random values is noted, up to a factor that is the same at every width.

    Followed are draws, copies of them, and products with numbers: ``torch.nn.init``, ``0.02 * torch.randn(...)``. Not
    ``orthogonal_``, which does nothing on the meta device: values that it replaces stand for its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._spreads: dict[int, tuple[UntypedStorage, float | None]] = {}  # holds it: its number would come again

    def spread(self, tensor: Tensor) -> float | None:
        """Of a tensor, or of the one that it is a view of; None where it is not known, of constants for example."""
        return self._spreads.get(tensor.untyped_storage()._cdata, (None, None))[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self._note(result, self._spread_of(func._schema.name.removeprefix("aten::").removesuffix("_"), args))
        return result

    def _spread_of(self, operator: str, args: Sequence[Any]) -> float | None:
        """Of what an operator gives, in place or not."""
        if operator == "uniform":
            return (args[2] if len(args) > 2 else 1.0) - (args[1] if len(args) > 1 else 0.0)
        if operator == "normal":
            return args[2] if len(args) > 2 else 1.0
        if operator in ("rand", "randn", "rand_like", "randn_like"):
            return 1.0
        spreads = [self.spread(arg) for arg in args[:2] if isinstance(arg, Tensor)]
        if operator == "copy":
            return spreads[-1]
        if not spreads or spreads[0] is None:
            return None
        if operator in ("mul", "div") and isinstance(args[1], int | float):
            return spreads[0] * args[1] if operator == "mul" else spreads[0] / args[1]
        return spreads[0] if operator in _KEEPING else None

    def _note(self, tensor: Tensor, spread: float | None) -> None:
        storage = tensor.untyped_storage()
        if spread is not None or tensor.nbytes >= storage.nbytes():  # entries beside those that are set stay drawn
            self._spreads[storage._cdata] = storage, spread


@contextmanager
def noted_draws() -> Iterator[Draws]:
    """Note draws, those of ``nn.init.trunc_normal_`` too, which else does nothing on the meta device."""

    def truncated(tensor: Tensor, mean: float, std: float, *others: Any, **also: Any) -> Tensor:
        # The bounds of a truncated draw are far from it, as in the usual calls, or fall like its spread.
        with torch.no_grad():
            return tensor.normal_(mean, std)

    original = nn.init._no_grad_trunc_normal_
    nn.init._no_grad_trunc_normal_ = truncated
    try:
        with Draws() as draws:
            yield draws
    finally:
        nn.init._no_grad_trunc_normal_ = original


def as_drawn(name: str, shape: Shape, wide: Sequence[int], ratio: float) -> Shape:
    """What the spread of initial values says of the dimensions that they follow.

    Args:
        name: The parameter's.
        shape: What the layer it belongs to says of it.
        wide: Its sizes in the wider model.
        ratio: The spread there over that in the base model.

    Raises:
        ValueError: It follows none.
    """
    if shape.drawn_like is not None and shape.fan_in is None:
        stays = math.isclose(ratio, 1, rel_tol=_EXACT)  # not as torch draws biases
        return replace(shape, drawn_like=None, drawn_by=()) if stays else shape
    if shape.fan_in is None or shape.role == "fixed":
        return shape
    fans = tuple(sorted((shape.fan_out, shape.fan_in)))
    for dims in (shape.drawn_by, (), (shape.fan_in,), (shape.fan_out,), fans):
        growth = sum(wide[dim] for dim in dims) / sum(shape.base[dim] for dim in dims) if dims else 1.0
        if math.isclose(ratio, growth**-0.5, rel_tol=_EXACT):
            return replace(shape, drawn_by=dims)
    raise ValueError(
        f"{name}: its initial values are drawn {ratio:.3g} times as large at {DELTA} times the base width. muP takes "
        "over what stays as large, or falls like the inverse square root of the inputs, of the outputs or of their "
        "sum, as in torch.nn.init: draw it so, and leave muP's own share to initialize()"
    )
