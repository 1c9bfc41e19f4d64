"""Does the simulator still do what it did when a file was recorded?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dopr_lightning.data.robomimic.absolute import stored_as_poses
from dopr_lightning.data.robomimic.files import DemoFile
from dopr_lightning.data.robomimic.rotations import actions_from_six
from dopr_lightning.data.robomimic.simulator import Simulator
from dopr_lightning.errors import UserError

Array = npt.NDArray[Any]

# What policies are given; the others, accelerations above all, differ in every version.
COMPARED = ("object", "eef_pos", "eef_quat", "gripper_qpos")
# Files hold XML with six digits, and some float32.
SAME = 1e-4


@dataclass(frozen=True)
class Replayed:
    """One demonstration, played again.

    Args:
        demo: Its name.
        solved: Whether the recorded actions solved the task again.
        deviation: How far any joint or object went from the recorded path, in metres or radians.
        observations: Per key, how far what is observed in the recorded states is from what the file holds.
    """

    demo: str
    solved: bool
    deviation: float
    observations: Mapping[str, float]


def replay(path: Path, episodes: int | None = None, absolute: bool = False) -> Iterator[Replayed]:
    """Start at the recorded first state and play the recorded actions, demonstration by demonstration.

    Args:
        path: A robomimic file with states.
        episodes: Only the first so many; ``None`` for all.
        absolute: Play the poses that the actions asked for, by way of 6-D rotations, as policies on absolute actions
            do. The pose is that of the recorded path, so small deviations do not add up.

    Raises:
        UserError: The file or the simulator will not do.
    """
    with DemoFile(path) as file:
        if episodes is not None and not 1 <= episodes <= len(file.demos):
            raise UserError(f"--episodes {episodes}: {path} has {len(file.demos)}; ask for 1 to {len(file.demos)}")
        simulator = Simulator(file.env_args, absolute=absolute)
        try:
            for demo in file.demos[:episodes]:
                yield _replay(file, simulator, demo, absolute)
        finally:
            simulator.close()


def _replay(file: DemoFile, simulator: Simulator, demo: str, absolute: bool) -> Replayed:
    model, states = file.model(demo), file.read(demo, "states")
    actions = actions_from_six(stored_as_poses(file, demo)) if absolute else file.read(demo, "actions")
    simulator.restore(model, states[0])
    recorded = simulator.translated(model, states)
    observations = _compare(file, simulator, demo, recorded)
    simulator.restore(model, states[0])
    solved, deviation = simulator.solved, 0.0
    for state, action in zip(recorded, actions, strict=True):
        deviation = max(deviation, simulator.distance(state))
        solved = simulator.step(action) or solved
    return Replayed(demo, solved, deviation, observations)


def _compare(file: DemoFile, simulator: Simulator, demo: str, states: Array) -> dict[str, float]:
    """Per key, the largest difference between what is observed in the recorded states and what the file holds."""
    seen: list[dict[str, Array]] = []
    for state in states:
        simulator.jump(state)
        seen.append(simulator.observe())
    differences = {}
    for key in file.observation_keys(demo):
        if key.endswith(COMPARED) and key in seen[0]:
            stored, now = file.read(demo, f"obs/{key}"), np.array([observation[key] for observation in seen])
            if stored.shape != now.shape:
                raise UserError(
                    f"{file.path}: obs/{key} is {stored.shape[1:]}, this robosuite's is {now.shape[1:]}; fetch the "
                    "file for robosuite 1.5"
                )
            # Relative poses are of the object at the previous reading, and the first has none to go by.
            differences[key] = float(np.abs(now - stored)[1:].max(initial=0.0))
    return differences
