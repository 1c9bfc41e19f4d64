"""Layers whose covariances have one size, side by side, so that one batched call serves them all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from dopr_lightning.preconditioner.covariance import DampingScale, damping_values
from dopr_lightning.preconditioner.layers import DenseLayer, Layer
from dopr_lightning.preconditioner.spectrum import Spectrum

GOLDEN = 5**0.5 / 2 - 0.5
"""The ratio whose multiples, modulo 1, are the most evenly spread."""


@dataclass(frozen=True)
class StackOptions:
    """How a covariance is estimated and damped, the same for every stack.

    Attributes:
        damping: Relative damping gamma.
        damping_scale: What it is relative to.
        ema: Weight of past covariances.
        max_rows: Rows of one input that are used at most, evenly spread over it; None for all.
        max_error: Tolerance of the low-rank solver's certificate.
        update_every: Steps per refresh.
    """

    damping: float
    damping_scale: DampingScale
    ema: float
    max_rows: int | None
    max_error: float
    update_every: int


@dataclass
class LayerRecord:
    """What the refreshes of one layer came to.

    Attributes:
        rows_seen: Rows of the last refresh over all ranks.
        refreshed_at: Step of the last good inverse, None before the first.
        failures: Refreshes that gave no usable inverse.
        failures_in_a_row: How many of them since the last that did, without those of inputs that were all 0.
    """

    rows_seen: int = 0
    refreshed_at: int | None = None
    failures: int = 0
    failures_in_a_row: int = 0


class Stack(ABC):
    """Layers with equally large covariances, and one way of inverting them.

    The life of a refresh: :meth:`add` during backward passes, :meth:`close`, a sum of :attr:`sums` and
    :attr:`counts` over ranks by the caller, :meth:`refresh`, :meth:`accept`; then :meth:`apply`, at every step.

    Args:
        layers: The layers. A grouped convolution contributes one block per group.
        options: How covariances are estimated and damped.

    Attributes:
        blocks: Covariances in the stack.
        dim: Their size d.
        index_of: The layers' numbers.
        counts: Rows behind the sums, per block, int64 (a long window of a convolution passes 2^24 rows).
        records: What refreshes came to, per layer.
        refreshes: How many there were.
        mask_fits: Whether the latest mask had as many positions as the layer saw rows.
        told: Layers of which a warning has told that they failed, and why.
    """

    solver: ClassVar[str]
    counts: Tensor

    def __init__(self, layers: Sequence[Layer], options: StackOptions) -> None:
        self.layers = list(layers)
        self.options = options
        self.dim = layers[0].dim
        ends = list(accumulate((layer.blocks for layer in self.layers), initial=0))
        self.slices = [slice(start, end) for start, end in pairwise(ends)]
        self.blocks = ends[-1]
        self.records = [LayerRecord() for _ in self.layers]
        self.refreshes = 0
        self.mask_fits = False
        self.told: set[tuple[Layer, str]] = set()
        self._rows_added = [0] * len(self.layers)
        self._in_pieces = any(layer.pieces > 1 for layer in self.layers)
        self.index_of = {layer: index for index, layer in enumerate(self.layers)}
        self._allocated = False
        self._open = False
        self._current = [False] * len(self.layers)  # whether the sums hold the layer's covariance

    def without_rows(self) -> list[Layer]:
        """Layers of which this rank has counted no row in this window, as far as the host knows."""
        return [layer for layer, rows in zip(self.layers, self._rows_added, strict=True) if rows == 0]

    @cached_property
    def runs(self) -> list[list[int]]:
        """The layers' numbers, in runs of one :func:`gradient_shape`."""
        return [list(run) for _, run in groupby(range(len(self.layers)), lambda i: gradient_shape(self.layers[i]))]

    @cached_property
    def entries(self) -> int:
        """Entries of the layers' weights, in all; counted once, since every step may ask."""
        return sum(layer.weight.numel() for layer in self.layers)

    @property
    def device(self) -> torch.device:
        """Where the layers are, and so the statistics."""
        return self.layers[0].weight.device

    @property
    def addresses(self) -> Hashable:
        """Where :meth:`apply` reads from besides the gradients, if refreshes renew that in place; None if they do not.

        Only then can its launches be recorded and replayed (:mod:`~dopr_lightning.preconditioner.replay`).
        """
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The statistics', whatever autocast does: bf16 sums lose small directions, fp16 overflows."""
        return torch.promote_types(self.layers[0].weight.dtype, torch.float32)

    def allocate(self) -> None:
        """Make the tensors at first use, when the model has found its device."""
        if not self._allocated:
            self._allocated_as = self.dtype, self.device
            self.counts = torch.zeros(self.blocks, dtype=torch.int64, device=self.device)
            self._allocate()
            self._allocated = True

    def add(self, layers: Sequence[Layer], x: Tensor, mask: Tensor | None) -> None:
        """Count the rows of one input of a layer, or of several layers at once.

        Args:
            layers: One of :attr:`layers`, or several that stand side by side there and are of one rearrangement.
            x: What its module was called with, as autocast rounds it; of several layers one behind the other, see
                :meth:`~dopr_lightning.preconditioner.layers.Layer.joins`.
            mask: Which rows count; ignored by a layer that sees another number of rows than the mask has. None where
                there are several layers.

        Raises:
            ValueError: The mask has the input's positions in another order.
        """
        self.begin()
        first, last = self.index_of[layers[0]], self.index_of[layers[-1]]
        part = slice(self.slices[first].start, self.slices[last].stop)
        try:
            rows = self._add(layers, part, x, mask)
        except BaseException:  # out of memory, say: the sums may hold rows that no count does
            self.discard()
            raise
        # A mask's rows are counted on the device; others here, where it takes no kernel.
        if isinstance(rows, Tensor):
            self.counts[part] += rows
        else:
            for index in range(first, last + 1):
                self._rows_added[index] += rows

    def begin(self) -> None:
        """Start counting from zero, unless a window of rows is open already.

        Raises:
            RuntimeError: The layers are of another dtype, or elsewhere, than when the tensors were made.
        """
        self.allocate()
        if not self._open:
            if (self.dtype, self.device) != self._allocated_as:
                was, now = ("{} on {}".format(*at) for at in (self._allocated_as, (self.dtype, self.device)))
                raise RuntimeError(
                    f"{self.layers[0].name}: statistics are in {was} and would now be in {now}; make a new "
                    "preconditioner after converting or moving the model"
                )
            self.counts.zero_()
            self._rows_added = [0] * len(self.layers)
            self._current = [False] * len(self.layers)
            self._clear()
            self._open = True

    def close(self) -> None:
        """End the window: :attr:`sums` and :attr:`counts` hold all that this rank has counted."""
        self.begin()
        rows = [n for n, layer in zip(self._rows_added, self.layers, strict=True) for _ in range(layer.blocks)]
        self.counts += torch.tensor(rows, device="cpu").to(self.device, non_blocking=True)
        self._open = False

    def discard(self) -> None:
        """Forget the rows counted in the open window."""
        self._open = False

    @abstractmethod
    def refresh(self, share: slice) -> Tensor:
        """Turn the summed statistics into new inverses.

        Args:
            share: The blocks whose inverses this rank computes; the others' come from other ranks.

        Returns:
            What :meth:`accept` needs to know on the host, (fields, blocks) in float64, mostly on the device. Fields
            0 to 2 are the rows, the trace of the covariance, and whether this rank has renewed the inverse.
        """

    def accept(self, outcome: Sequence[Sequence[float]], step: int) -> list[Failure]:
        """Note what a refresh brought.

        Args:
            outcome: :meth:`refresh`'s values, renewed summed over ranks where they shared the work.
            step: The step of the refresh.

        Returns:
            The layers whose inverses could not be renewed although they saw rows. A layer is renewed if some of its
            blocks are and the others saw only zeros: these have a gradient of 0, and keep what inverse they have.
        """
        self.refreshes += 1
        rows, traces, renewed = outcome[:3]
        failed = []
        for index, (layer, record, part) in enumerate(zip(self.layers, self.records, self.slices, strict=True)):
            record.rows_seen = int(max(rows[part]))
            if record.rows_seen == 0:
                continue
            if any(renewed[part]) and all(new or of == 0 for new, of in zip(renewed[part], traces[part], strict=True)):
                record.refreshed_at = step
                record.failures_in_a_row = 0
                self._current[index] = True
                continue
            record.failures += 1
            record.failures_in_a_row += any(traces[part])
            failed.append(Failure(self, layer, record, traces[part]))
        return failed

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By the layer's name, what it takes to go on bit for bit."""
        if self.refreshes == 0:
            return {}
        return {
            layer.name: {
                "solver": self.solver,
                "refreshes": self.refreshes,
                **asdict(self.records[index]),
                # On the host: a checkpoint must not need the device's memory.
                "tensors": {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors(index).items()},
            }
            for index, layer in enumerate(self.layers)
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue from :meth:`state_dict`, which may hold other stacks' layers too."""
        self._prepare_load([state[layer.name]["tensors"] for layer in self.layers])
        for index, layer in enumerate(self.layers):
            saved = state[layer.name]
            self.refreshes = saved["refreshes"]
            self.records[index] = LayerRecord(**{field.name: saved[field.name] for field in fields(LayerRecord)})
            for name, tensor in self._tensors(index).items():
                value = saved["tensors"].get(name)
                if value is None or value.shape != tensor.shape:
                    found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                    raise ValueError(
                        f"{layer.name}: the preconditioner's saved {name} is {found}, the model's has shape "
                        f"{tuple(tensor.shape)}; were conv, bias, ema or max_dim different, or the layers' dtypes or "
                        "devices?"
                    )
                tensor.copy_(value)

    def _prepare_load(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Make the tensors that the saved ones, per layer, go into."""
        self.allocate()

    @property
    @abstractmethod
    def sums(self) -> Tensor:
        """The additive statistics, contiguous: what ranks sum."""

    @property
    def cost(self) -> float:
        """FLOPs to invert one block, if ranks should share that work; 0 if each does it for itself."""
        return 0.0

    @property
    def shared(self) -> Tensor | None:
        """What ranks that share the work tell each other after :meth:`refresh`, (blocks, ...)."""
        return None

    @abstractmethod
    def apply(self, *, fixed: bool = False) -> None:
        """Rewrite the layers' gradients.

        Args:
            fixed: Use no number that a refresh changes on the host, so that what is launched can be recorded. For
                stacks with :attr:`addresses`.
        """

    @abstractmethod
    def spectrum(self, index: int) -> Spectrum | None:
        """Of the covariance of layer ``index`` at the last refresh; None if it saw no rows then."""

    @abstractmethod
    def _allocate(self) -> None: ...

    @abstractmethod
    def _clear(self) -> None:
        """Set the sums to zero."""

    @abstractmethod
    def _add(self, layers: Sequence[Layer], part: slice, x: Tensor, mask: Tensor | None) -> int | Tensor:
        """Add to the sums of the blocks ``part``; returns the number of each layer's rows."""

    @abstractmethod
    def _tensors(self, index: int) -> dict[str, Tensor]:
        """What the state holds of a layer, by name; views, which loading copies into."""

    def _dense(self, index: int) -> DenseLayer:
        layer = self.layers[index]
        assert isinstance(layer, DenseLayer)  # only the diagonal solver takes others
        return layer

    def _rows(self, layers: Sequence[Layer], x: Tensor, mask: Tensor | None) -> tuple[Tensor, int | Tensor]:
        """The rows of dense layers' inputs, (blocks, n, d), in the statistics' dtype, and how many of each count."""
        layer = layers[0]
        assert isinstance(layer, DenseLayer)  # only the diagonal solver takes others
        rows = layer.rows(x if layer.rearranges else x.to(self.dtype))
        if len(layers) > 1:
            rows = rows.unflatten(1, (len(layers), -1)).transpose(0, 1).flatten(0, 1)  # a view, of layers of one block
        keep = None if mask is None else self._keep(layer, x, mask, rows.shape[1])
        limit = self.options.max_rows
        if limit is not None and rows.shape[1] > limit:
            some = spread(rows.shape[1], limit).to(rows.device, non_blocking=True)
            rows, keep = rows.index_select(1, some), None if keep is None else keep[some]
        rows = rows.to(self.dtype)  # only now: half precision is thinned out at half the cost
        if keep is None:
            return rows, rows.shape[1]
        return torch.where(keep[:, None], rows, 0), keep.sum()  # where, not times: padding may hold NaN

    def _keep(self, layer: Layer, x: Tensor, mask: Tensor, rows: int) -> Tensor | None:
        """The mask in the order of the layer's rows; None where it is not for as many."""
        self.mask_fits = mask.numel() == rows
        if not self.mask_fits:
            return None
        grid = layer.grid(x)
        if mask.shape != grid and sorted(mask.shape) == sorted(grid):
            raise ValueError(
                f"{layer.name}: the mask's shape is {tuple(mask.shape)}, that of the input's positions {grid}; "
                "transpose the mask around this layer's forward"
            )
        return layer.positions(mask)

    def damping(self, traces: Tensor) -> Tensor:
        """Each block's, of the covariances' traces, (blocks,)."""
        if not self._in_pieces:
            return self.damping_of(self.layers[0], traces)
        parts = zip(self.layers, self.slices, strict=True)
        return torch.cat([self.damping_of(layer, traces[part]) for layer, part in parts])

    def damping_of(self, layer: Layer, traces: Tensor) -> Tensor:
        """The same for the blocks of one layer, or of several that are not in pieces."""
        if layer.pieces > 1:
            traces = traces.unflatten(0, (-1, layer.pieces)).sum(-1, keepdim=True).expand(-1, layer.pieces).flatten()
        return damping_values(traces, layer.whole_dim, self.options.damping, self.options.damping_scale)


@dataclass(frozen=True)
class Failure:
    """A layer whose inverse could not be renewed; ``traces`` are those of its blocks' covariances."""

    stack: Stack
    layer: Layer
    record: LayerRecord
    traces: Sequence[float]


def gradient_shape(layer: Layer) -> tuple[Any, ...]:
    """Layers with equal ones share batched calls; they stand side by side in a stack, so that their part is a view."""
    return layer.kind, layer.blocks, tuple(layer.weight.shape)


@lru_cache(maxsize=64)
def spread(rows: int, limit: int) -> Tensor:
    """Which ``limit`` of ``rows`` rows are used: one from each of as many stretches.

    The place within a stretch goes by the golden ratio: rows at equal distances could be the same token of every
    sequence, or a few columns of every image.
    """
    stretch = torch.arange(limit + 1, device="cpu")
    edges = (stretch * rows + limit - 1) // limit
    share = stretch[:-1].double() * GOLDEN % 1
    return edges[:-1] + (share * edges.diff()).long()


def subtract_low_rank(gradient: Tensor, left: Tensor, right: Tensor, scale: Tensor | float) -> Tensor:
    """Overwrite G with scale * G - (G left) right.

    Args:
        gradient: G, (blocks, m, d); overwritten.
        left: (blocks, d, r).
        right: (blocks, r, d).
        scale: (blocks, 1, 1), or a number for a single block, which costs one pass over the gradient less.

    Returns:
        ``gradient``.
    """
    if isinstance(scale, Tensor):
        product = gradient @ left
        return gradient.mul_(scale).baddbmm_(product, right, alpha=-1)
    matrix = gradient[0]
    matrix.addmm_(matrix @ left[0], right[0], beta=scale, alpha=-1)
    return gradient
