"""Multi-head attention: four linear maps whose weights its module uses without a submodule's forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from dopr_lightning.preconditioner.layers.base import ConvCovariance
from dopr_lightning.preconditioner.layers.linear import LinearMap
from dopr_lightning.preconditioner.layers.parameters import NotCoveredError


class _InputProjection(LinearMap):
    """The projection of query, key or value: a third of ``in_proj_weight``, or its own weight if kdim or vdim differ.

    Positions that a ``key_padding_mask`` hides are rows as well: mask them with the preconditioner's own mask. The
    ``bias_k`` and ``bias_v`` of ``add_bias_kv`` are further sequence elements, which multiply no row.
    """

    kind = "attention"
    part: ClassVar[str]
    _position: ClassVar[int]

    def __init__(self, name: str, module: nn.MultiheadAttention, *, conv: ConvCovariance, bias: bool) -> None:
        embed_dim = module.embed_dim
        self.features = (embed_dim, module.kdim, module.vdim)[self._position]
        span = embed_dim * self._position, embed_dim * (self._position + 1)
        fused = module.kdim == module.vdim == embed_dim
        super().__init__(
            name,
            module,
            weight="in_proj_weight" if fused else f"{self.part[0]}_proj_weight",
            shape=(3 * embed_dim, embed_dim) if fused else (embed_dim, self.features),
            weight_span=span if fused else None,
            bias="in_proj_bias" if bias else None,
            bias_span=span,
        )
        self.dim = self.features + self.homogeneous

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        return args[self._position] if len(args) > self._position else kwargs[self.part]


class Query(_InputProjection):
    """The projection of ``query``."""

    part = "query"
    _position = 0


class Key(_InputProjection):
    """The projection of ``key``."""

    part = "key"
    _position = 1


class Value(_InputProjection):
    """The projection of ``value``."""

    part = "value"
    _position = 2


class AttentionOutput(LinearMap):
    """``out_proj``, whose forward is never called: the attention passes its weight to a functional linear."""

    kind = "attention"
    functional = True
    part = "output"
    submodules = ("out_proj",)

    def __init__(self, name: str, module: nn.MultiheadAttention, *, conv: ConvCovariance, bias: bool) -> None:
        self.features = module.embed_dim
        super().__init__(
            name,
            module,
            weight="out_proj.weight",
            shape=(self.features, self.features),
            bias="out_proj.bias" if bias else None,
        )
        if self._weight.name != "out_proj.weight":
            raise NotCoveredError(
                [self._weight.name], "a computed weight of a functional linear cannot be told from others"
            )
        self.dim = self.features + self.homogeneous

    def positions(self, mask: Tensor) -> Tensor:
        # Attention works on (T, B, E), whatever the order of its input.
        (module,) = self.modules[:1]
        assert isinstance(module, nn.MultiheadAttention)
        return (mask.mT if module.batch_first and mask.dim() == 2 else mask).flatten()

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        raise NotImplementedError("a functional layer's input is no argument of its module's forward")
