"""Networks that see cameras: any action network, its embedded observations plus those of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks.base import ActionNetwork, Role, VisualObservation
from dopr_lightning.policies.networks.image_encoder import ImageEncoder
from dopr_lightning.policies.networks.residual_mlp import ResidualMLP
from dopr_lightning.policies.networks.transformer import ActionTransformer
from dopr_lightning.policies.networks.unet1d import ConditionalUnet1d


class Vision(ActionNetwork):
    """Gives the network it is mixed into cameras, with an encoder each: ``class VisionMLP(Vision, ResidualMLP)``.

    The features of a camera's frames are projected to the size of the network's embedded observations and added to
    them. So there is one linear layer between features and condition, and no weight reads features, which grow with
    ``encoder_width``, together with the state, which does not: muP needs that.

    Args:
        observation_dim: O, size of one observation's state.
        action_dim: See :class:`ActionNetwork`.
        observe: See :class:`ActionNetwork`; images as well as states.
        horizon: See :class:`ActionNetwork`.
        denoise: See :class:`ActionNetwork`.
        cameras: Their names.
        encoder_width: Width of the encoders, see ``ResNet18``.
        crop: Side of the crops, see ``ImageEncoder``.
        **options: The network's own.

    Raises:
        UserError: No camera, a name that is no module's, or a size that does not fit.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        observe: int,
        horizon: int,
        denoise: bool,
        cameras: Sequence[str],
        encoder_width: int = 64,
        crop: int = 76,
        **options: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, observe, horizon, denoise, **options)
        if not cameras or len(set(cameras)) < len(cameras) or any("." in name or not name for name in cameras):
            raise UserError(
                f"{type(self).__name__}: cameras must be one or more different names without dots, got {list(cameras)}"
            )
        try:
            encoders = {name: ImageEncoder(encoder_width, crop) for name in cameras}
        except UserError as error:  # the network has a width of its own
            raise UserError(f"{type(self).__name__}: encoder_width={encoder_width}, crop={crop}: {error}") from error
        self.cameras = nn.ModuleDict(encoders)
        self.projections = nn.ModuleDict(
            {name: nn.Linear(observe * encoder.features, self.context_dim) for name, encoder in encoders.items()}
        )

    def encode(self, observation: Tensor | VisualObservation, generator: torch.Generator | None = None) -> Tensor:
        """Turn a state and images into one vector per sample.

        Args:
            observation: ``state``: normalised, (B, To, O). ``images``: by camera, (B, To, 3, H, W), uint8 or floating
                point in [0, 1]; other cameras than the network's are left alone.
            generator: On the CPU: source of random crops, drawn in the order of the cameras; None for central crops.

        Returns:
            (B, To * O + context_dim): the flattened states, beside the sum of the cameras' projections. They stay apart
            in :meth:`compute`; one tensor, so that algorithms need not know of cameras.

        Raises:
            UserError: There are no images, or not those of a camera, or they have the wrong shape.
        """
        if isinstance(observation, Tensor):
            raise UserError(f"{type(self).__name__} needs images: {{'state': ..., 'images': {{camera: ...}}}}")
        state, images = observation["state"], observation["images"]
        self.check_shape("states", state, (self.observe, self.observation_dim))
        if missing := [name for name in self.cameras if name not in images]:
            raise UserError(
                f"{type(self).__name__}: no images of camera {missing[0]!r}, only of {sorted(images)}; set cameras to "
                "what the data has"
            )
        seen = []
        for name, encoder in self.cameras.items():
            frames = images[name]
            if frames.shape[:2] != state.shape[:2]:
                raise UserError(
                    f"camera {name!r}: images of shape {tuple(frames.shape)} with states of shape "
                    f"{tuple(state.shape)}; the first two sizes must agree"
                )
            seen.append(self.projections[name](encoder(frames, generator).flatten(1)))
        return torch.cat([state.flatten(1), torch.stack(seen).sum(0)], dim=1)

    def unpack(self, observation: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`ActionNetwork.unpack`."""
        states = self.observe * self.observation_dim
        self.check_shape("encoded observations", observation, (states + self.context_dim,))
        state, context = observation.split([states, self.context_dim], dim=1)
        return state.unflatten(1, (self.observe, self.observation_dim)), context

    def parameter_roles(self) -> dict[str, Role]:
        """See :meth:`ActionNetwork.parameter_roles`."""
        roles: dict[str, Role] = super().parameter_roles()  # type: ignore[safe-super]  # that of the network mixed into
        for name in self.cameras:
            roles[f"cameras.{name}.resnet.conv1.weight"] = "input"
            if "condition" in roles.values():  # else the whole network sees one row per sample
                roles[f"projections.{name}.weight"] = "condition"
        return roles


class VisionMLP(Vision, ResidualMLP):
    """:class:`ResidualMLP` with cameras, see :class:`Vision`."""

    scales: ClassVar[tuple[str, ...]] = (*ResidualMLP.scales, "encoder_width")


class VisionUnet1d(Vision, ConditionalUnet1d):
    """:class:`ConditionalUnet1d` with cameras, see :class:`Vision`."""

    scales: ClassVar[tuple[str, ...]] = (*ConditionalUnet1d.scales, "encoder_width")


class VisionTransformer(Vision, ActionTransformer):
    """:class:`ActionTransformer` with cameras, see :class:`Vision`."""

    scales: ClassVar[tuple[str, ...]] = (*ActionTransformer.scales, "encoder_width")
