"""What is a result a result of? The versions that it came about with."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("dopr-lightning", "torch", "lightning", "gymnasium", "mujoco", "gym-pusht", "robosuite", "numpy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
