"""The networks of a policy: what maps observations (and a noisy action and a time) to actions."""

from dopr_lightning.policies.networks.base import ActionNetwork, VisualObservation
from dopr_lightning.policies.networks.residual_mlp import ResidualMLP
from dopr_lightning.policies.networks.transformer import ActionTransformer
from dopr_lightning.policies.networks.unet1d import ConditionalUnet1d
from dopr_lightning.policies.networks.vision import VisionMLP, VisionTransformer, VisionUnet1d

__all__ = [
    "ActionNetwork",
    "ActionTransformer",
    "ConditionalUnet1d",
    "ResidualMLP",
    "VisionMLP",
    "VisionTransformer",
    "VisionUnet1d",
    "VisualObservation",
]
