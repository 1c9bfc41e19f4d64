"""Double Preconditioning (DoPr) for PyTorch Lightning.

Names are imported on first use, so that ``import dopr_lightning`` and ``dopr --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dopr_lightning.callback import DoPr as DoPr
    from dopr_lightning.deploy import load_policy as load_policy
    from dopr_lightning.experiments.coordinates import coordinate_check as coordinate_check
    from dopr_lightning.mup import MupSpec as MupSpec
    from dopr_lightning.optim import configure_optimizers as configure_optimizers
    from dopr_lightning.optim import mup_table as mup_table
    from dopr_lightning.preconditioner import ActivationPreconditioner as ActivationPreconditioner
    from dopr_lightning.preconditioner import register_layer as register_layer

__version__ = "0.1.0"

_HOME = {
    "ActivationPreconditioner": "dopr_lightning.preconditioner",
    "DoPr": "dopr_lightning.callback",
    "MupSpec": "dopr_lightning.mup",
    "configure_optimizers": "dopr_lightning.optim",
    "coordinate_check": "dopr_lightning.experiments.coordinates",
    "load_policy": "dopr_lightning.deploy",
    "mup_table": "dopr_lightning.optim",
    "register_layer": "dopr_lightning.preconditioner",
}

__all__ = [
    "ActivationPreconditioner",
    "DoPr",
    "MupSpec",
    "configure_optimizers",
    "coordinate_check",
    "load_policy",
    "mup_table",
    "register_layer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
