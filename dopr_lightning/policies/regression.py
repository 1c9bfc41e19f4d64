"""How does a plain regression policy learn? By mean squared error; it acts by saying what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Condition = TypeVar("Condition")


def regression_loss(predict: Callable[[Condition], Tensor], actions: Tensor, condition: Condition) -> Tensor:
    """Return the mean squared error per coordinate: E |f(c) - a|^2. Its minimiser is f(c) = E[a | c].

    Args:
        predict: The model, ``predict(condition) -> (B, T, A)``.
        actions: Actions, (B, T, A), normalised.
        condition: What the model sees; passed through.

    Returns:
        A scalar.
    """
    return (predict(condition) - actions).square().mean()
