r"""Which rows did a training backward go through?

A forward hook puts a node behind each layer's output that is the identity and whose backward hands the layer's input
on. So rows are counted when a gradient reaches them: each training row exactly once, also under gradient accumulation
and activation checkpointing, and forwards without a backward (validation, rollouts, target networks) not at all. Nor
are they in a backward that leaves the weight out, unless it is compiled.

Between refreshes the hooks are off: a module with a hook takes PyTorch's slow way to its forward, 1.5 us on one host
and 10 on another.

``torch.compile`` traces the hooks into its graphs, without graph breaks, and has two of them: one of the steps that
refresh, and one of all others, in which nothing is left of the hooks. In the former the node's backward is the opaque
operator ``dopr_lightning::count_rows``, so that whatever changes from refresh to refresh is asked when the graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dopr_lightning.preconditioner.engine import (
    ORDERED,
    drop_modes,
    gets_gradient,
    hooks_numbered_from,
    keep_out_of_cuda_graphs,
    within_torch_func,
)
from dopr_lightning.preconditioner.sharding import local

if TYPE_CHECKING:
    from dopr_lightning.preconditioner.audit import GradientAudit
    from dopr_lightning.preconditioner.layers import Layer

OPERATOR = "dopr_lightning::count_rows"


class Capture:
    """Hands the inputs of ``layers`` to ``sink``, once per training row.

    Args:
        layers: What to watch; every module of a layer is hooked.
        sink: Called in backward as ``sink(layer, x, mask, lasts)``, without gradients and outside the user's autocast,
            with the input ``x`` as the weight multiplied it, rounded by autocast (of a DTensor this rank's part), the
            :meth:`mask` of its forward, and whether ``x`` lasts until the backward's end.
        audit: Is shown the gradients of the layers' outputs as long as it wants them.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        sink: Callable[[Layer, Tensor, Tensor | None, bool], None],
        audit: GradientAudit | None = None,
    ) -> None:
        keep_out_of_cuda_graphs(OPERATOR)
        self.current_mask: Tensor | None = None
        self._sink = sink
        self._audit = audit
        self._taps: dict[nn.Module, list[_Tap]] = {}
        for tap in [_Tap(self, layer) for layer in layers]:
            for module in tap.layer.modules:
                self._taps.setdefault(module, []).append(tap)
        self._handles: list[RemovableHandle] = []
        self._first_number = RemovableHandle.next_id
        self.listen(True)

    def listen(self, wanted: bool) -> None:
        """Say whether rows are wanted from now on, as they are at first; else the hooks are off."""
        if not wanted:
            for handle in self._handles:
                handle.remove()
            if self._handles:
                _stop_watching(lambda tap: tap.capture is self)
            self._handles.clear()
        elif not self._handles:
            for module, taps in self._taps.items():
                # Numbered alike in each module, so that blocks that share code share one graph.
                with hooks_numbered_from(self._first_number):
                    for tap in taps:
                        self._hook(tap, module)

    @contextmanager
    def mask(self, mask: Tensor) -> Iterator[None]:
        """Within this context forwards count only the rows where ``mask`` is True; others may hold anything, NaN too.

        The backward may lie outside the context, except where checkpointing repeats the forward in the backward and
        only that repetition can be recorded: with ``use_reentrant=True``, or around a compiled module.
        """
        previous, self.current_mask = self.current_mask, mask
        try:
            yield
        finally:
            self.current_mask = previous

    def remove(self) -> None:
        """Take the hooks off the modules; graphs already built or compiled count no more."""
        self._taps.clear()
        self.listen(False)

    def count(self, layer: Layer, x: Tensor, mask: Tensor | None, *, lasts: bool) -> None:
        """Take the input of one call of ``layer`` from the backward, to whose end it lasts or not."""
        if not self._handles:  # the step is over that the forward belonged to
            return
        # Entering these contexts takes longer than a small layer's statistics, and backward seldom needs them.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._sink(layer, x, mask, lasts)
        else:
            self._sink(layer, x, mask, lasts)

    def show_audit(self, layer: Layer, x: Tensor, gradient: Tensor) -> None:
        """Show the audit the input of one call of ``layer`` and the gradient of its output."""
        if self._audit is not None and self._handles:
            self._audit.captured(layer, x, gradient)

    def end_audit(self, layer: Layer) -> None:
        """Show the audit no more of ``layer``."""
        if self._audit is not None:
            self._audit.leave(layer)

    def _hook(self, tap: _Tap, module: nn.Module) -> None:
        # Next to the module's own forward, whatever hooks others add: so it is the same when it is put back.
        if tap.layer.functional:
            watch = _WatchFunctional(tap)
            self._handles.append(module.register_forward_pre_hook(watch))
            self._handles.append(module.register_forward_hook(watch.leave, always_call=True, prepend=True))
        else:
            self._handles.append(module.register_forward_hook(_TapOutput(tap), with_kwargs=True, prepend=True))


class _Tap:
    """Puts the counting node behind outputs of one layer."""

    def __init__(self, capture: Capture, layer: Layer) -> None:
        self.capture = capture
        self.layer = layer
        # A tensor, since a compiled graph takes it as an input: blocks that share code share one graph. As a number
        # it would be a constant of the graph and every block would be compiled anew.
        key = next(_keys)
        self.key = torch.tensor(key, device="cpu")
        _tap_of_key[key] = self

    def wanted(self, module: nn.Module) -> bool:
        """Whether this call of the module may be of a training step that wants rows."""
        if not (module.training and torch.is_grad_enabled()):
            return False
        # Within torch.func tensors are wrapped. Its gradients are values; where they become a weight's .grad all the
        # same (vmap of the module itself, then backward), no row is counted, and step() says so.
        if not torch.compiler.is_compiling() and within_torch_func():
            return False
        return self.layer.weight.requires_grad

    def __call__(self, output: Any, x: Any) -> Tensor:
        if not (isinstance(output, Tensor) and isinstance(x, Tensor)) or x.is_nested:
            raise TypeError(
                f"{self.layer.name}: rows cannot be taken from a call with {_describe(x)} that returns "
                f"{_describe(output)}; exclude the module, or cover its type by register_layer"
            )
        if not output.requires_grad:
            return output
        # In the middle of a backward data and buffers may be filled anew by a checkpoint's recomputation, and FSDP2
        # frees the memory of parameters.
        lasts = x.requires_grad and not isinstance(x if x._base is None else x._base, nn.Parameter)
        x = local(x).detach()
        if self.layer.rearranges and output.dtype in _LOW_PRECISION:
            # As autocast did: the weight multiplied a cast of x, and x itself may be overwritten.
            x = x.to(output.dtype)
        counting = _CountRows if torch.compiler.is_compiling() else _CountRowsEagerly
        return counting.apply(output, x, self.capture.current_mask, self.key, self, lasts)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else "a tensor"
    return f"a {type(value).__name__}" if value is not None else "no tensor"


_LOW_PRECISION = (torch.bfloat16, torch.float16)
_keys = count()
_tap_of_key: WeakValueDictionary[int, _Tap] = WeakValueDictionary()


class _CountRows(torch.autograd.Function):
    """The identity on a layer's output; its backward counts the rows of the layer's input.

    The input is kept as autograd keeps it: recomputed under activation checkpointing, dropped with a graph that is
    never walked back, and refused if it was overwritten in the meantime. The mask is no saved tensor, since
    checkpointing would recompute it outside its context.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, mask: Tensor | None, key: Tensor, tap: _Tap, lasts: bool
    ) -> Tensor:
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x, mask, key)
        else:
            ctx.save_for_backward(x)
            ctx.mask, ctx.tap, ctx.lasts, ctx.counted = mask, tap, lasts, False
        # Shares memory and version counter with the output, but is no view of it to autograd: what follows may work
        # in place, and a view (any batched Linear) is spared the copies of autograd's CopySlices. In a graph of its
        # own, behind a graph break, it would be a view of the graph's input; so there a copy, which else is dropped.
        return output.clone() if torch.compiler.is_compiling() else output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if torch.compiler.is_compiling():
            count_rows(local(gradient), *ctx.saved_tensors)
        else:
            (x,) = ctx.saved_tensors
            ctx.tap.capture.show_audit(ctx.tap.layer, x, gradient)
            if not ctx.counted and gets_gradient(ctx.tap.layer.weight):  # a graph may be walked back twice
                ctx.counted = True
                ctx.tap.capture.count(ctx.tap.layer, x, ctx.mask, lasts=ctx.lasts)
        return gradient, None, None, None, None, None


class _CountRowsEagerly(_CountRows):
    """With forward-mode differentiation, which torch.compile takes no function for."""

    @staticmethod
    def jvp(ctx: Any, output: Tensor, *others: None) -> Tensor:
        # The tangent's part of a weight's gradient has rows of its own, as that of a gradient penalty.
        ctx.tap.capture.end_audit(ctx.tap.layer)
        return output.view_as(output)  # autograd refuses the very tensor


@torch.library.custom_op(OPERATOR, mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def count_rows(gradient: Tensor, x: Tensor, mask: Tensor | None, key: Tensor) -> None:
    """Compiled graphs call this in their backward. It takes the gradient so that it can be nowhere else."""
    tap = _tap_of_key.get(int(key))
    if tap is not None:
        tap.capture.show_audit(tap.layer, x, gradient)
        tap.capture.count(tap.layer, x, mask, lasts=False)  # memory that the graph may use again


@count_rows.register_fake
def _(gradient: Tensor, x: Tensor, mask: Tensor | None, key: Tensor) -> None:
    return None


# It returns nothing and would be dropped as dead code. An effect instead of an argument that it mutates: that would
# have to be saved for backward, and a second micro-batch's backward would find it modified.
count_rows.register_effect(ORDERED)


class _Hook:
    """A hook that copies of its module (EMA, target networks) carry without effect."""

    def __init__(self, tap: _Tap | None = None) -> None:
        self.tap = tap

    @property
    def __name__(self) -> str:
        """Asked by ``torch.jit.script``, which compiles hooks; it cannot compile these."""
        if self.tap is None:
            raise AttributeError(
                "torch.jit.script compiles no copy of a model with a preconditioner: load the copy's state_dict into a "
                "model made afresh"
            )
        raise AttributeError("torch.jit.script compiles no model with a preconditioner: call its remove() first")

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class _TapOutput(_Hook):
    """Forward hook: taps the module's output, or the first of a tuple of outputs."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.tap is None or not self.tap.wanted(module):
            return None
        x = self.tap.layer.input(args, kwargs)
        if isinstance(output, tuple) and output:
            tapped = self.tap(output[0], x), *output[1:]
            return type(output)(*tapped) if hasattr(output, "_fields") else tapped
        return self.tap(output, x)


class _WatchFunctional(_Hook):
    """Forward pre-hook: from here on, watch for the functional linear that uses the layer's weight."""

    def __init__(self, tap: _Tap | None = None) -> None:
        super().__init__(tap)
        self.modes: list[TorchFunctionMode | None] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        mode = None
        if self.tap is not None and self.tap.wanted(module):
            if not torch.compiler.is_compiling() and _stop_watching(lambda tap: tap is self.tap):
                self.modes.clear()
            mode = _TapFunctionalLinear(self.tap)
            mode.__enter__()
        self.modes.append(mode)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, called after an exception too: stop watching."""
        mode = self.modes.pop() if self.modes else None  # none if an earlier pre-hook failed
        if mode is not None:
            mode.__exit__(None, None, None)


class _TapFunctionalLinear(TorchFunctionMode):
    """Taps each ``F.linear`` with the layer's weight."""

    def __init__(self, tap: _Tap) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # the calls to watch are its own
                return _attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is F.linear:
            x, weight = _linear_arguments(*args, **kwargs)
            if weight is self.tap.layer.weight:
                return self.tap(output, x)
        return output


def _stop_watching(which: Callable[[_Tap], bool]) -> bool:
    """Take off what interrupted forwards have left on for some taps; returns whether there was anything."""
    return drop_modes(lambda mode: isinstance(mode, _TapFunctionalLinear) and which(mode.tap))


# The same function, but for its own question whether a mode wants the call: that would come back here, without end. It
# sees torch.nn.functional as it was when this was imported.
_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    "attention",
    F.multi_head_attention_forward.__defaults__,
)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return input, weight
