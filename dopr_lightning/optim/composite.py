"""Several algorithms behind one Optimizer, since Lightning, schedulers and checkpoints want exactly one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class CompositeOptimizer(Optimizer):
    """Steps its parts in turn; parameter groups and state are theirs, seen as one.

    Learning-rate schedulers change the groups' rates in place, and :meth:`state_dict` is that of a plain Optimizer
    over all groups.

    Args:
        parts: Optimizers over disjoint parameters. A part without parameters is not allowed, as in torch.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        self._bound = False
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._bound = True
        self._share()

    def _share(self) -> None:
        """Let the parts work on our groups and our state: the same objects, so nothing needs to be kept in step."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        # A copy must know its parts; copied together, they go on sharing groups and state.
        return {**super().__getstate__(), "parts": self.parts, "_bound": self._bound}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every part; ``closure``, if any, is evaluated once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while building: a group added later would belong to no part and never be stepped."""
        if self._bound:
            raise TypeError("CompositeOptimizer's groups are fixed; add the group to the part it belongs to, before")
        super().add_param_group(param_group)
