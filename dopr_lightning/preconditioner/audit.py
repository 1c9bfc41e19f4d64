r"""Does a covered weight get gradient that its captured rows do not explain?

A weight may be used without its module (``F.linear(h, embedding.weight)``), or a subclass may compute something else
than its layer type says. Then the covariance is not that of the rows behind the gradient, and nothing else would tell.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from dopr_lightning.preconditioner.engine import current_backward, is_batched

if TYPE_CHECKING:
    from dopr_lightning.preconditioner.layers import Layer

log = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = ("linear", "conv", "embedding")
PROBES = 4
TOLERANCE = 0.05
"""Relative to the gradient, with rounding on top. What is looked for is of order 1."""


class GradientAudit:
    r"""Compares each weight's gradient with its captured rows, in the first backward that has both.

    For y = W z, :math:`\nabla_W V = \sum_i \frac{\partial L}{\partial y_i} (z_i^\top V)` for a few fixed random
    columns V, at O(n d) cost. The left side is observed before accumulation and before data-parallel reduction, so it
    is of this backward alone. Rows known up to a common factor (muP's output multiplier) count as explained: they
    change only the scale of the update.

    Covers Linear, Embedding, Conv1-3d and the functional linears within a module, compiled or not. Not transposed
    convolutions, packed projections, parametrized weights, ``scale_grad_by_freq``, DTensors and layers differentiated
    twice (``create_graph``) or forwards.

    Args:
        layers: The layers to look at.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._probes = {layer: _Probe(layer) for layer in layers if _auditable(layer)}

    def captured(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        """Take one call's input and the gradient of its output, in the backward.

        Raises:
            TypeError: A subclass's input is not what the weight multiplies, by their sizes.
        """
        probe = self._probes.get(layer)
        if probe is None or is_batched(gradient):  # whose entries cannot be had
            return
        agrees = probe.agrees(x, gradient)
        if agrees is False:
            raise TypeError(
                f"{layer.name}: rows cannot be taken from a call with a tensor of shape {tuple(x.shape)} that returns "
                f"one of shape {tuple(gradient.shape)}; exclude the module, or cover its type by register_layer"
            )
        # create_graph: a gradient penalty's part of the gradient has rows of its own
        if agrees is None or torch.is_grad_enabled():
            self.leave(layer)
            return
        with torch.autocast(x.device.type, enabled=False):
            probe.add(x, gradient)

    def report(self) -> None:
        """Warn of each layer that fails, and look no more at layers that have been judged.

        Call it outside the backward; it waits for the device as long as there is something to judge.
        """
        for layer, probe in list(self._probes.items()):
            verdict = probe.verdict()
            if verdict is None:
                if probe.weight() is not layer.weight:  # load_state_dict(assign=True) replaced it
                    self.leave(layer)
                    if _auditable(layer):
                        self._probes[layer] = _Probe(layer)
                continue
            self.leave(layer)
            if not verdict:
                log.warning(
                    "%s: its gradient is not explained by the inputs of its module, so it is preconditioned with the "
                    "wrong covariance. Is the weight also used without its module, as in F.linear(h, embedding.weight),"
                    " or does a subclass compute something else? Exclude the module.",
                    layer.name,
                )

    def leave(self, layer: Layer) -> None:
        """Look no more at a layer."""
        if (probe := self._probes.pop(layer, None)) is not None:
            probe.remove()

    def remove(self) -> None:
        """Take all hooks off."""
        for layer in list(self._probes):
            self.leave(layer)


def _auditable(layer: Layer) -> bool:
    module = layer.modules[0]
    if isinstance(layer.weight, DTensor) or layer.weight.is_meta or not layer.weight.requires_grad:
        return False
    if layer.functional:
        return True
    # Not a parametrization, whose gradient is another tensor's, nor a registered layer type with a formula of its own.
    if module._parameters.get("weight") is not layer.weight or layer.kind not in KINDS:
        return False
    if isinstance(module, nn.Embedding):
        return not module.scale_grad_by_freq
    return isinstance(module, (nn.Linear, *CONVOLUTIONS))


class _Probe:
    """Both sides of the equation for one layer, per backward."""

    def __init__(self, layer: Layer) -> None:
        self.module = layer.modules[0]
        self.patches = getattr(getattr(layer, "layer", layer), "conv", None) == "patch"
        weight = layer.weight
        self.weight = ref(weight)
        self.shape = weight.shape
        if isinstance(self.module, CONVOLUTIONS):
            shape: tuple[int, ...] = (PROBES * self.module.groups, *weight.shape[1:])
        else:
            shape = (weight.shape[0 if isinstance(self.module, nn.Embedding) else 1], PROBES)
        # A generator of its own: the user's random numbers stay what they were.
        self.columns = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        # By backward (a reentrant checkpoint runs one inside another): what the rows explain, their rounding error.
        self.explained: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self.judged: list[tuple[Tensor, Tensor, Tensor]] = []
        self.handle: RemovableHandle = weight.register_hook(self.observe)

    def agrees(self, x: Tensor, gradient: Tensor) -> bool | None:
        """Whether an output of this size is of an input of that size.

        None if that cannot be told: a subclass pads or crops around a convolution (causal ones do), which leaves the
        channels' covariance as it is, or returns a Linear's rows in another shape, or some of their entries. Of an
        embedding as many entries as its tokens have are asked for: its input may only be where tokens come from.
        """
        module = self.module
        if isinstance(module, nn.Embedding):
            return not x.is_floating_point() and gradient.numel() == x.numel() * module.embedding_dim
        if isinstance(module, CONVOLUTIONS):
            spatial = len(module.kernel_size)
            if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != module.in_channels:
                return False
            expected = (*x.shape[: -spatial - 1], module.out_channels, *_positions(module, x))
            if gradient.shape == expected:
                return True
            return False if self.patches else None
        outputs, features = self.shape
        if x.shape[-1:] != (features,):
            return False
        if gradient.shape == (*x.shape[:-1], outputs):
            return True
        rearranged = gradient.numel() == x.shape[:-1].numel() * outputs
        return None if rearranged or gradient.shape[: x.dim() - 1] == x.shape[:-1] else False

    @torch.no_grad()
    def add(self, x: Tensor, gradient: Tensor) -> None:
        explained, noise = self._explain(x, gradient.detach())
        # Under autocast the layer saw x rounded to its output's dtype, on GPUs perhaps to TF32.
        precision = max(torch.finfo(gradient.dtype).eps, 2**-10)
        backward = current_backward()
        before = self.explained.get(backward, (0.0, 0.0))
        self.explained[backward] = before[0] + explained, before[1] + noise * precision**2

    @torch.no_grad()
    def observe(self, gradient: Tensor) -> None:
        """Hook of the weight: called once per backward, with the sum over the weight's uses."""
        explained = self.explained.pop(current_backward(), None)
        # Without rows it may have been in eval mode; that a layer is never captured is noticed elsewhere.
        if explained is not None:
            self.judged.append((self._project(gradient), *explained))

    def verdict(self) -> bool | None:
        """Whether all gradients seen were explained, None if there was nothing to judge by."""
        judged, self.judged = self.judged, []
        self.explained.clear()  # of backwards that gave the weight no gradient
        verdicts = [_explains(*sides) for sides in judged]
        known = [verdict for verdict in verdicts if verdict is not None]
        return all(known) if known else None

    def remove(self) -> None:
        self.handle.remove()

    def _explain(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient times the columns according to the rows, and the squared size of the terms in that sum."""
        module, gradient = self.module, _widen(gradient)
        columns = self.columns.to(gradient)
        if isinstance(module, nn.Embedding):
            factors = columns[x.flatten()]
            if module.padding_idx is not None:
                factors = factors * (x.flatten() != module.padding_idx)[:, None]
            gradient = gradient.reshape(len(factors), module.embedding_dim)
            return gradient.mT @ factors, gradient.square().sum()
        x = x.to(gradient)
        if isinstance(module, CONVOLUTIONS):
            if x.dim() == len(module.kernel_size) + 1:
                x, gradient = x[None], gradient[None]
            factors = self._convolve(x, columns).unflatten(1, (module.groups, PROBES)).flatten(3)
            sizes = self._convolve(x.square(), torch.ones_like(columns[::PROBES])).flatten(2)
            gradient = gradient.unflatten(1, (module.groups, -1)).flatten(3)
            explained = torch.einsum("bgop,bgvp->gov", gradient, factors).flatten(0, 1)
            return explained, (gradient.square().sum(2) * sizes).sum()
        x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        return gradient.mT @ (x @ columns), (gradient.square().sum(1) * x.square().sum(1)).sum()

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        # Of torch's own class: a subclass that standardises its weight, say, is to fail.
        base = next(cls for cls in type(self.module).__mro__ if cls in CONVOLUTIONS)
        return base._conv_forward(self.module, x, kernel, None)  # type: ignore[arg-type]

    def _project(self, gradient: Tensor) -> Tensor:
        """The gradient times the columns, (m, PROBES)."""
        gradient = _widen(gradient.detach())
        columns = self.columns.to(gradient.device, gradient.dtype)
        if isinstance(self.module, CONVOLUTIONS):
            groups = self.module.groups
            gradient = gradient.flatten(1).unflatten(0, (groups, -1))
            columns = columns.flatten(1).unflatten(0, (groups, PROBES))
            return (gradient @ columns.mT).flatten(0, 1)
        if isinstance(self.module, nn.Embedding):
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                gradient, columns = gradient.values(), columns[gradient.indices()[0]]
            return gradient.mT @ columns
        return gradient @ columns


def _explains(observed: Tensor, explained: Tensor, noise: Tensor) -> bool | None:
    """Whether ``observed`` is a multiple of ``explained`` up to rounding; None for an overflown step."""
    observed, explained = observed.double(), explained.to(observed.device).double()
    factor = (observed * explained).sum() / explained.square().sum().clamp(min=torch.finfo(torch.double).tiny)
    error, size = float((observed - factor * explained).norm()), float(observed.norm())
    tolerance = TOLERANCE * size + math.sqrt(float(noise)) * max(1.0, abs(float(factor)))
    return error <= tolerance if math.isfinite(error + tolerance) else None


def _positions(module: nn.modules.conv._ConvNd, x: Tensor) -> list[int]:
    """The positions of the output that torch's own forward makes of ``x``."""
    geometry = zip(x.shape[-len(module.kernel_size) :], module.kernel_size, module.stride, module.dilation, strict=True)
    if module.padding == "same":
        return [size for size, *_ in geometry]
    paddings = [0] * len(module.kernel_size) if isinstance(module.padding, str) else module.padding
    return [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for (size, kernel, stride, dilation), padding in zip(geometry, paddings, strict=True)
    ]


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.double else x.float()
