"""What is a result, or a checkpoint, a result of? The versions that it came about with."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

PACKAGES = ("dopr-lightning", "torch", "lightning", "gymnasium", "mujoco", "gym-pusht", "robosuite", "numpy")
"""What a result may depend on."""


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
