"""Demonstrations to begin with: an arm's hand, in a plane, is led to a goal. Replace the file by your own.

Run it as: python -m {{ cookiecutter.package }}.example demonstrations.npz
"""

import sys
from pathlib import Path

import numpy as np


def write(path: Path, episodes: int = 40, steps: int = 40, seed: int = 0) -> None:
    """Record and write the file that README.md describes.

    An observation is the place of the hand and that of its goal (4 numbers), an action the hand's velocity (2 numbers).

    Args:
        path: Where to.
        episodes: How many.
        steps: Of each.
        seed: Of the places.
    """
    rng = np.random.default_rng(seed)
    observations, actions = [], []
    for _ in range(episodes):
        hand, goal = rng.uniform(-1, 1, (2, 2))
        for _ in range(steps):
            velocity = np.clip(2 * (goal - hand), -1, 1)
            observations.append([*hand, *goal])
            actions.append(velocity)
            hand = hand + 0.1 * velocity
    ends = np.arange(steps, episodes * steps + 1, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, observations=np.array(observations), actions=np.array(actions), episode_ends=ends)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
