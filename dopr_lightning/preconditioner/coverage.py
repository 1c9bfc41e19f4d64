"""Which parameters are preconditioned, and why not the others?"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dopr_lightning.preconditioner.layers import (
    ConvCovariance,
    Layer,
    layer_types,
    layers_of,
    named_modules,
    not_covered,
    public_name,
)

EMPTY = "the weight has no entries"
FROZEN = "the weight is frozen (requires_grad=False)"
OTHERS = "its weight is not among the optimizer's parameters"


class NothingToPreconditionError(ValueError):
    """No parameter of the model, or of the chosen ones, can be preconditioned.

    Attributes:
        frozen: Layers left out because their weight is frozen.
    """

    def __init__(self, message: str, frozen: Sequence[Layer] = ()) -> None:
        super().__init__(message)
        self.frozen = frozen


@dataclass(frozen=True)
class Coverage:
    """What of a model is preconditioned.

    Attributes:
        layers: The covered weights; one that several modules share is there once, with all of these modules.
        frozen: Layers left out because their weight is frozen.
        reasons: Why each other parameter is not covered, by its public name.
        positions: Where each parameter stands in the model, by its public name.
    """

    layers: list[Layer]
    frozen: list[Layer]
    reasons: dict[str, str]
    positions: dict[str, int]

    def order(self, parameter: str) -> int:
        """For sorting: the parameter's position in the model; a part's is that of the whole."""
        return self.positions.get(parameter.partition("[")[0], len(self.positions))


def check_still_frozen(layers: Sequence[Layer]) -> None:
    """Raise RuntimeError if the weight of a layer that was left out as frozen was unfrozen: no row is captured."""
    for layer in layers:
        if layer.weight.requires_grad and layer.weight.grad is not None:
            raise RuntimeError(
                f"{layer.name}: was frozen when the preconditioner was made, and now has a gradient; make a new "
                "preconditioner after unfreezing, or exclude the module"
            )


def find_coverage(
    model: nn.Module,
    *,
    conv: ConvCovariance = "channel",
    bias: bool = False,
    max_dim: int | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    parameters: Collection[nn.Parameter] | None = None,
) -> Coverage:
    """Choose what to cover.

    The arguments are those of :class:`~dopr_lightning.preconditioner.preconditioner.ActivationPreconditioner`.

    Raises:
        NothingToPreconditionError: Nothing is left to cover.
        ValueError: A weight is sharded such that its gradient would have to be gathered.
    """
    root = _root(model)
    chosen = None if parameters is None else {id(parameter) for parameter in parameters}
    reasons: dict[str, str] = {}
    frozen: list[Layer] = []
    found: dict[Hashable, list[Layer]] = {}  # by the weight: modules may share one
    for name, module in named_modules(root):
        left_out = reason = _left_out(name, include, exclude)
        layers = layers_of(name, module, conv=conv, bias=bias, max_dim=max_dim)
        if chosen is not None and any(layer.homogeneous and id(layer.bias) not in chosen for layer in layers):
            layers = layers_of(name, module, conv=conv, bias=False, max_dim=max_dim)
        used = []
        for layer in layers:
            reason = left_out or _not_trained(layer, chosen)
            if reason is None:
                used.append(layer)
                found.setdefault(layer.key, []).append(layer)
                continue
            reasons |= dict.fromkeys(layer.parameter_names, reason)
            if reason == FROZEN:
                frozen.append(layer)
        reasons = not_covered(name, module, used, None if used else reason) | reasons
    covered = []
    for twins in found.values():
        if len({layer.signature for layer in twins}) > 1:
            kinds = ", ".join(f"{layer.name} ({layer.kind})" for layer in twins)
            for layer in twins:
                reasons |= dict.fromkeys(layer.parameter_names, f"tied between different kinds: {kinds}")
            continue
        first, *others = twins
        first.modules += [module for layer in others for module in layer.modules]
        first.check_sharding()
        covered.append(first)
    if not covered:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NothingToPreconditionError(
            f"nothing to precondition in {type(root).__name__} ({listed or 'it has no parameters'})", frozen
        )
    positions = {public_name(name): i for i, (name, _) in enumerate(root.named_parameters())}
    taken = {name for layer in covered for name in layer.parameter_names}
    reasons = {name: reason for name, reason in reasons.items() if name in positions and name not in taken}
    return Coverage(covered, frozen, reasons, positions)


def _not_trained(layer: Layer, chosen: Collection[int] | None) -> str | None:
    """Why a layer's weight is not among what is trained here, or None."""
    if not layer.weight.numel():  # of a condition of no entries, say
        return EMPTY
    if not layer.weight.requires_grad:
        return FROZEN
    return OTHERS if chosen is not None and id(layer.weight) not in chosen else None


def _root(model: nn.Module) -> nn.Module:
    """The model itself, without DistributedDataParallel, ``torch.compile`` or Fabric around it."""
    if isinstance(model, DistributedDataParallel):
        return _root(model.module)
    wrapped = next((child for name, child in model.named_children() if not public_name(name)), None)
    return model if wrapped is None else _root(wrapped)


def check_patterns(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise ValueError for a glob that matches no module with parameters: it would do nothing, in silence."""
    root = _root(model)
    names = [
        name
        for name, module in named_modules(root)
        if layer_types(module) or any(value is not None for value in module._parameters.values())
    ]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if any(fnmatchcase(name, pattern) for name in names):
                continue
            globs = {f"{name.rsplit('.', level)[0]}.*" for name in names for level in range(1, name.count(".") + 1)}
            near = [name for name in (pattern.rpartition(".")[0], f"{pattern}.*") if name in {*names, *globs} - {""}]
            near += get_close_matches(pattern, [*names, *globs], n=1, cutoff=0.7)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            parameters = (public_name(name) for name, _ in root.named_parameters())
            if any(fnmatchcase(name, pattern) for name in parameters):
                guess = f": these are names of modules, not of parameters{guess}"
            raise ValueError(f"{option}: {pattern!r} matches no module with parameters in {type(root).__name__}{guess}")


def _left_out(name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> str | None:
    """Why the user's globs leave a module out, or None."""
    if include is not None and not any(fnmatchcase(name, pattern) for pattern in include):
        return f"{name} matches no include pattern"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return f"{name} matches an exclude pattern"
    return None
