"""The networks of a policy: what maps observations (and a noisy action and a time) to actions."""

from dopr_lightning.policies.networks.base import ActionNetwork
from dopr_lightning.policies.networks.residual_mlp import ResidualMLP
from dopr_lightning.policies.networks.unet1d import ConditionalUnet1d

__all__ = ["ActionNetwork", "ConditionalUnet1d", "ResidualMLP"]
