"""Which dimensions of which parameters grow with the width? Read off two narrow models, without memory for either."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from mup.layer import MuReadout
from mup.shape import zip_infshapes
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dopr_lightning.mup import rules
from dopr_lightning.mup.rules import MatrixGrowth

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put into parameter names."""

DELTA = 2
"""The model that tells which dimensions scale is this many times as wide as the base model."""

_OUT_IN = (nn.Linear, _ConvNd, nn.MultiheadAttention)
_IN_OUT = (_ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)


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
        drawn_by: Dimension whose inverse square root scales the initial values; None: they do not depend on the width.
        drawn_like: For a bias that torch draws like its weight: that weight's name.
    """

    base: tuple[int, ...]
    scales: tuple[bool, ...]
    role: str
    fan_out: int = 0
    fan_in: int | None = None
    drawn_by: int | None = None
    drawn_like: str | None = None


@dataclass(frozen=True)
class MupSpec:
    """muP for a family of models that differ in width only: what scales, from which base.

    muP lives in initial values and in the optimizer's groups (Table 3 of Tensor Programs V, arXiv 2203.03466, the form
    without multipliers in the forward pass). The model itself is any ordinary module, and nothing is attached to it:
    copies, EMA, ``load_state_dict(assign=True)``, ``torch.compile``, DDP, FSDP2 and checkpoints cannot break the
    parametrisation, and loading never rescales.

    Args:
        base: The factory's keywords at the base width.
        shapes: Per parameter name of the factory's models.

    Example:
        >>> factory = lambda width: nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        >>> spec = MupSpec.from_factory(factory, width=64)
        >>> model = spec.initialize(factory(width=1024))
        >>> [shape.role for shape in spec.shapes.values()]
        ['input', 'vector', 'readout', 'fixed']
    """

    base: dict[str, Any]
    shapes: dict[str, Shape] = field(repr=False)

    @classmethod
    def from_factory(
        cls, factory: Callable[..., nn.Module], *, roles: Mapping[str, str] | None = None, **base: Any
    ) -> MupSpec:
        """Read the shapes off two models, at the base width and at twice that, built on the meta device.

        The model must draw its weights with the usual scale, fan_in^-1/2, as torch's layers do by themselves; a
        coordinate check tells if it does not.

        Args:
            factory: Builds a model; called with ``base`` and with every number in it doubled.
            roles: ``"input"``, ``"readout"`` or ``"embedding"`` by name, for parameters held by modules whose kind is
                unknown here (a learned position embedding, say).
            **base: The keywords that scale, at the base width: ``width=64``, or ``channels=[16, 32],
                condition_dim=32``.

        Raises:
            ValueError: Nothing scales; or something scales in a way that muP has no rule for: a dimension that is part
                fixed, part scaling; three scaling dimensions; an embedding tied to a readout; mup's MuReadout.
        """
        if not base:
            raise ValueError(
                "name the keywords that scale with the width, as in MupSpec.from_factory(factory, width=64)"
            )
        narrow = _on_meta(factory, base)
        wide = _on_meta(factory, {key: _times(key, value, DELTA) for key, value in base.items()})
        for name, module in narrow.named_modules():
            if isinstance(module, MuReadout):
                raise ValueError(
                    f"{name} is mup's MuReadout, which divides its input by the width; use nn.Linear: here a readout's "
                    "initial values and learning rate do the same"
                )
        shapes = {}
        if unknown := [name for name in roles or {} if name not in dict(narrow.named_parameters())]:
            raise ValueError(f"roles name {_some(unknown)}, which {type(narrow).__name__} does not have")
        for name, infshape in zip_infshapes(narrow, wide).items():
            sizes = tuple(narrow.get_parameter(name).shape)
            for dim, (size, grown) in enumerate(zip(sizes, infshape, strict=True)):
                if grown.isinf() and grown.dim != DELTA * size:
                    raise ValueError(
                        f"{name}: dimension {dim} is {size} at the base width and {grown.dim} at {DELTA} times that: "
                        "only part of it scales, and muP has no learning rate for both parts; project the fixed part "
                        "to the width first, or give it a layer of its own and add the two"
                    )
            shapes[name] = _shape(narrow, name, sizes, tuple(dim.isinf() for dim in infshape), dict(roles or {}))
        if not any(any(shape.scales) for shape in shapes.values()):
            raise ValueError(f"no parameter grows with {', '.join(base)}")
        return cls(base, shapes)

    def initialize(self, model: nn.Module) -> nn.Module:
        """Rescale the initial values of a freshly built model, in place, and return it.

        Do this once, before training or loading: readouts shrink to fan_in^-1, biases stay as large as in the base
        model, all else is right as it was drawn.

        Raises:
            ValueError: The model is not of this family, or was initialised before.
        """
        if getattr(model, _DONE, False):
            raise ValueError(
                f"this {type(model).__name__} was initialised before; a second time would rescale it again"
            )
        named = self._match(model)
        with torch.no_grad():
            for name, parameter in named.values():
                parameter.mul_(self._initial(name, dict(named.values())))
        setattr(model, _DONE, True)
        return model

    def multiplier_of_initial_values(self, model: nn.Module) -> dict[str, float]:
        """What :meth:`initialize` multiplies each of the model's parameters by."""
        named = self._match(model)
        parameters = dict(named.values())
        return {full: self._initial(name, parameters) for full, (name, _) in named.items()}

    def roles(self, model: nn.Module) -> dict[str, str]:
        """The role of every parameter of ``model``, by its name there."""
        return {full: self.shapes[name].role for full, (name, _) in self._match(model).items()}

    def growth(self, model: nn.Module) -> dict[str, MatrixGrowth]:
        """How far every parameter of ``model`` has grown beyond the base, by its name there.

        Raises:
            ValueError: The model is not of this family, or is narrower than the base.
        """
        found = {}
        for full, (name, parameter) in self._match(model).items():
            shape = self.shapes[name]
            rows = parameter.shape[0] if parameter.dim() else 1
            found[full] = MatrixGrowth(
                rows,
                parameter.numel() // rows,
                self._grown(name, parameter, 0),
                math.prod(self._grown(name, parameter, dim) for dim in range(1, parameter.dim())),
                transposed=shape.fan_in == 0,
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, for a checkpoint or JSON."""
        return {"base": self.base, "shapes": {name: asdict(shape) for name, shape in self.shapes.items()}}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MupSpec:
        """The spec that :meth:`state_dict` describes."""
        shapes = {
            name: Shape(**(shape | {"base": tuple(shape["base"]), "scales": tuple(shape["scales"])}))
            for name, shape in state["shapes"].items()
        }
        return cls(dict(state["base"]), shapes)

    def _grown(self, name: str, parameter: Tensor, dim: int | None) -> float:
        shape = self.shapes[name]
        if dim is None or dim >= len(shape.scales) or not shape.scales[dim]:
            return 1.0
        return parameter.shape[dim] / shape.base[dim]

    def _initial(self, name: str, parameters: Mapping[str, Tensor]) -> float:
        shape = self.shapes[name]
        if shape.drawn_like is not None:
            like = shape.drawn_like
            return rules.initial_bias(self._grown(like, parameters[like], self.shapes[like].drawn_by))
        if shape.drawn_by is None:
            return 1.0
        parameter = parameters[name]
        return rules.initial_weight(
            self._grown(name, parameter, shape.fan_in),
            self._grown(name, parameter, shape.drawn_by),
            readout=shape.role == "readout",
        )

    def _match(self, model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
        """The model's parameter names to ours, wherever in it the family's model sits."""
        parameters = {name: (_plain(name), p) for name, p in model.named_parameters()}
        plain = {name for name, _ in parameters.values()}
        first = next(iter(self.shapes))
        prefixes = [name.removesuffix(first) for name in plain if name == first or name.endswith(f".{first}")]
        prefix = next((p for p in prefixes if all(p + name in plain for name in self.shapes)), None)
        if prefix is None:
            missing = [name for name in self.shapes if name not in plain]
            raise ValueError(
                f"this MupSpec is of another model: {type(model).__name__} has no {_some(missing or [first])}; make "
                "one from the factory that built the model"
            )
        inside = {
            full: (name.removeprefix(prefix), p) for full, (name, p) in parameters.items() if name.startswith(prefix)
        }
        outside = [full for full, (name, p) in parameters.items() if p.requires_grad and not name.startswith(prefix)]
        outside += [full for full, (name, _) in inside.items() if name not in self.shapes]
        if outside:
            raise ValueError(
                f"the MupSpec does not know {_some(outside)} of {type(model).__name__}; make it from a factory of the "
                "whole model"
            )
        for full, (name, parameter) in inside.items():
            self._check(full, tuple(parameter.shape), self.shapes[name])
        return inside

    def _check(self, name: str, sizes: tuple[int, ...], shape: Shape) -> None:
        fits = len(sizes) == len(shape.base) and all(
            scales or size == base for size, base, scales in zip(sizes, shape.base, shape.scales, strict=True)
        )
        if not fits:
            expected = ", ".join(
                "width" if scales else str(b) for b, scales in zip(shape.base, shape.scales, strict=True)
            )
            raise ValueError(
                f"this MupSpec is of another model: {name} has shape {sizes}, the spec ({expected}); make one from the "
                "factory that built the model"
            )
        for size, base in zip(sizes, shape.base, strict=True):
            if size < base:
                raise ValueError(
                    f"{name} has shape {sizes}, narrower than the base model's {shape.base}; choose a base width "
                    "that is at most the model's"
                )


_DONE = "_mup_initialized"


def _on_meta(factory: Callable[..., nn.Module], keywords: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return factory(**keywords)


def _times(key: str, value: Any, factor: int) -> Any:
    """``value``, a number or numbers, as many times as large."""
    if isinstance(value, list | tuple) and value:
        return [_times(key, v, factor) for v in value]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}={value!r} cannot scale with the width: it must be a positive whole number, or several")
    return value * factor


def _shape(
    model: nn.Module, name: str, sizes: tuple[int, ...], scales: tuple[bool, ...], roles: Mapping[str, str]
) -> Shape:
    """What the parameter's owners say of its dimensions."""
    if sum(scales) > 2:
        raise ValueError(
            f"{name}: {sum(scales)} of its dimensions {sizes} scale with the width, and muP has rules for two; split "
            "it into matrices"
        )
    seen = [
        _owned(owner, attribute, own, sizes, scales, roles.get(name)) for owner, attribute, own in _owners(model, name)
    ]
    if len({(shape.fan_out, shape.fan_in, shape.role) for shape in seen}) > 1:
        raise ValueError(
            f"{name} is shared by layers that muP scales differently ({', '.join(s.role for s in seen)}); "
            "give each its own"
        )
    return seen[0]


def _owned(
    owner: nn.Module, attribute: str, name: str, sizes: tuple[int, ...], scales: tuple[bool, ...], role: str | None
) -> Shape:
    """What one owner says."""
    if len(sizes) < 2:
        drawn = (
            attribute == "bias" and isinstance(owner, nn.Linear | _ConvNd) and isinstance(owner.weight, nn.Parameter)
        )
        like = name.removesuffix("bias") + "weight" if drawn else None
        return Shape(sizes, scales, "vector" if any(scales) else "fixed", drawn_like=like)
    fan_out, fan_in = (1, 0) if isinstance(owner, _IN_OUT) else (0, 1)
    if not any(scales):
        return Shape(sizes, scales, "fixed", fan_out, fan_in, drawn_by=1)
    if role is None and sum(scales) == 1 and not isinstance(owner, _OUT_IN + _IN_OUT):
        raise ValueError(
            f"{name}, of shape {sizes}: is it an input, a readout or an embedding? {type(owner).__name__} does not "
            f'say; tell with roles={{"{name}": "embedding"}}'
        )
    if role == "embedding" or not (scales[0] or scales[1]):
        fan_out = scales.index(True)
        fan_in = 0 if fan_out else 1
        role = "embedding"
    elif isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        role = "embedding"
    kinds = {(True, True): "hidden", (True, False): "input", (False, True): "readout"}
    kind = role or kinds[scales[fan_out], scales[fan_in]]
    if kind == "readout" and ".original" in name:
        raise ValueError(
            f"{name}: the readout's weight is parametrized (weight_norm?), which undoes the scaling of its size that "
            "muP needs; leave the readout without"
        )
    # torch draws kernels by their second dimension, those of transposed convolutions too, where it is the outputs.
    return Shape(sizes, scales, kind, fan_out, fan_in, drawn_by=None if kind == "embedding" else 1)


def _owners(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Every module that holds the parameter, the attribute it is there, and its name through that module."""
    parameter = model.get_parameter(name)
    for alias, other in model.named_parameters(remove_duplicate=False):
        if other is parameter:
            # A parametrized weight is held by a list below the module it belongs to.
            path, _, attribute = alias.replace("parametrizations.", "").rpartition(".")
            if "parametrizations." in alias:
                path, _, attribute = path.rpartition(".")
            yield model.get_submodule(path), attribute, alias


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
