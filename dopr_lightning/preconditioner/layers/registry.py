"""Which layers does a module have, and why are its other parameters not covered?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from dopr_lightning.preconditioner.layers.attention import AttentionOutput, Key, Query, Value
from dopr_lightning.preconditioner.layers.base import ConvCovariance, DenseLayer, DiagonalLayer, Layer
from dopr_lightning.preconditioner.layers.blocks import BlockDiagonal
from dopr_lightning.preconditioner.layers.convolution import Convolution, TransposedConvolution
from dopr_lightning.preconditioner.layers.embedding import Embedding
from dopr_lightning.preconditioner.layers.linear import Linear
from dopr_lightning.preconditioner.layers.parameters import NotCoveredError, join

_LAYER_TYPES: dict[type[nn.Module], tuple[type[Layer], ...]] = {
    nn.Linear: (Linear,),
    nn.Conv1d: (Convolution,),
    nn.Conv2d: (Convolution,),
    nn.Conv3d: (Convolution,),
    nn.ConvTranspose1d: (TransposedConvolution,),
    nn.ConvTranspose2d: (TransposedConvolution,),
    nn.ConvTranspose3d: (TransposedConvolution,),
    nn.Embedding: (Embedding,),
    nn.MultiheadAttention: (Query, Key, Value, AttentionOutput),
}

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_forward_module"}
"""Modules that ``torch.compile``, activation checkpointing and Lightning Fabric put around others."""

BIAS = "the base optimizer takes it: bias=False, or it is no column of its layer's matrix"
OTHER = "the base optimizer takes it: it multiplies none of the layer's rows"

LayerType = TypeVar("LayerType", bound=type[Layer])


def register_layer(module_type: type[nn.Module]) -> Callable[[LayerType], LayerType]:
    """Cover a module type, and the types derived from it, by the decorated layer class.

    A module with several weights has one class each, told apart by their ``part``.

    Args:
        module_type: The module type. For another treatment of a type that is covered already, derive from it.

    Raises:
        TypeError: ``module_type`` is not a type of modules, or the class is not a complete :class:`MatrixLayer` or
            :class:`DiagonalLayer`.
        ValueError: This part of the type's modules is covered already, or every module would be.

    Example:
        GPT-2's linear layer keeps its weight transposed:

        >>> @register_layer(transformers.pytorch_utils.Conv1D)
        ... class TransposedLinear(MatrixLayer):
        ...     kind = "linear_transposed"
        ...
        ...     def __init__(self, name, module, *, conv, bias):
        ...         super().__init__(name, module, shape=(module.nx, module.nf), bias="bias" if bias else None)
        ...         self.dim = module.nx + self.homogeneous
        ...
        ...     def vectors(self, x):
        ...         return x.reshape(1, -1, x.shape[-1])
        ...
        ...     def to_matrix(self, gradient):
        ...         return gradient.T[None]
        ...
        ...     def to_weight(self, matrix, shape):
        ...         return matrix[0].T
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register_layer takes a type of modules, got {module_type!r}")
    if module_type is nn.Module:
        raise ValueError("register_layer(nn.Module) would cover every module there is; name a type of layers")

    def register(layer_type: LayerType) -> LayerType:
        if not (isinstance(layer_type, type) and issubclass(layer_type, (DenseLayer, DiagonalLayer))):
            raise TypeError(f"{layer_type!r} must be a class derived from MatrixLayer or DiagonalLayer")
        missing = sorted(layer_type.__abstractmethods__)
        if missing or not isinstance(getattr(layer_type, "kind", None), str):
            raise TypeError(f"{layer_type.__name__} lacks {', '.join(missing) or 'kind, a word for its type'}")
        present = _LAYER_TYPES.get(module_type, ())
        for other in present:
            if other.part == layer_type.part:
                raise ValueError(
                    f"{module_type.__name__} is covered by {other.__name__} already; derive a type from it to treat "
                    "it in another way, or give the class another part if it is for another weight"
                )
        _LAYER_TYPES[module_type] = (*present, layer_type)
        return layer_type

    return register


def layer_types(module: nn.Module) -> tuple[type[Layer], ...]:
    """The layer classes of a module's type or its nearest registered ancestor; none if its type is not covered."""
    return next((_LAYER_TYPES[cls] for cls in type(module).__mro__ if cls in _LAYER_TYPES), ())


def layers_of(
    name: str, module: nn.Module, *, conv: ConvCovariance, bias: bool, max_dim: int | None = None
) -> list[Layer]:
    """The layers of one module, frozen ones included; none where nothing in it can be covered.

    Args:
        name: The module's public name.
        module: The module, from :func:`named_modules`.
        conv: The covariance of convolutions, see :class:`Convolution`; other layers ignore it.
        bias: Treat the bias as the weight of a homogeneous coordinate. Ignored where the layer has no such bias.
        max_dim: Split larger covariances, see :class:`BlockDiagonal`; None: never.
    """
    layers = _attempt(name, module, conv=conv, bias=bias)[0]
    return [
        BlockDiagonal(layer, max_dim)
        if max_dim is not None and isinstance(layer, DenseLayer) and layer.dim > max_dim
        else layer
        for layer in layers
    ]


def not_covered(name: str, module: nn.Module, layers: Sequence[Layer], left_out: str | None = None) -> dict[str, str]:
    """Why parameters of a module are not covered by ``layers``, by their public names.

    Args:
        name: The module's public name.
        module: The module, from :func:`named_modules`.
        layers: Its layers that are in use.
        left_out: Why there are none, if the module's were left out: biases are left out with their weights.
    """
    covered = {parameter for layer in layers for parameter in layer.parameter_names}
    refused = _attempt(name, module, conv="channel", bias=False)[1]
    reasons = {}
    for owner_name, owner in [("", module), *_belongings(module)]:
        for parameter, _ in owner.named_parameters(recurse=False):
            local_name = join(owner_name, parameter)
            public = join(name, local_name)
            if public in covered:
                continue
            if not layer_types(module):
                kind, inner = type(module).__name__, any(True for _ in module.children())
                reasons[public] = (
                    f"it is a parameter of {kind} itself, not of a layer in it"
                    if inner
                    else f"{kind} is not a layer type with an activation covariance"
                )
            elif local_name in refused:
                reasons[public] = refused[local_name]
            else:
                reasons[public] = (left_out or BIAS) if parameter.endswith("bias") else OTHER
    return reasons


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by their public names, without those whose parameters belong to a module around them.

    Such are the ``out_proj`` of a :class:`torch.nn.MultiheadAttention`, which looks like a Linear layer but is never
    called, and the lists in which a parametrized module keeps its original tensors.
    """
    belongings = {id(child) for module in model.modules() for _, child in _belongings(module)}
    for name, module in model.named_modules():
        if id(module) not in belongings:
            yield public_name(name), module


def public_name(name: str) -> str:
    """A module's or parameter's name without what ``torch.compile``, checkpointing and Fabric put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _attempt(name: str, module: nn.Module, *, conv: ConvCovariance, bias: bool) -> tuple[list[Layer], dict[str, str]]:
    """A module's layers, and the reasons of those that could not be made, by the parameter as seen from the module."""
    layers, refused = [], {}
    for layer_type in layer_types(module):
        try:
            layers.append(layer_type(name, module, conv=conv, bias=bias))  # type: ignore[call-arg, arg-type]
        except NotCoveredError as error:
            refused.update(dict.fromkeys(error.names, error.reason))
    return layers, refused


def _belongings(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules whose own parameters are the module's affair, by their names as seen from it."""
    for child_name in dict.fromkeys(child for layer_type in layer_types(module) for child in layer_type.submodules):
        child = module.get_submodule(child_name)
        yield child_name, child
        yield from ((f"{child_name}.{name}", grandchild) for name, grandchild in _belongings(child))
    if parametrize.is_parametrized(module):
        parametrizations = module.parametrizations
        yield "parametrizations", parametrizations  # type: ignore[misc]
        for name, originals in parametrizations.items():  # type: ignore[operator, union-attr]
            yield f"parametrizations.{name}", originals
