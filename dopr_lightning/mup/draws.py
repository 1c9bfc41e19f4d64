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

_KEEPING = frozenset({"clone", "_to_copy", "cat", "stack", "neg", "add", "sub", "clamp", "erfinv"})
"""Operators whose result has the one spread of their terms, but for a factor that is the same at every width."""

_SETTING = frozenset({"masked_fill", "index_fill", "index_put", "scatter"})
"""Operators that set some entries and leave the others as they were drawn."""

_NORMS = frozenset({"norm", "norm_except_dim", "linalg_vector_norm"})

_EXACT = 1e-6
"""Of ratios of spreads, which are found by a few operations on numbers."""


class Draws(TorchDispatchMode):
    """Within this, the spread of random values is noted, up to a factor that is the same at every width.

    Followed are draws, copies and parts of them, products with numbers, and norms: ``torch.nn.init``, ``0.02 *
    torch.randn(...)``, ``weight_norm``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._spreads: dict[int, tuple[UntypedStorage, float | None]] = {}  # holds it: its number would come again

    def spread(self, tensor: Tensor) -> float | None:
        """Of a tensor, or of the one that it is a view of; None where it is not known, of constants for example."""
        storage = _storage(tensor)
        return None if storage is None else self._spreads.get(storage._cdata, (None, None))[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if isinstance(result, Tensor) and not func.is_view and name != "set_":
            spread = self._spread_of(name, args, result)
            self._note(result, spread if isinstance(spread, int | float) else None)
        return result

    def _spread_of(self, name: str, args: Sequence[Any], result: Tensor) -> Any:
        """Of what an operator gives, in place or not."""
        operator = name.removesuffix("_")
        if operator == "uniform":
            return (args[2] if len(args) > 2 else 1.0) - (args[1] if len(args) > 1 else 0.0)
        if operator == "normal":  # in place its first argument is the tensor
            given = args[1 if operator == name else 2 :]
            return given[0] if given else 1.0
        if operator in ("rand", "randn", "rand_like", "randn_like"):
            return 1.0
        terms = (
            args[0] if args and isinstance(args[0], list | tuple) else args[: 2 if operator in ("add", "sub") else 1]
        )
        spreads = {self.spread(term) for term in terms if isinstance(term, Tensor)}
        if operator == "copy":
            return self.spread(args[1])
        if len(spreads) != 1 or None in spreads:
            return None
        (spread,) = spreads
        assert spread is not None
        if operator in ("mul", "div") and isinstance(args[1], int | float) and args[1]:
            return spread * args[1] if operator == "mul" else spread / args[1]
        if operator in _NORMS:
            return spread * math.sqrt(args[0].numel() / max(result.numel(), 1))
        return spread if operator in _KEEPING | _SETTING else None

    def _note(self, tensor: Tensor, spread: float | None) -> None:
        storage = _storage(tensor)
        if storage is None or (spread is None and storage._cdata not in self._spreads):
            return
        if spread is not None or tensor.nbytes >= storage.nbytes():  # entries beside those that are set stay drawn
            self._spreads[storage._cdata] = storage, spread


def _storage(tensor: Tensor) -> UntypedStorage | None:
    """What the entries of a tensor are in; a sparse one, and some others, have no such thing."""
    return tensor.untyped_storage() if tensor.layout is torch.strided and torch._C._has_storage(tensor) else None


@contextmanager
def noted_draws() -> Iterator[Draws]:
    """Note draws, also by functions of ``torch.nn.init`` that do nothing on the meta device."""

    def truncated(tensor: Tensor, mean: float, std: float, *others: Any, **also: Any) -> Tensor:
        # The bounds of a truncated draw are far from it, as in the usual calls, or fall like its spread.
        with torch.no_grad():
            return tensor.normal_(mean, std)

    def orthogonal(tensor: Tensor, gain: float = 1, generator: Any = None) -> Tensor:
        rows = tensor.shape[0]
        with torch.no_grad():
            return tensor.normal_(0, gain * max(rows, tensor.numel() // max(rows, 1), 1) ** -0.5)

    originals = nn.init._no_grad_trunc_normal_, nn.init.orthogonal_
    nn.init._no_grad_trunc_normal_, nn.init.orthogonal_ = truncated, orthogonal
    try:
        with Draws() as draws:
            yield draws
    finally:
        nn.init._no_grad_trunc_normal_, nn.init.orthogonal_ = originals


def drawn_growth(base: Sequence[int], wide: Sequence[int], dims: Sequence[int]) -> float:
    """By how much the sum of some dimensions is larger in the wider model; 1 for none."""
    return sum(wide[dim] for dim in dims) / sum(base[dim] for dim in dims) if dims else 1.0


def as_drawn(name: str, shape: Shape, base: Sequence[int], wide: Sequence[int], ratio: float) -> Shape:
    """What the spread of initial values says of the dimensions that they follow.

    Args:
        name: The parameter's.
        shape: What the layer it belongs to says of it.
        base: Its sizes; or those of the weight that it is drawn like.
        wide: The same in the wider model.
        ratio: The spread there over that in the base model.

    Raises:
        ValueError: It follows none.
    """

    def explains(dims: tuple[int, ...], factor: float = 1.0) -> bool:
        return math.isclose(ratio, factor * drawn_growth(base, wide, dims) ** -0.5, rel_tol=_EXACT)

    if shape.fan_in is None:
        if explains(shape.drawn_by):
            return shape
        if explains(()):
            return replace(shape, drawn_like=None, drawn_by=())
        if any(shape.scales) and math.isclose(ratio, DELTA**-0.5, rel_tol=_EXACT):
            return replace(shape, drawn_like=None, drawn_by=(shape.scales.index(True),))
    else:
        factor = 1.0
        if shape.drawn_like is not None:  # a magnitude of weight_norm: the norm of what feeds an output
            per_output = [math.prod(sizes) / sizes[shape.fan_out] for sizes in (base, wide)]
            factor = math.sqrt(per_output[1] / per_output[0])
        fans = tuple(dim for dim in sorted((shape.fan_out, shape.fan_in)) if dim < len(base))  # a vector has but one
        for dims in (shape.drawn_by, (), *((dim,) for dim in fans), fans):
            if explains(dims, factor):
                return replace(shape, drawn_by=dims)
    raise ValueError(
        f"{name}: its initial values are drawn {ratio:.3g} times as large at {DELTA} times the base width. muP takes "
        "over what stays as large, or falls like the inverse square root of the inputs, of the outputs or of their "
        "sum, as in torch.nn.init: draw it so, and leave muP's own share to initialize()"
    )
