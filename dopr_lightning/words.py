"""How numbers are called, and said, to a person."""

from __future__ import annotations

METRIC_LABELS = {"return": "return", "max_reward": "score", "success": "success rate"}
"""Of the metrics of :class:`~dopr_lightning.data.environment.EnvironmentSpec`."""


def duration(seconds: float) -> str:
    """``"40 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
