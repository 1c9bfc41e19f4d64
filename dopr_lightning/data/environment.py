"""Which environment a policy is judged in, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dopr_lightning.errors import UserError

Metric = Literal["return", "max_reward", "success"]


@dataclass(frozen=True)
class EnvironmentSpec:
    """An environment and its evaluation protocol, without importing any simulator.

    Args:
        id: Gymnasium id, ``"Hopper-v5"``.
        max_steps: Longest episode, in environment steps.
        metric: What an episode is worth: ``"return"``, the sum of its rewards, ``"max_reward"``, the best of them
            (PushT's score: how much of the goal was ever covered), or ``"success"``, 1 if ``info["is_success"]`` ever
            held, else 0. The environment reports failures too: an evaluation in which no episode says anything is
            refused, for a key that is never there would look like a policy that always fails.
        first_seed: Reported episodes reset with this seed and those after it. 100000 is Diffusion Policy's choice;
            demonstrations are recorded with small seeds, so the two never meet.
        kwargs: Passed to the environment's constructor.
        extra: The extra of ``dopr-lightning`` that installs it; ``None`` for what the base install has.
        module: The module that registers the id with Gymnasium on import; ``None`` for Gymnasium's own.
        cameras: Whose images are observed. With none, an observation is a vector (O,); with some it is
            ``{"state": (O,), "images": {camera: (H, W, 3) uint8}}``.
        name: What a person calls the task, where the id does not say it.
        simulators: The distributions, as pip names them, whose versions decide what an episode is. A checkpoint
            records them, and is not judged in others unasked.

    Raises:
        UserError: There is no such metric, or a number is out of range.
    """

    id: str
    max_steps: int
    metric: Metric
    first_seed: int = 100_000
    kwargs: dict[str, Any] = field(default_factory=dict)
    extra: str | None = None
    module: str | None = None
    cameras: tuple[str, ...] = ()
    name: str = ""
    simulators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise UserError(f"{self.id}: metric {self.metric!r}; choose one of {', '.join(get_args(Metric))}")
        # Gymnasium takes -1 for no limit, and a rollout may then never end.
        if self.max_steps < 1:
            raise UserError(f"{self.id}: max_steps={self.max_steps}; must be at least 1")
        if self.first_seed < 0:
            raise UserError(f"{self.id}: first_seed={self.first_seed}; must be at least 0")

    @property
    def title(self) -> str:
        """The task's name, or else the id."""
        return self.name or self.id
