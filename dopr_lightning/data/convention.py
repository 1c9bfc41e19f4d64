"""What the numbers of an observation and of an action mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Convention:
    """A policy trained under one convention is worthless under another of the same sizes: its checkpoint says which.

    Args:
        observation_keys: What a state is made of, in order.
        actions: Their kind: ``"absolute"``, where to go; ``"relative"``, by how much; or ``"native"``, whatever the
            environment takes (torques, say).
        rotation: How actions give rotations: ``"6d"``, ``"axis_angle"``; ``None`` where there are none.
        low: The least action that the environment does not clip, one number per dimension; ``None``: not known.
        high: The greatest.
    """

    observation_keys: tuple[str, ...] = ("observation",)
    actions: Literal["absolute", "relative", "native"] = "native"
    rotation: str | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None


def bounds(space: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """``low`` and ``high`` of a Gymnasium Box."""
    return tuple(space.low.tolist()), tuple(space.high.tolist())
