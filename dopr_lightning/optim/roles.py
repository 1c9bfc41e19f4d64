"""Which part does a parameter play? Muon takes hidden matrices only; weight decay leaves vectors alone."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import chain, takewhile
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd

from dopr_lightning.mup.declared import declared_roles
from dopr_lightning.mup.shapes import Kind, weight_norms
from dopr_lightning.preconditioner.layers import layer_types, public_name

Role = Literal["hidden", "condition", "input", "readout", "vector", "embedding"]

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
"""Whose weights have the shape of what is normalised, (channels, length) perhaps."""

_LAYERS = (nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase)
"""Of matrices, beside the types that DoPr covers."""


def parameter_roles(
    model: nn.Module, overrides: Mapping[str, str] | None = None, known: Mapping[str, Kind] | None = None
) -> dict[str, Role]:
    """The role of every trainable parameter.

    ``vector``: anything with fewer than two dimensions (biases, norms), a LayerNorm's weights over several, the
    magnitudes of ``weight_norm``, which stand in a shape like (out, 1), and what no layer owns and has a shape like
    (channels, 1, 1), as ConvNeXt's layer scales do. ``embedding``: the weight of an
    :class:`torch.nn.Embedding`, an attention's ``bias_k`` and ``bias_v``, and what no layer owns and has 1 as its first
    size, as class tokens and position embeddings do. ``input`` and ``readout``: matrices that touch a dimension which
    does not grow with the model; so do the kernels of a depthwise convolution, ``input``. A submodule that knows
    its own says so in a method ``parameter_roles() -> dict[name, role]``, as the networks of this package do; if none
    does, the first matrix (unless there is an embedding before it) and the last in order of registration are taken.
    ``condition``: matrices that see one row per sample where others see one per position, as those of FiLM, of adaptive
    norms and of the embedding of diffusion time; only where a submodule or an override says so. ``hidden``: the rest.

    Args:
        model: Any module.
        overrides: Globs on whole parameter names to roles, ``{"decoder.*": "readout"}``; they win, the last one most.
            What ``torch.compile`` and activation checkpointing put into names may be left out. Vectors beside the
            matrices that a glob matches stay vectors.
        known: What the shapes of a narrow and a wide model say (a MupSpec's), by parameter name.

    Returns:
        Parameter name to role, in the model's order.

    Raises:
        TypeError: ``overrides`` is no mapping of globs.
        ValueError: An override names an unknown role or matches no parameter.
    """
    check_mapping("roles", overrides, 'globs on parameter names to roles, {"decoder.*": "readout"}')
    owners = _owners(model)
    roles = {name: _role(owners[p], p) for name, p in _trainable(model).items()}
    plain = {public_name(name): name for name in roles}
    roles.update(guessed_ends(model))
    roles.update((plain[name], role) for name, role in declared_roles(model).items() if name in plain)  # type: ignore[misc]
    roles.update({name: _merged(roles[name], kind) for name, kind in (known or {}).items() if name in roles})
    vectors = {name for name, role in roles.items() if role == "vector"}
    for pattern, role in (overrides or {}).items():
        matching = [name for name in roles if fnmatchcase(name, pattern) or fnmatchcase(public_name(name), pattern)]
        if role not in get_args(Role):
            raise ValueError(f"unknown role {role!r} for {pattern!r}; roles are {', '.join(get_args(Role))}")
        if not matching:
            raise ValueError(f"the role pattern {pattern!r} matches no trainable parameter")
        # The biases of the layers that are meant: no matrices for Muon, nor for weight decay.
        meant = [name for name in matching if name not in vectors] or matching
        roles.update((name, role) for name in meant)  # type: ignore[misc]
    return roles


def check_mapping(argument: str, value: object, kind: str) -> None:
    """Raise TypeError unless an argument that maps words to something does, or is None; ``kind`` says what it maps."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise TypeError(f"{argument} must map {kind}, got {value!r}")


def guessed_ends(model: nn.Module) -> dict[str, Role]:
    """Input and readout of a model that does not declare them: its first and last matrix, in order of registration.

    Where an embedding was registered before the first matrix, that is the input, and the matrix is hidden. Where a
    layer is tied to an embedding, that is the readout, and the last matrix hidden.
    """
    if declared_roles(model):
        return {}
    parameters, owners = _trainable(model), _owners(model)
    matrices = [name for name, p in parameters.items() if _role(owners[p], p) == "hidden"]
    # An adapter's or a table of positions, of a module that is no layer, is neither end where there are layers.
    matrices = [name for name in matrices if _is_layer(owners[parameters[name]])] or matrices
    if len(matrices) < 2:
        return {}
    before = takewhile(lambda name: name != matrices[0], parameters)
    embedded = any(isinstance(owners[parameters[name]], _TABLES) for name in before)
    tables = {p for name, p in parameters.items() if isinstance(owners[p], _TABLES)}
    others = (module for module in model.modules() if not isinstance(module, _TABLES))
    tied = any(p in tables for module in others for p in module.parameters(recurse=False))
    found: dict[str, Role] = {} if embedded else {matrices[0]: "input"}
    return found if tied else {**found, matrices[-1]: "readout"}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _owners(model: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """The module that each parameter belongs to; of what a parametrization is made of, the one that has the weight."""
    owners: dict[nn.Parameter, nn.Module] = {}
    for module in model.modules():  # a layer before its parametrizations, which are modules below it
        held = [m.parameters() for name, m in module.named_children() if name == "parametrizations"]
        for parameter in chain(module.parameters(recurse=False), *held):
            if isinstance(module, _TABLES) or parameter not in owners:  # of a tied one, the embedding
                owners[parameter] = module
    return owners


def _role(owner: nn.Module, parameter: nn.Parameter) -> Role:
    """What can be told of a parameter by the module it belongs to."""
    if parameter.dim() < 2 or isinstance(owner, _NORMS):
        return "vector"
    if any(weight.magnitude is parameter for weight in weight_norms(owner)):
        return "vector"
    if isinstance(owner, _TABLES):
        return "embedding"
    if isinstance(owner, nn.MultiheadAttention) and parameter.dim() > 2:
        return "embedding"  # bias_k and bias_v: a key and a value beside those of the sequence
    if isinstance(owner, _ConvNd) and owner.groups == owner.in_channels > 1:
        return "input"
    if _is_layer(owner):
        return "hidden"
    if parameter.dim() > 2 and parameter.shape[0] == parameter.numel():
        return "vector"
    return "hidden" if parameter.shape[0] > 1 else "embedding"


def _is_layer(module: nn.Module) -> bool:
    """Whether its parameters are those of a layer with matrices."""
    return bool(layer_types(module)) or isinstance(module, _LAYERS)


def _merged(ours: Role, shapes: Kind) -> Role:
    """The role of a parameter of which a model's modules, or our guess, say one thing and its shapes another.

    ==============  ===========  =================================================
    shapes say      ours         role
    ==============  ===========  =================================================
    ``"fixed"``     any          ours: nothing of it grows, and shapes tell nothing
    ``"hidden"``    condition    condition: rows per sample are not seen in shapes
    ``"input"``     vector       vector: magnitudes of weight_norm are shaped like a matrix
    ``"embedding"`` vector       vector: so are a norm's weights, which a MupSpec is told to take for an embedding
    anything else   any          what the shapes say
    ==============  ===========  =================================================
    """
    if shapes == "fixed" or (shapes, ours) in (("hidden", "condition"), ("input", "vector"), ("embedding", "vector")):
        return ours
    return shapes
