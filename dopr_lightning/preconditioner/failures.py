"""What is said of a layer that something is wrong with?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from logging import getLogger

import torch

from dopr_lightning.preconditioner.layers import Layer
from dopr_lightning.preconditioner.lowrank import LowRankStack
from dopr_lightning.preconditioner.stack import Failure

log = getLogger(__name__)


def unseen(layer: Layer, others: Sequence[Layer], *, masked: bool, before: bool) -> str:
    """The message that a layer's gradient has no rows, with the likeliest cause.

    Args:
        layer: The layer.
        others: Those of which the same holds, for all to be mended at once.
        masked: Whether a mask may have left them out.
        before: Whether there were some in an earlier step.
    """
    if not any(module.training for module in layer.modules):
        cause = "It is in eval mode: put it in training mode, or exclude the module."
    elif masked:
        cause = "Did the mask leave all of its rows out? It must keep those of which the loss is made."
    elif before:
        cause = (
            "Earlier ones were: is this a second step() after one backward, without zero_grad()? Did a backward fail "
            "in between, for want of memory say (then zero_grad() and discard() begin anew)? Was the model "
            "compiled and run before DoPr was imported (torch._dynamo.reset() forgets that)? Or is the gradient of "
            "torch.func or a functional call on the weight?"
        )
    else:
        cause = (
            "Was the backward before the preconditioner was made? Was a model of this class compiled and run before "
            "DoPr was imported (torch._dynamo.reset() forgets that)? Or is the gradient of torch.func or a functional "
            "call on the weight? Mend that, or exclude the module."
        )
    named = [other.name for other in others[:5]]
    if len(others) > len(named):
        named.append(f"{len(others) - len(named)} more")
    so = f", nor those of {', '.join(named)}" if named else ""
    return f"{layer.name}: has a gradient, but its module's inputs were not seen{so}. {cause}"


def too_inexact(stack: LowRankStack, consequence: str) -> str:
    """The message that the tolerance needs more directions than may be tracked, and what comes of it."""
    worst = max(range(len(stack.layers)), key=stack.errors.__getitem__)
    return (
        f"{stack.layers[worst].name}: {stack.tracked} of {stack.dim} directions leave a certified error of "
        f"{stack.errors[worst]:.2g}, more than max_error={stack.options.max_error:g}; {consequence}"
    )


def report(failure: Failure, most: int) -> None:
    """Warn of a refresh that gave no inverse, once per layer and cause; raise RuntimeError after ``most`` in a row.

    But never for inputs that are all 0: the gradient is 0 then, so there is nothing to rewrite.
    """
    record, name = failure.record, failure.layer.name
    if not all(map(math.isfinite, failure.traces)):
        problem = "has NaN or infinity"
    elif not any(failure.traces):
        problem = "is zero, every input of the layer was 0"
    elif _overflows(failure):
        problem = "overflows with its damping, lower the damping"
    else:
        problem = "is not positive definite, raise the damping"
    new = (failure.layer, problem) not in failure.stack.told
    failure.stack.told.add((failure.layer, problem))
    problem = f"{name}: covariance {problem} (rows {record.rows_seen})"
    if any(failure.traces) and record.failures_in_a_row >= most:
        raise RuntimeError(
            f"{problem}, {most} refreshes in a row. Mend the layer's inputs, exclude the module, or raise max_failures."
        )
    if new:
        step = record.refreshed_at
        kept = "left the gradient as it was" if step is None else f"kept the inverse of step {step}"
        log.warning("%s; %s", problem, kept)


def _overflows(failure: Failure) -> bool:
    """Whether the dtype holds the covariance, but no longer with the damping on its diagonal."""
    traces = torch.tensor(failure.traces, dtype=failure.stack.dtype, device="cpu")
    return not bool((traces + failure.stack.damping_of(failure.layer, traces)).isfinite().all())
