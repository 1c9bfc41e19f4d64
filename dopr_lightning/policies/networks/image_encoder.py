"""From a camera's frames to a vector: crop, scale, ResNet18 with group norms, average."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from dopr_lightning.errors import UserError
from dopr_lightning.policies.networks.base import check_positive

COLOURS = 3

GROUPS = (4, 8, 16, 32)
"""Groups per GroupNorm, by stage: 16 channels each at the default width, as in Diffusion Policy.

Their number, not their size, stays when the width changes: so muP wants it.
"""

STRIDES = (1, 2, 2, 2)


class ResNet18(nn.Module):
    """torchvision's ResNet18 (He et al. 2016) of any width, with GroupNorm for BatchNorm and without its classifier.

    BatchNorm would let the samples of a batch see each other and let EMA weights run on other weights' statistics.
    The Kaiming initialisation is over the fan-in, where torchvision's is over the fan-out: with that the first layer's
    weights would shrink with the width.

    Args:
        width: Channels of the first stage; a multiple of 4. The last has 8 times as many. The default is torchvision's.

    Attributes:
        features: Size of the output.

    Raises:
        UserError: ``width`` is no positive multiple of 4.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        check_positive(self, width=width)
        if width % GROUPS[0]:
            raise UserError(f"ResNet18: width {width} is not a multiple of {GROUPS[0]}, the groups of its norms")
        self.conv1 = nn.Conv2d(COLOURS, width, 7, stride=2, padding=3, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS[0], width)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        stages, channels = [], width
        for index, (groups, stride) in enumerate(zip(GROUPS, STRIDES, strict=True)):
            stages.append(_stage(channels, width * 2**index, stride, groups))
            channels = width * 2**index
        self.stages = nn.Sequential(*stages)
        self.features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) in [-1, 1] to (N, features)."""
        x = self.pool(self.relu(self.norm1(self.conv1(x))))
        return self.stages(x).mean((2, 3))


def _stage(inputs: int, outputs: int, stride: int, groups: int) -> nn.Sequential:
    """Two of torchvision's blocks; its names ``bn1`` and ``bn2`` now stand for group norms."""
    norm = partial(nn.GroupNorm, groups)
    shortcut = None if stride == 1 else nn.Sequential(conv1x1(inputs, outputs, stride), norm(outputs))
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm), BasicBlock(outputs, outputs, norm_layer=norm)
    )


class ImageEncoder(nn.Module):
    """A camera's frames, cropped to a square, each through the same ResNet18 and averaged over the plane.

    Args:
        width: See :class:`ResNet18`.
        crop: Side of the crop, in pixels. 76 of 84 in robomimic's tasks, 84 of 96 in PushT.

    Attributes:
        features: Features per frame.

    Raises:
        UserError: A size is below 1, or ``width`` is no multiple of 4.
    """

    def __init__(self, width: int = 64, crop: int = 76) -> None:
        super().__init__()
        check_positive(self, crop=crop)
        self.crop = crop
        self.resnet = ResNet18(width)
        self.features = self.resnet.features

    def forward(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Map frames to features, (B, To, features).

        Args:
            images: (B, To, 3, H, W), uint8 in [0, 255] or floating point in [0, 1].
            generator: On the CPU: source of random crops; None for the central ones.

        Raises:
            UserError: Not such images, or smaller than the crop.
        """
        if images.ndim != 5 or images.shape[2] != COLOURS or min(images.shape[3:]) < self.crop:
            raise UserError(
                f"images of shape (batch, frames, {COLOURS}, H, W), H and W at least crop={self.crop}, are needed, got "
                f"{tuple(images.shape)}; put the colours before height and width, or set crop"
            )
        frames = images.flatten(0, 1)
        frames = center_crop(frames, self.crop) if generator is None else random_crop(frames, self.crop, generator)
        return self.resnet(scaled(frames, self.resnet.conv1.weight.dtype)).unflatten(0, images.shape[:2])


def scaled(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Map uint8 in [0, 255], or floating point in [0, 1], to [-1, 1] in ``dtype``.

    Raises:
        UserError: Integers of another kind.
    """
    if images.dtype == torch.uint8:
        return images.to(dtype) / 127.5 - 1
    if not images.is_floating_point():
        raise UserError(f"images must be uint8, or floating point in [0, 1], got {images.dtype}")
    return 2 * images.to(dtype) - 1


def center_crop(images: Tensor, size: int) -> Tensor:
    """Cut the square of side ``size`` out of the middle, (..., H, W) to (..., size, size)."""
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cut a square out of each image, all places equally likely.

    Every image has a place of its own, the frames of one sample and the cameras too, as in robomimic and Diffusion
    Policy.

    Args:
        images: (N, C, H, W).
        size: Side of the squares.
        generator: On the CPU, so that a seed means the same places on every machine.

    Returns:
        (N, C, size, size).
    """
    n, _, height, width = images.shape
    top, left = (
        torch.randint(side - size + 1, (n,), generator=generator).to(images.device) for side in (height, width)
    )
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view, (N, C, tops, lefts, size, size)
    return windows[torch.arange(n, device=images.device), :, top, left]
