"""How the learning rate moves over training, as a factor on each group's own rate."""

from __future__ import annotations

import math
from functools import partial
from numbers import Real
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "cosine"]


def warmup_factor(step: int, *, schedule: Schedule, warmup_steps: int, total_steps: float) -> float:
    """Factor on the peak rate at the zero-based ``step``.

    Linear warm-up from 1 / (warmup_steps + 1) to 1, then constant, or a half cosine to 0 at ``total_steps``. A factor,
    not a rate, so that groups keep the ratio of their rates (muP needs that).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def check_schedule(schedule: Schedule, warmup_steps: int, total_steps: float) -> None:
    """See :func:`make_scheduler`.

    Raises:
        ValueError: Unknown schedule, negative or fractional warm-up, or a cosine without a finite end after it.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(get_args(Schedule))}")
    # A share of the steps, as others take it, would be no warm-up at all.
    if not isinstance(warmup_steps, Real) or warmup_steps % 1 != 0:
        raise ValueError(f"warmup_steps must be a whole number of steps, got {warmup_steps!r}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    if not isinstance(total_steps, Real):
        raise ValueError(f"total_steps must be a number of steps, got {total_steps!r}")
    if schedule == "cosine" and not warmup_steps < total_steps < math.inf:
        raise ValueError(
            f"a cosine schedule needs a finite number of steps beyond its {warmup_steps} warm-up steps, "
            f"got {total_steps}; set Trainer(max_steps=...) or total_steps, or lower warmup_steps"
        )


def make_scheduler(optimizer: Optimizer, schedule: Schedule, warmup_steps: int, total_steps: float) -> LambdaLR:
    """A scheduler to be stepped after every optimizer step.

    Args:
        optimizer: Its groups' present rates are the peak rates.
        schedule: ``"constant"`` or ``"cosine"``.
        warmup_steps: Steps of linear warm-up, 0 for none.
        total_steps: Optimizer steps of the whole training; ``"constant"`` does not look at it.

    Raises:
        ValueError: Unknown schedule, negative or fractional warm-up, or a cosine without a finite end after it.
    """
    check_schedule(schedule, warmup_steps, total_steps)
    # Not an object with attributes: LambdaLR would restore these from a checkpoint, and a longer run would end early.
    factor = partial(warmup_factor, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps)
    return LambdaLR(optimizer, factor)
