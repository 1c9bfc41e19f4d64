"""Activation preconditioning in plain PyTorch: gradients times the inverse covariance of what the layer saw."""

from dopr_lightning.preconditioner.layers import register_layer
from dopr_lightning.preconditioner.preconditioner import ActivationPreconditioner

__all__ = ["ActivationPreconditioner", "register_layer"]
