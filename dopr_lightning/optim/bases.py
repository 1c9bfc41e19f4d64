"""The base optimizers by name: which algorithm takes which role, with what defaults. A new one is an entry here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer

from dopr_lightning.mup.rules import Growth, MatrixGrowth, gradient, orthogonal, sign
from dopr_lightning.optim.adamuon import AdaMuon
from dopr_lightning.optim.muon import Muon
from dopr_lightning.optim.roles import Role

Choice = str | type[Optimizer] | partial[Optimizer]
"""A base by name, or any Optimizer class that takes parameter groups and steps without a closure, perhaps with options
of its own, ``partial(torch.optim.RAdam, betas=(0.9, 0.95))``."""

_FOREACH = {"foreach": True}  # one kernel for many parameters, also on CPU, where it is not the default


@dataclass(frozen=True)
class Base:
    """A base optimizer.

    Attributes:
        algorithm: An Optimizer class, or a function that makes one of ``params``, ``lr``, ``weight_decay`` and options.
            Takes the parameters whose role is in ``roles``.
        roles: None: all.
        options: Defaults of ``algorithm``; the user's keywords win.
        mup_options: Further defaults under muP.
        growth: How the spectral norm of the algorithm's update grows with the width, for muP. None: not known.
        rest: Takes the other parameters.
        rest_options: Its defaults.
        rest_growth: As ``growth``, of ``rest``.
    """

    algorithm: Callable[..., Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    mup_options: Mapping[str, Any] = field(default_factory=dict)
    roles: frozenset[Role] | None = None
    growth: Growth | None = None
    rest: Callable[..., Optimizer] = torch.optim.AdamW
    rest_options: Mapping[str, Any] = field(default_factory=dict)
    rest_growth: Growth = sign


def _library(name: str) -> Callable[..., Optimizer]:
    """The class of that name in library.py, imported when it is to make an optimizer."""

    def algorithm(*args: Any, **options: Any) -> Optimizer:
        return getattr(import_module("dopr_lightning.optim.library"), name)(*args, **options)

    algorithm.__name__ = name
    return algorithm


def _as_muon(matrix: MatrixGrowth, options: Mapping[str, Any]) -> float:
    """As Muon's updates with the RMS of AdamW's grow, so do AdaMuon's, see there."""
    return orthogonal(matrix, {"adjust_lr_fn": "match_rms_adamw"})


BASES: dict[str, Base] = {
    "adamw": Base(torch.optim.AdamW, _FOREACH, growth=sign),
    "muon": Base(
        Muon,
        # RMS matched to AdamW's ("Muon is Scalable for LLM Training", arXiv 2502.16982): one rate serves both parts.
        {"adjust_lr_fn": "match_rms_adamw"},
        roles=frozenset({"hidden"}),
        growth=orthogonal,
        rest_options=_FOREACH,
    ),
    "sgd": Base(torch.optim.SGD, {"momentum": 0.9, **_FOREACH}, growth=gradient),
    "signum": Base(_library("Signum"), _FOREACH, growth=sign),
    "adamuon": Base(
        AdaMuon,
        # With the paper's scale the spectral norm, on which transfer over widths hangs, grows with what is learnt.
        mup_options={"scale": "spectral"},
        roles=frozenset({"hidden"}),
        growth=_as_muon,
        rest_options=_FOREACH,
    ),
    # No one exponent: 0.8 to 1.1 over widths while the eigenbases are stale, 0.4 to 0.7 (Muon's is 0.5) once they fit.
    # In a residual MLP the best rate drifted by -0.4 octave from width 64 to 256 with this one, by -1.3 with 0.5.
    "soap": Base(_library("SOAP"), growth=sign),
    "lion": Base(_library("Lion"), _FOREACH, growth=sign),
}


def resolve(base: Choice) -> Base:
    """A base by name, or an Optimizer class for all parameters.

    Raises:
        ValueError: Unknown name, or a class that cannot step all parameters of a model by itself.
    """
    if isinstance(base, str) and base in BASES:
        return BASES[base]
    if isinstance(base, Optimizer):
        raise ValueError(
            f"base must be the class {type(base).__name__}, not an optimizer made of it: one is made here, with groups "
            "of its own"
        )
    algorithm, options = (base.func, base.keywords) if isinstance(base, partial) else (base, {})
    if not (isinstance(algorithm, type) and issubclass(algorithm, Optimizer)):
        raise ValueError(f"unknown base optimizer {base!r}; choose from {', '.join(BASES)}, or an Optimizer class")
    if isinstance(base, partial) and base.args:
        raise ValueError(f"give the partial {algorithm.__name__} its options by name")
    if given := {"params", "lr", "weight_decay"} & options.keys():
        raise ValueError(
            f"leave {' and '.join(sorted(given))} out of the partial {algorithm.__name__}; they are set here"
        )
    if issubclass(algorithm, torch.optim.Muon):
        raise ValueError(
            "torch.optim.Muon takes matrices only; base='muon' gives it the hidden ones, and AdamW the rest"
        )
    closure = inspect.signature(algorithm.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{algorithm.__name__} evaluates the loss several times in a step, and needs a closure that does; take an "
            f"optimizer whose step goes without, {', '.join(BASES)} say"
        )
    return Base(algorithm, options)
