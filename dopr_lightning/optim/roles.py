"""Which part does a parameter play? Muon takes hidden matrices only; weight decay leaves vectors alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from dopr_lightning.mup.declared import declared_roles
from dopr_lightning.preconditioner.layers import public_name
from dopr_lightning.preconditioner.layers.parameters import join

Role = Literal["hidden", "condition", "input", "readout", "vector", "embedding"]


def parameter_roles(
    model: nn.Module, overrides: Mapping[str, str] | None = None, known: Mapping[str, str] | None = None
) -> dict[str, Role]:
    """The role of every trainable parameter.

    ``embedding``: the weight of an :class:`torch.nn.Embedding`. ``vector``: anything with fewer than two dimensions
    (biases, norms). ``input`` and ``readout``: matrices that touch a dimension which does not grow with the model. A
    submodule that knows its own says so in a method ``parameter_roles() -> dict[name, role]``, as the networks of this
    package do; if none does, the first (unless there is an embedding) and the last matrix in order of registration are
    taken. ``condition``: matrices that see one row per sample where others see one per position, as those of FiLM, of
    adaptive norms and of the embedding of diffusion time; only where a submodule or an override says so. ``hidden``:
    the rest.

    Args:
        model: Any module.
        overrides: Globs on whole parameter names to roles, ``{"decoder.*": "readout"}``; they win, the last one most.
        known: Roles read off the shapes of a narrow and a wide model (a MupSpec's), by parameter name; ``"fixed"`` says
            nothing, and ``"hidden"`` nothing against ``"condition"``. They win over what is guessed or declared here.

    Returns:
        Parameter name to role, in the model's order.

    Raises:
        ValueError: An override names an unknown role or matches no parameter.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    roles: dict[str, Role] = {name: "vector" if p.dim() < 2 else "hidden" for name, p in parameters.items()}
    plain = {public_name(name): name for name in roles}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding) and (name := plain.get(public_name(join(prefix, "weight")))):
            roles[name] = "embedding"

    declared = declared_roles(model)
    matrices = [name for name, role in roles.items() if role == "hidden"]
    if declared:
        roles.update((plain[name], role) for name, role in declared.items() if name in plain)  # type: ignore[misc]
    elif len(matrices) > 1:
        roles[matrices[-1]] = "readout"
        if "embedding" not in roles.values():  # else the embedding is the input
            roles[matrices[0]] = "input"

    for name, role in (known or {}).items():
        if name in roles and role != "fixed" and (role, roles[name]) != ("hidden", "condition"):
            roles[name] = role  # type: ignore[assignment]
    for pattern, role in (overrides or {}).items():
        matching = [name for name in roles if fnmatchcase(name, pattern)]
        if role not in get_args(Role):
            raise ValueError(f"unknown role {role!r} for {pattern!r}; roles are {', '.join(get_args(Role))}")
        if not matching:
            raise ValueError(f"the role pattern {pattern!r} matches no trainable parameter")
        roles.update((name, role) for name in matching)  # type: ignore[misc]
    return roles
