"""Which trainable tensor is behind a module's weight?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _Orthogonal


class NotCoveredError(Exception):
    """A weight that cannot be preconditioned.

    Attributes:
        names: The parameters concerned, named as seen from the module.
        reason: Why not, for a person: the end of the sentence "parameter: ...".
    """

    def __init__(self, names: list[str], reason: str) -> None:
        super().__init__(f"{', '.join(names)}: {reason}")
        self.names = names
        self.reason = reason


class Location(NamedTuple):
    """Where a parameter is: an attribute of a module, looked up anew at each :meth:`get`.

    ``load_state_dict(assign=True)`` and FSDP replace the parameter object itself, and pruning or a parametrization that
    comes later moves it.
    """

    owner: nn.Module
    attribute: str
    name: str
    """The parameter as seen from the covered module, ``"parametrizations.weight.original1"``."""
    shape: tuple[int, ...] = ()
    """By which it is found again if it moves."""

    def get(self) -> nn.Parameter:
        # First where getattr() arrives at last: every step asks several times per layer.
        found = self.owner._parameters.get(self.attribute)
        return self._moved() if found is None else found

    def _moved(self) -> nn.Parameter:
        candidates = [location.get() for location in _candidates(self.owner, self.attribute)]
        found = [parameter for parameter in candidates if parameter.shape == self.shape]
        return found[0] if len(found) == 1 else getattr(self.owner, self.attribute)


def locate(module: nn.Module, path: str, shape: tuple[int, ...]) -> Location:
    r"""Find the parameter that is, or that determines, a weight.

    A parametrized weight W = f(V, ...) (``weight_norm``, ``spectral_norm``, in their old and new versions, pruning and
    others) is covered through V, its only original tensor of W's shape. For them the rows of :math:`\nabla_V` are rows
    of :math:`\nabla_W` times a scale, plus a share of V's own rows: they live in the space of the layer's inputs, as V
    does, so :math:`M = \nabla_V (\Sigma + \lambda I)^{-1}`. Not so for ``orthogonal``, which mixes rows and columns.

    Args:
        module: The covered module.
        path: The weight as seen from it, ``"weight"`` or ``"out_proj.weight"``.
        shape: The weight's shape. Not read off the weight: computing a parametrized one may have side effects.

    Raises:
        NotCoveredError: No such parameter, or one that is not initialised, not of this shape, behind ``orthogonal``,
            or of a dtype in which M cannot be kept.
    """
    found = _candidates(module, path)
    names = [location.name for location in found]
    if any(isinstance(location.get(), nn.UninitializedParameter) for location in found):
        raise NotCoveredError(names, "lazy and not initialised yet; run a forward before making the preconditioner")
    for location in found:
        behind = location.owner if isinstance(location.owner, parametrize.ParametrizationList) else ()
        if any(isinstance(kind, _Orthogonal) for kind in behind):
            raise NotCoveredError(names, "orthogonal() makes the weight of it, and mixes its rows and columns")
    plain = names == [path]
    found = [location for location in found if location.get().shape == shape]
    if len(found) != 1:
        layout = f"its shape is not {shape}: flattened, packed, or used in another layout"
        computed = f"{path} is computed, and not from exactly one parameter of its shape {shape}"
        raise NotCoveredError(names, layout if plain else computed)
    dtype = found[0].get().dtype
    if dtype == torch.float16:
        raise NotCoveredError(names, "M leaves the range of float16; use 16-mixed or bf16")
    if not dtype.is_floating_point:
        raise NotCoveredError(names, f"its dtype is {dtype}; only real floating-point weights are covered")
    return found[0]._replace(shape=shape)


def _candidates(module: nn.Module, path: str) -> list[Location]:
    """The weight itself if it is a parameter, else those from which it is computed."""
    prefix, _, attribute = path.rpartition(".")
    owner = module.get_submodule(prefix)
    if owner._parameters.get(attribute) is not None:
        return [Location(owner, attribute, path)]
    if parametrize.is_parametrized(owner, attribute):
        originals = owner.get_submodule(f"parametrizations.{attribute}")
        path = join(prefix, f"parametrizations.{attribute}")
        return [Location(originals, name, join(path, name)) for name in originals._parameters]
    # The old torch.nn.utils.weight_norm and spectral_norm, and pruning: weight_v, weight_orig.
    names = [
        name for name, value in owner._parameters.items() if name.startswith(f"{attribute}_") and value is not None
    ]
    return [Location(owner, name, join(prefix, name)) for name in names]


def join(module: str, parameter: str) -> str:
    """The name of a module's parameter."""
    return f"{module}.{parameter}" if module else parameter
