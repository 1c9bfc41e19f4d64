"""Which dimensions of which parameters grow with the width? Read off two narrow models, without memory for either."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any

import torch
from mup.shape import zip_infshapes
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dopr_lightning.mup import rules
from dopr_lightning.mup.declared import declared_roles
from dopr_lightning.mup.draws import as_drawn, drawn_growth, noted_draws
from dopr_lightning.mup.rules import MatrixGrowth
from dopr_lightning.mup.shapes import DELTA, Kind, Shape, check_group_norms, check_module, read_shape
from dopr_lightning.preconditioner.layers import public_name
from dopr_lightning.preconditioner.sharding import local


@dataclass(frozen=True)
class MupSpec:
    """muP for a family of models that differ in width only: what scales, from which base.

    muP lives in initial values and in the optimizer's groups (Table 3 of Tensor Programs V, arXiv 2203.03466, the form
    without multipliers in the forward pass). The model itself is any ordinary module, and nothing that training needs
    is attached to it: copies, EMA, ``load_state_dict(assign=True)``, ``torch.compile``, DDP, FSDP2 and checkpoints
    cannot break the parametrisation, and loading never rescales.

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

        How the spread of initial values follows the width is seen as the factory draws them: by any of
        ``torch.nn.init``, or with a spread of one's own that stays (``std=0.02``) or falls like an inverse square root.
        What is drawn later, or computed, is taken for torch's own draw; a coordinate check tells if that is wrong.

        Args:
            factory: Builds a model; called with ``base`` and with every number in it doubled.
            roles: ``"input"``, ``"readout"`` or ``"embedding"`` by name, for parameters of which one dimension scales,
                held by modules whose kind is unknown here (a learned position embedding, say); of a vector,
                ``"readout"`` (a value's weights).
            **base: The keywords that scale, at the base width: ``width=64``, or ``channels=[16, 32],
                condition_dim=32``.

        Raises:
            TypeError: The factory is a module, or returns none.
            ValueError: A keyword is no positive whole number, nor several. The factory asks for values or leaves shapes
                open; nothing scales; or something scales in a way that muP has no rule for: initial values that follow
                no inverse square root; a dimension that is part fixed, part scaling; three scaling dimensions, or two
                beside a fixed one; an embedding tied to a readout; a readout whose weight is normalised, or weight_norm
                that is not by outputs; an embedding's max_norm; torch's attention with growing heads; mup's MuReadout.
        """
        if not base:
            raise ValueError(
                "name the keywords that scale with the width, as in MupSpec.from_factory(factory, width=64)"
            )
        if isinstance(factory, nn.Module):
            raise TypeError(
                f"a MupSpec's factory builds models, of several widths, and this {type(factory).__name__} is one; pass "
                "its class, or functools.partial of it"
            )
        base = {key: _times(key, value, 1) for key, value in base.items()}
        with noted_draws() as draws:
            narrow = _on_meta(factory, base)
            wide = _on_meta(factory, {key: _times(key, value, DELTA) for key, value in base.items()})
        _check_alike(narrow, wide)
        wider = dict(wide.named_modules())
        for name, module in narrow.named_modules():
            check_module(name, module, wider.get(name, module))
        check_group_norms(narrow, wide)
        by_plain_name = {public_name(name): name for name, _ in narrow.named_parameters()}
        shapes = {}
        for name, infshape in zip_infshapes(narrow, wide).items():
            sizes = tuple(narrow.get_parameter(name).shape)
            for dim, (size, grown) in enumerate(zip(sizes, infshape, strict=True)):
                if grown.isinf() and grown.dim != DELTA * size:
                    raise ValueError(
                        f"{name}: dimension {dim} is {size} at the base width and {grown.dim} at {DELTA} times that. A "
                        "part of it is fixed, and muP has no learning rate for both parts: project the fixed part to "
                        "the width first, or give it a layer of its own and add the two. Or it is rounded: choose a "
                        "base width that divides"
                    )
            scales = tuple(dim.isinf() for dim in infshape)
            plain = public_name(name)  # the factory may compile or checkpoint parts
            shape = read_shape(narrow, wide, name, sizes, scales, (roles or {}).get(plain))
            base_spread, spread = (draws.spread(model.get_parameter(name)) for model in (narrow, wide))
            if base_spread and spread:
                like = by_plain_name[shape.drawn_like or plain]
                ours, theirs = (tuple(model.get_parameter(like).shape) for model in (narrow, wide))
                shape = as_drawn(name, shape, ours, theirs, spread / base_spread)
            shapes[plain] = shape
        if unknown := [name for name in roles or {} if name not in shapes]:
            raise ValueError(f"roles name {_some(unknown)}, which {type(narrow).__name__} does not have")
        if not any(any(shape.scales) for shape in shapes.values()):
            raise ValueError(f"no parameter grows with {', '.join(base)}")
        return cls({key: _listed(value) for key, value in base.items()}, shapes)

    def initialize(self, model: nn.Module, *, zero_readouts: bool = False) -> nn.Module:
        """Rescale the initial values of a freshly built model, in place, and return it.

        Do this once, before training or loading, and before the model is copied (an EMA, a target network): readouts
        shrink to fan_in^-1, biases that torch drew stay as large as in the base model, all else is right as it is. So
        are biases that were set: a constant, or entries that torch's draw cannot give (a forget gate's 1, a detector's
        prior).

        Args:
            model: A new model of the family.
            zero_readouts: Set the weights of :meth:`last_readouts` to 0 instead. A random readout's share in outputs
                and gradients falls with the width, so narrow models start unlike wide ones (Tensor Programs V,
                Appendix D.2).

        Raises:
            ValueError: The model is not of this family, has no values yet, or was initialised before.
        """
        if _is_marked(model):
            raise ValueError(
                f"this {type(model).__name__} was initialised before, and a second time would rescale it again; start "
                "from a new one"
            )
        named = self._match(model)
        parameters = dict(named.values())
        if without := [full for full, (_, parameter) in named.items() if parameter.is_meta]:
            raise ValueError(f"{_some(without)}: on the meta device there is nothing to rescale yet; draw values first")
        with torch.no_grad():
            zero = self.last_readouts(model) if zero_readouts else set()
            for full, (name, parameter) in named.items():
                factor = 0.0 if full in zero else self._initial(name, parameters)
                like = self.shapes[name].drawn_like
                if like is None or self.shapes[name].fan_in is not None:
                    parameter.mul_(factor)
                else:
                    parameter.mul_(torch.where(self._drawn_bias(name, parameter, parameters[like]), factor, 1.0))
        for module in model.modules():  # of which any may be handed over, alone or in a wrapper
            setattr(module, _DONE, True)
        return model

    def as_torch_draws(self, model: nn.Module) -> list[str]:
        """Readouts wider than the base's that are as torch's layers draw them, and so as nobody initialised them.

        Values tell more than the mark that :meth:`initialize` leaves, which a model that was loaded need not have.
        Weights that were initialised, trained or drawn in another way lie elsewhere; of a few entries nothing is said.
        """
        if _is_marked(model):
            return []
        return [
            full
            for full, (name, parameter) in self._match(model).items()
            if self.shapes[name].role == "readout"
            and (fan_in := self.shapes[name].fan_in) is not None
            and parameter.dim() > 1
            and self._grown(name, parameter, fan_in) > 1
            and _is_torchs_draw(parameter)
        ]

    def last_readouts(self, model: nn.Module) -> set[str]:
        """The readouts that end the model, by their names there: those that its modules declare, or the last one.

        Not every matrix from the width to a fixed size is one. The others are bottlenecks, low-rank adapters say, and
        a layer between two zeros never learns. Nor does one before a zero that is frozen, so that those are left out.
        """
        readouts = [full for full, role in self.roles(model).items() if role == "readout"]
        declared = {name for name, role in declared_roles(model).items() if role == "readout"}
        ends = {full for full in readouts if public_name(full) in declared} or set(readouts[-1:])
        return {full for full in ends if model.get_parameter(full).requires_grad}

    def multiplier_of_initial_values(self, model: nn.Module) -> dict[str, float]:
        """What :meth:`initialize` multiplies each of the model's parameters by."""
        named = self._match(model)
        parameters = dict(named.values())
        return {full: self._initial(name, parameters) for full, (name, _) in named.items()}

    def roles(self, model: nn.Module) -> dict[str, Kind]:
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
            rows = max(parameter.shape[0], 1) if parameter.dim() else 1  # 0: of an empty one, that marks a device
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
        return {
            "base": self.base,
            "shapes": {
                name: {key: _listed(value) for key, value in asdict(shape).items()}
                for name, shape in self.shapes.items()
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MupSpec:
        """The spec that :meth:`state_dict` describes."""
        shapes = {
            name: Shape(**(shape | {key: tuple(shape[key]) for key in ("base", "scales", "drawn_by")}))
            for name, shape in state["shapes"].items()
        }
        return cls(dict(state["base"]), shapes)

    def _grown(self, name: str, parameter: Tensor, dim: int) -> float:
        shape = self.shapes[name]
        return parameter.shape[dim] / shape.base[dim] if dim < len(shape.scales) and shape.scales[dim] else 1.0

    def _drawn_bias(self, name: str, bias: Tensor, weight: Tensor) -> Tensor:
        """Which entries of a bias may be from torch's draw, within the inverse square root of some size."""
        # Of recurrent layers it is the hidden state's, of which the rows are up to four times as many.
        size = weight.shape[0] / 4 if self.shapes[name].drawn_by == (0,) else weight[0].numel()
        constant = bias.numel() > 1 and bool((bias == bias.flatten()[0]).all())
        return (bias.abs() <= 1.01 * size**-0.5) & (not constant)  # a hundredth for rounding, to bfloat16 say

    def _initial(self, name: str, parameters: Mapping[str, Tensor]) -> float:
        shape = self.shapes[name]
        like = shape.drawn_like or name
        drawn = drawn_growth(self.shapes[like].base, parameters[like].shape, shape.drawn_by)
        if shape.fan_in is None:
            return rules.initial_bias(drawn)
        weight = self.shapes[like]  # of a magnitude the weight, which it is the size of
        assert weight.fan_in is not None
        fan_in = 1.0 if weight.role == "embedding" else self._grown(like, parameters[like], weight.fan_in)
        return rules.initial_weight(fan_in, drawn, readout=weight.role == "readout")

    def _match(self, model: nn.Module) -> dict[str, tuple[str, nn.Parameter]]:
        """The model's parameter names to ours, wherever in it the family's model sits."""
        parameters = {name: (public_name(name), p) for name, p in model.named_parameters()}
        plain = dict(parameters.values())
        first = next(iter(self.shapes))
        prefixes = [name.removesuffix(first) for name in plain if name == first or name.endswith(f".{first}")]
        missing = {p: [p + name for name in self.shapes if p + name not in plain] for p in prefixes or [""]}
        if all(missing.values()):
            raise ValueError(
                f"this MupSpec is of another model: {type(model).__name__} has no "
                f"{_some(min(missing.values(), key=len))}; make one from the factory that built the model"
            )
        whole = [p for p in missing if not missing[p]]
        # Frozen copies, a target network say, may be there too.
        trained = [p for p in whole if any(plain[p + name].requires_grad for name in self.shapes)]
        prefix = (trained or whole)[0]
        inside, outside = {}, []
        for full, (name, parameter) in parameters.items():
            if name.startswith(prefix) and (ours := name.removeprefix(prefix)) in self.shapes:
                inside[full] = (ours, parameter)
            elif parameter.requires_grad:
                outside.append(full)
        if outside:
            raise ValueError(
                f"the MupSpec does not know {_some(outside)} of {type(model).__name__}; make it from a factory of the "
                "whole model, whose other arguments (its depth, say) are this one's"
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

_FEW, _MANY = 128, 2**20
"""Entries of a readout: fewer do not tell how they were drawn, and more need not be looked at."""


def _is_marked(model: nn.Module) -> bool:
    return any(getattr(module, _DONE, False) for module in model.modules())


def _is_torchs_draw(weight: Tensor) -> bool:
    """Whether the entries have the bound and the size of a uniform draw within fan_in^-1/2, torch's default.

    Of n of them the largest falls short of the bound by a share of 1/n, and the mean square differs from a third of the
    bound's by one of 0.9 n^-1/2, on average: ten and five times that are allowed, and a hundredth for bfloat16.
    """
    bound = math.prod(weight.shape[1:]) ** -0.5
    values = local(weight).detach()  # of FSDP2's shards ours, without a collective
    values = values.flatten()[:_MANY].float() / bound
    count = values.numel()
    if values.is_meta or count < _FEW:
        return False
    largest, square = float(values.abs().max()), float(values.square().mean())
    return 0.99 - 10 / count < largest < 1.01 and abs(3 * square - 1) < 4.5 * count**-0.5 + 0.01


def _on_meta(factory: Callable[..., nn.Module], keywords: Mapping[str, Any]) -> nn.Module:
    """A model of the family, without values.

    Raises:
        ValueError: The factory asks for values, or leaves shapes open.
    """
    # A factory may seed, or draw something on the CPU all the same.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            model = factory(**keywords)
        except (RuntimeError, TypeError) as error:
            if not re.search(r"\bmeta (tensor|device)|\bdevice meta\b", str(error)):
                raise
            raise ValueError(
                "a MupSpec's factory runs on the meta device, where tensors have shapes and no values, and this one "
                f"asks for values ({error}); move to a device (.to, .cpu) and look at numbers (.item) outside of it"
            ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"a MupSpec's factory returns the model, and this one returned {type(model).__name__}")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise ValueError(
            f"{_some(lazy)}: of a lazy layer, whose shape is open until data come; give its inputs, or run the model "
            "once in the factory"
        )
    return model


def _times(key: str, value: Any, factor: int) -> Any:
    """``value``, a number or numbers, as many times as large."""
    if isinstance(value, list | tuple) and value:
        return type(value)(_times(key, v, factor) for v in value)
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}={value!r} cannot scale with the width: it must be a positive whole number, or several")
    return int(value) * factor  # plain, for checkpoints


def _check_alike(narrow: nn.Module, wide: nn.Module) -> None:
    sizes, others = ({name: p.dim() for name, p in model.named_parameters()} for model in (narrow, wide))
    if sizes != others:
        raise ValueError(
            f"the factory builds another architecture at {DELTA} times the base width: "
            f"{_some(sorted(dict(sizes.items() ^ others.items())))} differ; choose a base width at which no size "
            "happens to equal a fixed one"
        )


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
