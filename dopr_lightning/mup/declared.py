"""What do a model's own modules say of their parameters? Only they know what shapes cannot tell."""

from __future__ import annotations

from torch import nn

from dopr_lightning.preconditioner.layers import public_name
from dopr_lightning.preconditioner.layers.parameters import join


def declared_roles(model: nn.Module) -> dict[str, str]:
    """Roles by public parameter name, from every submodule with a method ``parameter_roles() -> dict[name, role]``.

    Public: without what ``torch.compile`` and activation checkpointing put into names, wherever they wrap.
    """
    return {
        public_name(join(prefix, name)): role
        for prefix, module in model.named_modules()
        if callable(own := getattr(module, "parameter_roles", None))
        for name, role in own().items()
    }
