r"""Capture activations, pool them over ranks, invert their covariance, rewrite the gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dopr_lightning.preconditioner.covariance import DampingScale
from dopr_lightning.preconditioner.distributed import all_reduce_sums
from dopr_lightning.preconditioner.layers import ConvCovariance, Layer, layer_type
from dopr_lightning.preconditioner.stack import LayerStack, make_stacks
from dopr_lightning.preconditioner.summary import Summary, SummaryRow, spectrum

log = logging.getLogger(__name__)

FROZEN = "the weight is frozen (requires_grad=False)"


class ActivationPreconditioner:
    r"""Double Preconditioning's first half: multiply gradients by the inverse covariance of the layer's inputs.

    For a layer y = W z it keeps :math:`\Sigma = \frac{1}{n} \sum_i z_i z_i^\top` over the rows z that a backward pass
    went through, and :meth:`step` replaces

    .. math:: \nabla_W \;\leftarrow\; M = \nabla_W (\Sigma + \lambda I)^{-1}.

    Any optimizer then takes its step with M in place of the gradient ("Double Preconditioning (DoPr)", arXiv
    2606.06418, Section 4). Use optimizers whose update does not depend on the gradient's scale (AdamW, Muon, ...): M's
    scale is that of a gradient divided by a covariance, so plain SGD needs a learning rate of its own.

    Rows are counted when a backward pass goes through the layer. So each training row counts exactly once, also under
    gradient accumulation and activation checkpointing, and forwards without a backward (validation, rollouts, target
    networks) and frozen layers count not at all. A weight used without its module (``F.linear(h, embedding.weight)``)
    adds a gradient whose rows are not seen: exclude such a module.

    Args:
        model: Linear, Conv1d, Conv2d, ConvTranspose1d and Embedding modules in it are covered; :meth:`summary` says
            what is not, and why. May be wrapped in DistributedDataParallel.
        damping: :math:`\gamma > 0`, relative to the covariance, see ``damping_scale``. With the default 0.01 and the
            trace scale, fewer than 100 directions per layer are whitened, whatever the width.
        damping_scale: ``"trace"`` for :math:`\lambda = \gamma \operatorname{tr} \Sigma`, which keeps its meaning when
            the width grows; ``"mean"`` for :math:`\lambda = \gamma \operatorname{tr} \Sigma / d`.
        update_every: Refresh statistics and inverses every this many :meth:`step` calls. Steps between refreshes
            capture nothing and send nothing. 1 is the paper's choice.
        ema: Weight of past covariances at a refresh, in [0, 1). 0, this refresh's rows alone, is the paper's choice.
        conv: ``"channel"`` or ``"patch"`` covariance for convolutions, see
            :class:`~dopr_lightning.preconditioner.layers.Convolution`.
        bias: Precondition each bias with its weight, as the weight of a homogeneous coordinate 1.
        include: Globs on whole module names (``"blocks.*"``); only matching modules are covered. None: all.
        exclude: Globs on whole module names that are left alone.
        process_group: Data-parallel group to pool statistics over, None for the default group where one exists.

    Raises:
        ValueError: An argument is out of range, or nothing in ``model`` is left to cover.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ap = ActivationPreconditioner(model)
        >>> model(torch.randn(32, 8)).square().mean().backward()
        >>> ap.step()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float = 0.01,
        damping_scale: DampingScale = "trace",
        update_every: int = 1,
        ema: float = 0.0,
        conv: ConvCovariance = "channel",
        bias: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_options(damping=damping, damping_scale=damping_scale, update_every=update_every, ema=ema, conv=conv)
        self.update_every = update_every
        self.process_group = process_group
        self._steps = 0
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._not_covered: dict[str, str] = {}
        self._frozen: list[tuple[str, nn.Parameter]] = []
        layers = self._find_layers(conv=conv, bias=bias, include=include, exclude=exclude)
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._not_covered.items())
            raise ValueError(f"nothing to precondition in {type(model).__name__} ({reasons or 'it has no parameters'})")
        self._stacks = make_stacks(layers, damping=damping, damping_scale=damping_scale, ema=ema)
        self._stack_of = {layer: stack for stack in self._stacks for layer in stack.layers}

    @property
    def collecting(self) -> bool:
        """Whether rows are being counted, that is, whether the next :meth:`step` refreshes the inverses."""
        return self._steps % self.update_every == 0

    @torch.no_grad()
    def step(self) -> None:
        """Rewrite the gradients of the covered parameters in place: call between backward and the optimizer's step.

        Under DDP all ranks must call it equally often; it communicates on refresh steps only.

        Raises:
            RuntimeError: A covered layer has a gradient although no row reached it, so its inverse would be missing.
        """
        for name, parameter in self._frozen:
            if parameter.requires_grad and parameter.grad is not None:
                raise RuntimeError(
                    f"{name}: was frozen when the preconditioner was made, and now has a gradient; make a new "
                    "preconditioner after unfreezing, or exclude the module"
                )
        with torch.autocast(self._stacks[0].layers[0].weight.device.type, enabled=False):
            if self.collecting:
                self._refresh()
            for stack in self._stacks:
                stack.apply()
        self._steps += 1

    def remove(self) -> None:
        """Take the hooks off the model; the preconditioner is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def summary(self) -> Summary:
        """One row per parameter: covered, with the shape and spectrum of its covariance, or why not.

        Costs an eigenvalue decomposition per layer: for a person to look at, not for every step.
        """
        rows = [SummaryRow(name, reason=reason) for name, reason in self._not_covered.items()]
        for stack in self._stacks:
            for layer, covariance, rows_seen in stack.statistics():
                condition, rank = spectrum(covariance, layer.diagonal)
                rows += [
                    SummaryRow(name, layer.kind, layer.dim, rows_seen, condition, rank)
                    for name in layer.parameter_names
                ]
        order = {public_name(name): i for i, (name, _) in enumerate(self._model.named_parameters())}
        return Summary(sorted(rows, key=lambda row: order.get(row.parameter, len(order))))

    def state_dict(self) -> dict[str, Any]:
        """The step count and each layer's covariance: enough to go on bit for bit, with any number of ranks."""
        layers = {name: state for stack in self._stacks for name, state in stack.state_dict().items()}
        return {"steps": self._steps, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: The state was saved for other layers or other shapes.
        """
        saved = state["layers"]
        known = {layer.name for layer in self._stack_of}
        if saved and saved.keys() != known:
            difference = ", ".join(sorted(saved.keys() ^ known))
            raise ValueError(f"the preconditioner's state was saved for other layers; they differ in: {difference}")
        self._steps = state["steps"]
        if saved:
            for stack in self._stacks:
                stack.load_state_dict(saved)

    def _find_layers(
        self, *, conv: ConvCovariance, bias: bool, include: Sequence[str] | None, exclude: Sequence[str]
    ) -> list[Layer]:
        """Choose what to cover, hook it, and note for every other parameter why it is left out."""
        found: dict[int, list[Layer]] = {}  # by the weight: modules may share one
        for name, module in self._model.named_modules():
            name = public_name(name)
            reason = _why_not(name, module, include, exclude)
            if reason is None:
                layer = layer_type(module)(_join(name, "weight"), module, conv=conv, bias=bias)  # type: ignore[misc]
                found.setdefault(id(module.weight), []).append(layer)
                reason = "the base optimizer takes it: bias=False, or a bias that no homogeneous coordinate fits"
            elif reason == FROZEN:
                self._frozen.append((_join(name, "weight"), module.weight))
            self._not_covered.update((_join(name, p), reason) for p, _ in module.named_parameters(recurse=False))
        layers = []
        for twins in found.values():
            if len({(layer.kind, layer.dim) for layer in twins}) > 1:
                kinds = ", ".join(f"{layer.name} ({layer.kind})" for layer in twins)
                self._not_covered.update((layer.name, f"tied between different kinds: {kinds}") for layer in twins)
                continue
            # A shared weight pools the rows of all the modules that use it.
            layers.append(twins[0])
            for name in [*twins[0].parameter_names, *(layer.name for layer in twins)]:
                self._not_covered.pop(name, None)
            for layer in twins:
                self._hook(layer.module, twins[0])
        return layers

    def _hook(self, module: nn.Module, layer: Layer) -> None:
        self._handles.append(module.register_forward_hook(_Capture(self, layer), with_kwargs=True))

    def _capture(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not (self.collecting and layer.module.training and isinstance(output, Tensor) and output.requires_grad):
            return None
        if not layer.weight.requires_grad:
            return None
        x = (args[0] if args else kwargs["input"]).detach()
        return _CountRows.apply(output, x, partial(self._count, layer))

    def _count(self, layer: Layer, x: Tensor) -> None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self._stack_of[layer].add(layer, x)

    def _refresh(self) -> None:
        """Pool the sums over ranks and recompute the inverses."""
        for stack in self._stacks:
            stack.allocate()
        sums = [stack.sums for stack in self._stacks]
        counts = torch.tensor([n for stack in self._stacks for n in stack.counts], dtype=torch.float64)
        counts = all_reduce_sums(sums, counts.to(sums[0].device), self.process_group)
        per_stack = counts.split([len(stack.layers) for stack in self._stacks])
        outcomes = [stack.refresh(n) for stack, n in zip(self._stacks, per_stack, strict=True)]
        # The one place where the host waits for the device: once per refresh, whatever the number of layers.
        outcome = torch.cat(outcomes, dim=1).tolist()
        layers = ((stack, index) for stack in self._stacks for index in range(len(stack.layers)))
        for (stack, index), rows, trace, good in zip(layers, *outcome, strict=True):
            stack.rows_seen[index] = int(rows)
            if rows == 0:
                _check_unused(stack.layers[index])
            elif good:
                stack.refreshed_at[index] = self._steps
            else:
                _report_failure(stack, index, trace)


def _check_unused(layer: Layer) -> None:
    gradient = layer.weight.grad
    if gradient is not None and bool(gradient.any()):
        raise RuntimeError(
            f"{layer.name}: has a gradient, but its module's forward was never seen in training mode. Was it called in "
            "eval mode, through a functional call on its weight, or compiled before the preconditioner was made? Mend "
            "that, or exclude the module."
        )


def _report_failure(stack: LayerStack, index: int, trace: float) -> None:
    """Warn once per layer, and count."""
    stack.failures[index] += 1
    if stack.failures[index] > 1:
        return
    if not math.isfinite(trace):
        problem = "has NaN or infinity"
    elif trace == 0:
        problem = "is zero, every input of the layer was 0"
    else:
        problem = "is not positive definite, raise the damping"
    step = stack.refreshed_at[index]
    kept = "left the gradient as it was" if step is None else f"kept the inverse of step {step}"
    log.warning("%s: covariance %s (rows %d); %s", stack.layers[index].name, problem, stack.rows_seen[index], kept)


class _CountRows(torch.autograd.Function):
    """The identity on a layer's output; its backward counts the rows of the layer's input.

    The input is kept as autograd keeps it: recomputed under activation checkpointing, dropped with a graph that is
    never walked back, and refused if it was overwritten in the meantime.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, count: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.count = count
        ctx.mark_dirty(output)  # the same tensor, not a view of it: what follows may work in place
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.count(*ctx.saved_tensors)
        return gradient, None, None


class _Capture:
    """The forward hook of one module. Copies of the module (EMA, target networks) carry an inert one."""

    def __init__(self, owner: ActivationPreconditioner | None = None, layer: Layer | None = None) -> None:
        self.owner = owner
        self.layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if self.owner is None or self.layer is None:
            return None
        return self.owner._capture(self.layer, args, kwargs, output)

    def __reduce__(self) -> tuple[type[_Capture], tuple[()]]:
        return _Capture, ()


def public_name(name: str) -> str:
    """A module's or parameter's name without what ``torch.compile`` puts before it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


def _why_not(name: str, module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> str | None:
    """Why a module's parameters are not covered, or None if they are."""
    if layer_type(module) is None:
        return f"{type(module).__name__} is not a layer type with an activation covariance"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "MultiheadAttention computes with its weight, not through its forward"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed, not a parameter (weight_norm or another parametrization)"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "lazy and not initialised yet; run a forward before making the preconditioner"
    if not module.weight.requires_grad:
        return FROZEN
    if include is not None and not any(fnmatchcase(name, pattern) for pattern in include):
        return f"{name} matches no include pattern"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return f"{name} matches an exclude pattern"
    if isinstance(module, nn.Embedding) and module.sparse:
        return "sparse gradients are not supported; use sparse=False"
    return None


def check_options(*, damping: float, damping_scale: str, update_every: int, ema: float, conv: str) -> None:
    """Raise ValueError for an option out of range, before anything is built."""
    if not (0 < damping < math.inf):
        raise ValueError(f"damping must be positive, got {damping}; 0.01 is a good start")
    if damping_scale not in get_args(DampingScale):
        raise ValueError(f"damping_scale must be one of {get_args(DampingScale)}, got {damping_scale!r}")
    if update_every < 1:
        raise ValueError(f"update_every must be at least 1 step, got {update_every}")
    if not 0 <= ema < 1:
        raise ValueError(f"ema must lie in [0, 1), got {ema}")
    if conv not in get_args(ConvCovariance):
        raise ValueError(f"conv must be one of {get_args(ConvCovariance)}, got {conv!r}")
