"""muP: which dimensions grow with a model's width, and how its hyperparameters follow them."""

from dopr_lightning.mup.rules import MatrixGrowth, WeightDecayRule
from dopr_lightning.mup.spec import MupSpec

__all__ = ["MatrixGrowth", "MupSpec", "WeightDecayRule"]
