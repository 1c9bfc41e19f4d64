"""Equally large covariances in one tensor, so that one batched call serves all the layers that share a size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from dopr_lightning.preconditioner.covariance import DampingScale, RunningCovariance, damping_values, trace
from dopr_lightning.preconditioner.inverse import damped_inverse, keep_last_good
from dopr_lightning.preconditioner.layers import Layer


def make_stacks(
    layers: Sequence[Layer], *, damping: float, damping_scale: DampingScale, ema: float
) -> list[LayerStack]:
    """Sort layers into stacks by the size, dtype and device of their covariance."""

    def key(layer: Layer) -> tuple[Any, ...]:
        return layer.diagonal, layer.dim, str(layer.weight.dtype), str(layer.weight.device)

    return [
        LayerStack(list(group), damping=damping, damping_scale=damping_scale, ema=ema)
        for _, group in groupby(sorted(layers, key=key), key=key)
    ]


class LayerStack:
    """Layers whose covariances have one size: (blocks, d, d), or (blocks, d) where diagonal.

    Args:
        layers: The layers. A grouped convolution contributes one block per group.
        damping: Relative damping.
        damping_scale: What it is relative to.
        ema: Weight of past covariances.

    Attributes:
        counts: Rows this rank has counted since the last refresh, per layer.
        rows_seen: Rows of the last refresh over all ranks, per layer.
        refreshed_at: Step of the last good inverse, per layer, None before the first.
        failures: Refreshes that gave no usable inverse, per layer.
    """

    def __init__(self, layers: Sequence[Layer], *, damping: float, damping_scale: DampingScale, ema: float) -> None:
        self.damping = damping
        self.damping_scale: DampingScale = damping_scale
        self.ema = ema
        self.diagonal = layers[0].diagonal
        # Layers whose gradients have one shape stand side by side: their inverses are then a view, not a copy.
        self.layers = sorted(layers, key=_gradient_shape)
        ends = accumulate((layer.blocks for layer in self.layers), initial=0)
        self.slices = [slice(start, end) for start, end in pairwise(ends)]
        self._index = {layer: index for index, layer in enumerate(self.layers)}
        self._runs = [[self._index[layer] for layer in run] for _, run in groupby(self.layers, _gradient_shape)]
        self.counts = [0] * len(self.layers)
        self.rows_seen = [0] * len(self.layers)
        self.refreshed_at: list[int | None] = [None] * len(self.layers)
        self.failures = [0] * len(self.layers)
        self.running: RunningCovariance | None = None

    def allocate(self) -> None:
        """Make the tensors at first use, when the model has found its device."""
        if self.running is not None:
            return
        weight, dim = self.layers[0].weight, self.layers[0].dim
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (self.slices[-1].stop, *([dim] if self.diagonal else [dim, dim]))
        self.sums = torch.zeros(shape, dtype=dtype, device=weight.device)
        self.running = RunningCovariance(self.sums, self.ema)
        # Identities until a first inverse succeeds: such a layer's gradient stays as it is.
        one = torch.ones(dim) if self.diagonal else torch.eye(dim)
        self.inverse = one.to(self.sums).expand(shape).clone()
        blocks = torch.tensor([layer.blocks for layer in self.layers])
        self._layer_of_block = torch.arange(len(self.layers)).repeat_interleave(blocks).to(weight.device)

    def add(self, layer: Layer, x: Tensor) -> None:
        """Count the rows of one input of a layer."""
        self.allocate()
        index = self._index[layer]
        self.counts[index] += layer.add_second_moment(x, self.sums[self.slices[index]])

    def refresh(self, rows: Tensor) -> Tensor:
        """Turn the sums into covariances and new inverses, and start counting anew.

        Args:
            rows: The number of rows behind the sums per layer, (layers,), on the device of the sums.

        Returns:
            (3, layers) in float64, on the device: rows, trace of the covariance, whether the inverse was renewed.
        """
        assert self.running is not None
        n = rows[self._layer_of_block]
        covariance = self.sums / n.clamp(min=1).to(self.sums).view(-1, *[1] * (self.sums.dim() - 1))
        traces = trace(covariance, self.diagonal)
        # A row with NaN or infinity shows on the diagonal. A layer whose inputs are all 0 learns nothing from them.
        valid = (n > 0) & traces.isfinite() & (traces > 0)
        self.running.update(covariance, valid)
        good = self._invert(valid)
        self.sums.zero_()
        self.counts = [0] * len(self.layers)
        per_layer = torch.zeros_like(rows).index_add_(0, self._layer_of_block, traces.double())
        renewed = torch.ones_like(rows).scatter_reduce_(0, self._layer_of_block, good.double(), "amin")
        return torch.stack([rows, per_layer, renewed])

    def _invert(self, valid: Tensor) -> Tensor:
        """Renew the inverses of the ``valid`` blocks where that succeeds; returns the mask of renewed blocks."""
        assert self.running is not None
        covariance = self.running.value
        damping = damping_values(
            trace(covariance, self.diagonal), covariance.shape[-1], self.damping, self.damping_scale
        )
        inverse, good = damped_inverse(covariance, damping, self.diagonal)
        good = good & valid
        self.inverse = keep_last_good(inverse, self.inverse, good)
        return good

    def apply(self) -> None:
        """Rewrite the gradients: one product for all layers whose gradients have one shape."""
        for run in self._runs:
            present = [i for i in run if self.layers[i].has_gradient]
            if not present:
                continue
            gradients = [self.layers[i].gradient() for i in present]
            if len(present) == len(run):
                inverse = self.inverse[self.slices[run[0]].start : self.slices[run[-1]].stop]
            else:
                inverse = torch.cat([self.inverse[self.slices[i]] for i in present])
            gradient = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
            gradient = gradient.to(inverse.dtype)
            matrix = gradient * inverse[..., None] if self.diagonal else gradient @ inverse
            for i, part in zip(present, matrix.split([g.shape[0] for g in gradients]), strict=True):
                self.layers[i].write(part)

    def statistics(self) -> Iterator[tuple[Layer, Tensor | None, int]]:
        """Each layer with its covariance (None before the first refresh) and the rows behind it."""
        for layer, part, rows in zip(self.layers, self.slices, self.rows_seen, strict=True):
            yield layer, None if self.running is None else self.running.value[part], rows

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Covariances by the layer's name; the inverses follow from them."""
        if self.running is None:
            return {}
        return {
            layer.name: {
                "covariance": self.running.value[part].clone(),
                "weight": self.running.weight[part].clone(),
                "refreshed_at": self.refreshed_at[index],
                "rows_seen": self.rows_seen[index],
            }
            for index, (layer, part) in enumerate(zip(self.layers, self.slices, strict=True))
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from :meth:`state_dict`, which may hold other stacks' layers too."""
        self.allocate()
        assert self.running is not None
        for index, (layer, part) in enumerate(zip(self.layers, self.slices, strict=True)):
            saved = state[layer.name]
            value = self.running.value[part]
            if saved["covariance"].shape != value.shape:
                raise ValueError(
                    f"{layer.name}: the saved covariance has shape {tuple(saved['covariance'].shape)}, the model's has "
                    f"{tuple(value.shape)}; were conv or bias different?"
                )
            value.copy_(saved["covariance"])
            self.running.weight[part].copy_(saved["weight"])
            self.refreshed_at[index] = saved["refreshed_at"]
            self.rows_seen[index] = saved["rows_seen"]
        self._invert(self.running.weight > 0)


def _gradient_shape(layer: Layer) -> tuple[Any, ...]:
    return layer.kind, tuple(layer.weight.shape), layer.blocks
