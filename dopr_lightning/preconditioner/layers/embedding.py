"""An embedding: one-hot rows, so a diagonal covariance."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from dopr_lightning.preconditioner.layers.base import ConvCovariance, DiagonalLayer
from dopr_lightning.preconditioner.sharding import local, row_offset


class Embedding(DiagonalLayer):
    """An embedding: its rows are one-hot, so the covariance is the diagonal of the tokens' frequencies.

    Gradients may be dense or sparse, whole or sharded. Padding tokens are not rows: the weight learns nothing from
    them. ``max_norm`` and ``scale_grad_by_freq`` keep their meaning; the latter's division by the batch's own counts
    comes first.
    """

    kind = "embedding"

    def __init__(self, name: str, module: nn.Embedding, *, conv: ConvCovariance, bias: bool) -> None:
        super().__init__(name, module, shape=(module.num_embeddings, module.embedding_dim))
        self.dim = module.num_embeddings
        self._padding = module.padding_idx

    @property
    def rearrangement(self) -> Hashable:
        return super().rearrangement, self._padding

    def grid(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten().long()
        if self._padding is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        return tokens, tokens != self._padding

    def gradient(self) -> Tensor:
        gradient = self.weight.grad
        assert gradient is not None  # the preconditioner leaves layers without a gradient out
        return (gradient.to_dense() if gradient.is_sparse else local(gradient)).T[None]

    def scale(self, factors: Tensor) -> None:
        gradient = self.weight.grad
        assert gradient is not None  # the preconditioner leaves layers without a gradient out
        if gradient.is_sparse:
            # _values also serves gradients that hold a token several times: their sum scales with its summands.
            gradient._values().mul_(factors[gradient._indices()[0]][:, None])
            return
        mine = local(gradient)
        offset = row_offset(gradient)
        mine.mul_(factors[offset : offset + len(mine), None])
