"""Several algorithms behind one Optimizer, since Lightning, schedulers and checkpoints want exactly one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_RATIO_TOLERANCE = 1e-6
"""How far, relative to the peak rate, groups may stray from their ratios: far above rounding, far below a mistake."""


def apart(values: Sequence[float], peak: float) -> bool:
    """Whether the groups' values, each divided by its multiplier, are not one: they have lost their ratios."""
    return max(values) - min(values) > _RATIO_TOLERANCE * max(peak, *values, 0.0)


class CompositeOptimizer(Optimizer):
    """Steps its parts in turn; parameter groups and state are theirs, seen as one.

    Learning-rate schedulers change the groups' rates in place, and ``state_dict`` is that of a plain Optimizer
    over all groups.

    Args:
        parts: Optimizers over disjoint parameters. A part without parameters is not allowed, as in torch.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        self._bound = False
        groups = [group for part in self.parts for group in part.param_groups]
        self._peak = max(float(group["lr"]) / group.get("lr_mult", 1.0) for group in groups)
        # What all parts have: OneCycleLR and CyclicLR look there for the betas or the momentum that they cycle, and
        # refuse where parts differ, Muon's momentum and AdamW's betas, unless told cycle_momentum=False.
        common = set.intersection(*(set(part.defaults) for part in self.parts))
        super().__init__(groups, {name: self.parts[0].defaults[name] for name in common})
        self._bound = True
        for part in self.parts:
            self.state.update(part.state)  # some optimizers begin it in their constructors
        self._share()

    def _share(self) -> None:
        """Let the parts work on our groups and our state: the same objects, so nothing needs to be kept in step."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        # A copy must know its parts; copied together, they go on sharing groups and state.
        return {**super().__getstate__(), "parts": self.parts, "_bound": self._bound, "_peak": self._peak}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every part; ``closure``, if any, is evaluated once, before them."""
        self._check_ratios()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def _check_ratios(self) -> None:
        """Refuse rates and decays that no longer have their ratios, which many schedulers and tools silently destroy.

        Raises:
            ValueError: They do not. What is a tensor is not looked at: reading it would wait for the device.
        """
        if strayed := self._strayed("lr", "lr_mult", self._peak):
            raise ValueError(
                f"the learning rates of {strayed} no longer have the ratio that muP, or lr_by_role, gave them. What "
                "set them must scale each group's own rate: LambdaLR does; OneCycleLR needs max_lr=[group['lr'] for "
                "group in optimizer.param_groups], CosineAnnealingLR eta_min=0, ReduceLROnPlateau min_lr=0 and eps=0; "
                "lr_find cannot"
            )
        if strayed := self._strayed("weight_decay", "wd_mult", 0.0):
            raise ValueError(
                f"the weight decays of {strayed} no longer have the ratio that muP gave them; what set them must "
                "multiply by each group's own wd_mult"
            )

    def _strayed(self, key: str, multiplier: str, peak: float) -> str:
        """Two parameters whose groups' values have another ratio than their multipliers; empty where all have it."""
        groups = [group for group in self.param_groups if multiplier in group and not isinstance(group[key], Tensor)]
        values = [group[key] / group[multiplier] for group in groups]
        if not values or not apart(values, peak):
            return ""
        low, high = (groups[values.index(end(values))]["param_names"][0] for end in (min, max))
        return f"{low} and {high}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: Its groups hold other parameters, or it is of another base, or of another parametrisation: the
                groups' rates had other ratios.
        """
        saved = [group.get("lr_mult") for group in state_dict["param_groups"]]
        ours = [group.get("lr_mult") for group in self.param_groups]
        if saved != ours and any(multiplier is not None for multiplier in saved + ours):
            raise ValueError(
                f"the checkpoint's groups have learning-rate multipliers {saved}, this optimizer's {ours}; resume with "
                "the muP base, the lr_by_role and the roles that the run was started with"
            )
        theirs, mine = (
            [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        )
        if theirs != mine:
            raise ValueError(
                f"the checkpoint's optimizer has groups of {theirs} parameters, this one's of {mine}; resume with the "
                "base and the roles that the run was started with, or start anew from its weights"
            )
        # Its groups' options would take the place of ours, and a step look for those that it has not.
        options = [part.defaults.keys() for part in self.parts for _ in part.param_groups]
        for needed, group in zip(options, state_dict["param_groups"], strict=True):
            if lacking := sorted(needed - group.keys()):
                raise ValueError(
                    f"the checkpoint's optimizer is of another base, or of another version of it: its groups have no "
                    f"{', '.join(lacking)}; resume with the base that the run was started with, or start anew from "
                    "its weights"
                )
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while building: a group added later would belong to no part and never be stepped."""
        if self._bound:
            raise TypeError(
                "CompositeOptimizer's groups are fixed: no part would step one that is added later. Make it when all "
                "that it is to train is unfrozen, in a new fit, or take an optimizer of torch's"
            )
        super().add_param_group(param_group)
