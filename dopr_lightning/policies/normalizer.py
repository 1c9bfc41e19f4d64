"""How do data units become network units and back? One affine map per dimension, kept in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dopr_lightning.errors import UserError

Mode = Literal["minmax", "standard"]

CONSTANT = 1e-4
"""Below this spread (range or standard deviation, in data units) a dimension counts as constant.

Diffusion Policy's threshold. Such a dimension is shifted but not stretched: it maps to 0 on the training
data, and a small deviation in a rollout stays small instead of being divided by almost nothing.
"""


class Normalizer(nn.Module):
    """Maps data to network units, ``(x - offset) / scale`` per dimension, and back.

    Both are float32 buffers, so they travel in the checkpoint and to the device, and weight averaging leaves
    them as they are. They are NaN until :meth:`fit` or a checkpoint fills them. A checkpoint decides the map:
    ``mode`` matters to :meth:`fit` only.

    Args:
        dim: Size of the last axis of the data.
        mode: ``"minmax"`` maps the range of the data to [-1, 1] (Diffusion Policy, much-ado-about-noising:
            bounded actions, robot states); ``"standard"`` maps to zero mean and unit standard deviation
            (unbounded, heavy tailed observations such as Humanoid's contact forces).

    Raises:
        UserError: Unknown ``mode`` or ``dim`` below 1.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, dim: int, mode: Mode = "minmax") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise UserError(f"Normalizer: mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        if dim < 1:
            raise UserError(f"Normalizer: dim must be at least 1, got {dim}")
        self.dim = dim
        self.mode = mode
        self.register_buffer("offset", torch.full((dim,), torch.nan))
        self.register_buffer("scale", torch.full((dim,), torch.nan))
        # In Python, not in a buffer: asking a CUDA tensor at every forward would wait for the device.
        self._fitted = False

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` or a checkpoint has filled the map."""
        return self._fitted

    def fit(self, statistics: Mapping[str, Tensor], what: str = "data") -> None:
        """Fill the map from per-dimension statistics of the training data.

        Warns of a dimension that counts as constant and is not.

        Args:
            statistics: Tensors of shape (dim,): ``min`` and ``max`` for ``"minmax"``, ``mean`` and ``std``
                for ``"standard"``. Other keys are left alone.
            what: The data, for the warning: ``"action"``.

        Raises:
            UserError: A statistic is missing, of another size, or not finite.
        """
        low, high = ("min", "max") if self.mode == "minmax" else ("mean", "std")
        first, second = (self._statistic(statistics, name).double() for name in (low, high))
        if self.mode == "minmax":
            offset, scale, spread = (first + second) / 2, (second - first) / 2, second - first
        else:
            offset, scale, spread = first, second, second
        self.offset.copy_(offset)
        self.scale.copy_(torch.where(spread < CONSTANT, torch.ones_like(scale), scale))
        self._fitted = True
        # What float32 cannot tell from the offset is rounding.
        small = ((spread < CONSTANT) & (spread > offset.abs() * torch.finfo(torch.float32).eps)).nonzero().flatten()
        if small.numel():
            which = ", ".join(f"{index} (by {spread[index].item():.2g})" for index in small[:3].tolist())
            more = f" and {small.numel() - 3} more" if small.numel() > 3 else ""
            rank_zero_warn(
                f"Normalizer: {what} dimension {which}{more} varies by less than {CONSTANT:g} and counts as constant: "
                "it is not stretched, so to the network it is as good as 0; if it means something, rescale the data, "
                "metres to millimetres say"
            )

    def _statistic(self, statistics: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in statistics:
            raise UserError(f"Normalizer: mode {self.mode!r} needs the statistic {name!r}, got {sorted(statistics)}")
        value = statistics[name]
        if value.shape != (self.dim,):
            raise UserError(
                f"Normalizer: built for {self.dim} dimensions, but the data's {name!r} has shape "
                f"{tuple(value.shape)}; set the policy's dimensions to the data's"
            )
        if not value.isfinite().all():
            bad = int((~value.isfinite()).nonzero()[0])
            raise UserError(
                f"Normalizer: the data's {name!r} is {value[bad].item()} in dimension {bad}; clean the data"
            )
        return value

    def forward(self, x: Tensor) -> Tensor:
        """Map data to network units.

        Args:
            x: (..., dim).

        Raises:
            UserError: The map is not filled, or the last axis has another size.
        """
        self._check(x)
        return (x - self.offset) / self.scale

    def inverse(self, y: Tensor) -> Tensor:
        """Map network units back to data units; the inverse of :meth:`forward`, same shapes and errors."""
        self._check(y)
        return y * self.scale + self.offset

    def _check(self, x: Tensor) -> None:
        if not self._fitted:
            raise UserError("Normalizer: no statistics yet; call fit(statistics) or load a checkpoint first")
        if x.shape[-1] != self.dim:
            raise UserError(f"Normalizer: built for {self.dim} dimensions, got data with {x.shape[-1]}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = not bool(self.offset.isnan().any() or self.scale.isnan().any())

    def extra_repr(self) -> str:
        """Say dimension and mode in ``print(model)``."""
        return f"{self.dim}, mode={self.mode!r}"
