"""What do the dimensions of a parameter mean, and which of them grow? Read off two narrow models and their layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, get_args

from mup.layer import MuReadout
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _Orthogonal, _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from dopr_lightning.preconditioner.layers import public_name

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_OUT_IN = (nn.Linear, _ConvNd, nn.MultiheadAttention, *_RECURRENT)
_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)
_IN_OUT = (_ConvTransposeNd, *_EMBEDDING)

LEAST_PER_GROUP = 4
"""Channels of a GroupNorm's group in the base model. With two, the best rate of a 1-D U-Net was an octave lower than
with four or more, from where on it stayed (docs/results/mup)."""

_LOGIT_SCALES = ("scale", "scaling")
"""Attributes in which attention modules keep the factor of their logits (diffusers and timm, transformers)."""

DELTA = 2
"""The model that tells which dimensions scale is this many times as wide as the base model."""

Kind = Literal["hidden", "input", "readout", "embedding", "vector", "fixed"]
"""What the dimensions that grow say of a parameter."""

_Told = Literal["input", "readout", "embedding"]


@dataclass(frozen=True)
class Shape:
    """A parameter's shape in the base model, and what its dimensions mean.

    Args:
        base: Sizes in the base model.
        scales: Which of them grow with the width.
        role: ``"hidden"`` (inputs and outputs grow), ``"input"`` (outputs only), ``"readout"`` (inputs only),
            ``"embedding"``, ``"vector"`` (biases, norms), ``"fixed"`` (nothing grows).
        fan_out: Dimension of the outputs.
        fan_in: Dimension of the inputs; None for a vector.
        drawn_by: Dimensions, the inverse square root of whose sum scales the initial values; none: they do not depend
            on the width. For a bias that torch draws like its weight: of that weight.
        drawn_like: For such a bias: that weight's name. For a magnitude of weight_norm, with which the weight scales:
            the name of its direction.
    """

    base: tuple[int, ...]
    scales: tuple[bool, ...]
    role: Kind
    fan_out: int = 0
    fan_in: int | None = None
    drawn_by: tuple[int, ...] = ()
    drawn_like: str | None = None


def check_module(name: str, module: nn.Module, wide: nn.Module) -> None:
    """Refuse layers whose forward pass has a scale that is not muP's.

    Raises:
        ValueError: Names the layer and what to take in its place.
    """
    if isinstance(module, MuReadout):
        raise ValueError(
            f"{name} is mup's MuReadout, which divides its input by the width; use nn.Linear: here a readout's "
            "initial values and learning rate do the same"
        )
    if isinstance(module, nn.GroupNorm) and module.num_groups != wide.num_groups:
        raise ValueError(
            f"{name}: the number of groups of this GroupNorm grows with the width ({module.num_groups} to "
            f"{wide.num_groups}), so that each normalises over as few channels as in the base model, by whatever these "
            "happen to hold; keep the number fixed, and the groups grow"
        )
    if isinstance(module, nn.MultiheadAttention) and module.head_dim != wide.head_dim:
        raise ValueError(
            f"{name}: the heads of nn.MultiheadAttention grow with the width, and it scales their logits by "
            "head_dim^-1/2 where muP needs 1/head_dim; let the number of heads grow instead, or call "
            "scaled_dot_product_attention with a scale"
        )
    if isinstance(module, _EMBEDDING) and module.max_norm is not None and module.embedding_dim != wide.embedding_dim:
        raise ValueError(
            f"{name}: max_norm={module.max_norm} bounds the norm of this {type(module).__name__}'s rows, so that their "
            "entries fall like width^-1/2 as they lengthen, where muP needs entries to keep their size; leave max_norm "
            "out"
        )
    for attribute in _LOGIT_SCALES:
        ours, wider = (getattr(m, attribute, None) for m in (module, wide))
        if isinstance(ours, float) and isinstance(wider, float) and math.isclose(wider, ours * DELTA**-0.5):
            raise ValueError(
                f"{name}: its {attribute} falls like width^-1/2, as that of attention with growing heads; muP needs "
                "logits scaled by 1/head_dim. Let the number of heads grow instead"
            )
    _check_weight_norm(name, module, wide)


def check_group_norms(narrow: nn.Module, wide: nn.Module) -> None:
    """Warn, once for all, of GroupNorms that grow from a base of few channels per group."""
    wider = dict(wide.named_modules())
    few = {
        name: module
        for name, module in narrow.named_modules()
        if isinstance(module, nn.GroupNorm)
        and module.num_channels < LEAST_PER_GROUP * module.num_groups
        and module.num_channels != getattr(wider.get(name), "num_channels", None)
    }
    if few:
        (name, first), *others = few.items()
        more = f" (and so are {len(others)} more)" if others else ""
        warnings.warn(
            f"{name} is a GroupNorm of {first.num_channels // first.num_groups} channels per group at the base "
            f"width{more}, and divides by what so few happen to hold: learning rates tuned there are too low for wider "
            f"models. Take fewer groups, or a base of {LEAST_PER_GROUP * first.num_groups} or more channels",
            stacklevel=3,
        )


def _check_weight_norm(name: str, module: nn.Module, wide: nn.Module) -> None:
    """Refuse magnitudes that are not one per output of a growing layer.

    A row of outputs by inputs keeps its norm as both widen. A column's is like sqrt(outputs / inputs), the whole
    weight's like sqrt(outputs), and a step would have to follow, which the shape of magnitudes does not tell.

    Raises:
        ValueError: Names the layer and the ``dim`` to take.
    """
    for ours, wider in zip(weight_norms(module), weight_norms(wide), strict=True):
        outputs = (_fans(module, wide, ours.attribute) or (0, 1))[0]
        if ours.dim != outputs and ours.direction.shape[outputs] != wider.direction.shape[outputs]:
            raise ValueError(
                f"{name}: weight_norm of its {ours.attribute} has dim={None if ours.dim == -1 else ours.dim}, and so "
                "magnitudes that are not one per output. Those change with the width in a way that muP has no learning "
                f"rate for; use weight_norm with dim={outputs}"
            )


class Normalised(NamedTuple):
    """A weight that weight_norm makes of two parameters, ``dim`` being -1 for one magnitude of all."""

    attribute: str
    dim: int
    magnitude: Tensor
    direction: Tensor


def weight_norms(module: nn.Module) -> Iterator[Normalised]:
    """What torch's weight_norm keeps on a module, or the one before it."""
    if is_parametrized(module):
        for attribute, kinds in module.parametrizations.items():  # type: ignore[operator, union-attr]
            for kind in kinds:
                if isinstance(kind, _WeightNorm):
                    yield Normalised(attribute, kind.dim, kinds.original0, kinds.original1)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            magnitude, direction = (module.get_parameter(f"{hook.name}_{part}") for part in "gv")
            yield Normalised(hook.name, hook.dim, magnitude, direction)


def read_shape(
    model: nn.Module, wide: nn.Module, name: str, sizes: tuple[int, ...], scales: tuple[bool, ...], role: str | None
) -> Shape:
    """What the modules that hold a parameter say of its dimensions.

    Args:
        model: The base model.
        wide: The same, wider.
        name: The parameter's.
        sizes: In the base model.
        scales: Which of them are larger in ``wide``.
        role: Overrides what the modules say.

    Raises:
        ValueError: They do not say it, or disagree; or muP has no rule for it.
    """
    if sum(scales) > 2 or (sum(scales) == 2 and any(scales[2:])):
        raise ValueError(
            f"{name}: dimensions {', '.join(str(dim) for dim, grows in enumerate(scales) if grows)} of its shape "
            f"{sizes} scale with the width, and muP has rules for the rows and columns of a matrix, dimensions 0 and "
            "1; split it into matrices"
        )
    tells = role in get_args(_Told) if len(sizes) > 1 else role == "readout"  # of one output, as of a value
    if role is not None and (not tells or sum(scales) != 1):
        raise ValueError(
            f"roles call {name}, of shape {sizes}, {role!r}; they can tell {', '.join(get_args(_Told))} of a matrix "
            "with one dimension that scales, and readout of a vector"
        )
    told = cast(Kind | None, role)
    seen = [
        _owned(model.get_submodule(path), wide.get_submodule(path), attribute, name, sizes, scales, told)
        for path, attribute in _owners(model, name)
    ]
    if len({(shape.fan_out, shape.fan_in, shape.role) for shape in seen}) > 1:
        raise ValueError(
            f"{name} is shared by layers that muP scales differently ({', '.join(s.role for s in seen)}); "
            "give each its own"
        )
    if seen[0].fan_in is not None:
        return replace(seen[0], drawn_like=_direction(model, name))
    for path, attribute in _owners(model, name):
        if like := _drawn_like(model, path, attribute):
            recurrent = isinstance(model.get_submodule(path), _RECURRENT)
            return replace(seen[0], drawn_like=like, drawn_by=(0,) if recurrent else (1,))
    return seen[0]


def _owned(
    owner: nn.Module,
    wider: nn.Module,
    attribute: str,
    name: str,
    sizes: tuple[int, ...],
    scales: tuple[bool, ...],
    role: Kind | None,
) -> Shape:
    """What one owner says."""
    if len(sizes) < 2 and role is not None:
        return Shape(sizes, scales, role, 1, 0, (0,))
    if len(sizes) < 2:
        return Shape(sizes, scales, "vector" if any(scales) else "fixed")
    if not any(scales):
        return Shape(sizes, scales, "fixed", 0, 1)
    fans = _fans(owner, wider, attribute)
    drawn: tuple[int, ...] = () if isinstance(owner, _EMBEDDING) else (1,)
    if isinstance(owner, nn.MultiheadAttention):
        drawn = (0, 1) if attribute.endswith("weight") else (2,)  # what Xavier's rule adds up
        role = role or (None if attribute.endswith("weight") else "embedding")
    if isinstance(owner, _RECURRENT) and not attribute.startswith("weight_hr"):
        drawn = (0,)  # all by the hidden state's size, of which the rows are a multiple
    if sum(scales) == 1 and role is None and (fans is None or not (scales[0] or scales[1])):
        raise ValueError(
            f"{name}, of shape {sizes}: is it an input, a readout or an embedding? {type(owner).__name__} does not "
            f'say; tell with roles={{"{name}": "embedding"}}'
        )
    if role is None:
        fan_out, fan_in = fans or (0, 1)
        kinds: dict[tuple[bool, bool], Kind] = {
            (True, True): "hidden",
            (True, False): "input",
            (False, True): "readout",
        }
        role = "embedding" if isinstance(owner, _EMBEDDING) else kinds[scales[fan_out], scales[fan_in]]
    else:
        grows = scales.index(True)
        other = 0 if grows else 1
        fan_out, fan_in = (other, grows) if role == "readout" else (grows, other)
        if fans is None:
            drawn = () if role == "embedding" else (fan_in,)
    if role != "hidden" and _normalised(owner, attribute, role):
        raise ValueError(
            f"{name}: a parametrization (weight_norm, spectral_norm?) sets the size of this {role}'s weight, which muP "
            f"needs to follow the width; leave the {role} without"
        )
    return Shape(sizes, scales, role, fan_out, fan_in, drawn)


def _normalised(owner: nn.Module, attribute: str, role: str) -> bool:
    """Whether something keeps the size of ``owner``'s weight, whatever is done to the parameter that it is made of."""
    if not is_parametrized(owner, attribute):
        return attribute == "weight_orig" or (attribute == "weight_v" and role == "readout")
    # weight_norm keeps the size of each row, which is right unless rows are what grows.
    kinds = (_SpectralNorm, _Orthogonal) if role != "readout" else nn.Module
    return any(isinstance(kind, kinds) for kind in owner.parametrizations[attribute])  # type: ignore[index]


def _fans(owner: nn.Module, wider: nn.Module, attribute: str) -> tuple[int, int] | None:
    """Which dimension of ``owner``'s matrices is that of its outputs, and which of its inputs; None: not known."""
    if isinstance(owner, _IN_OUT) and attribute == "weight":
        # As many groups as channels: a kernel for each, as in an ordinary convolution.
        depthwise = isinstance(owner, _ConvTransposeNd) and owner.groups != wider.groups
        return (0, 1) if depthwise else (1, 0)
    return (0, 1) if isinstance(owner, _OUT_IN) and not isinstance(owner, _IN_OUT) else None


def _owners(model: nn.Module, name: str) -> Iterator[tuple[str, str]]:
    """Every module that holds the parameter, and the attribute it is there."""
    parameter = model.get_parameter(name)
    for alias, other in model.named_parameters(remove_duplicate=False):
        if other is parameter:
            path, _, attribute = alias.rpartition(".")
            layer, parametrized, weight = path.rpartition("parametrizations.")
            # A parametrized weight is held by a list below the layer it belongs to; what a parametrization has besides
            # is its own.
            yield (
                (layer.rstrip("."), weight) if parametrized and attribute.startswith("original") else (path, attribute)
            )


def _drawn_like(model: nn.Module, path: str, attribute: str) -> str | None:
    """The weight by whose inputs torch scaled the initial bias of the layer at ``path``, parametrized or not."""
    layer = model.get_submodule(path)
    if isinstance(layer, _RECURRENT) and attribute.startswith("bias"):
        weights = {id(getattr(layer, attribute.replace("bias", "weight")))}
    elif isinstance(layer, nn.Linear | _ConvNd) and attribute == "bias":
        held = [*layer.parameters(recurse=False), *getattr(layer, "parametrizations", nn.Module()).parameters()]
        weights = {id(p) for p in held if p.shape == layer.weight.shape}
    else:
        return None
    return next((public_name(name) for name, p in model.named_parameters() if id(p) in weights), None)


def _direction(model: nn.Module, name: str) -> str | None:
    """The direction whose magnitude, in weight_norm, is the parameter ``name``; None if it is none."""
    parameter = model.get_parameter(name)
    found = {
        id(weight.direction)
        for path, _ in _owners(model, name)
        for weight in weight_norms(model.get_submodule(path))
        if weight.magnitude is parameter
    }
    return next((public_name(other) for other, p in model.named_parameters() if id(p) in found), None)
