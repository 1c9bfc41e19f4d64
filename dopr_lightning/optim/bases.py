"""The base optimizers by name: which algorithm takes which role, with what defaults. A new one is an entry here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from dopr_lightning.mup.rules import Growth, gradient, orthogonal, sign
from dopr_lightning.optim.muon import Muon
from dopr_lightning.optim.roles import Role

_FOREACH = {"foreach": True}  # one kernel for many parameters, also on CPU, where it is not the default


@dataclass(frozen=True)
class Base:
    """A base optimizer.

    Attributes:
        algorithm: Takes the parameters whose role is in ``roles``.
        roles: None: all.
        options: Defaults of ``algorithm``; the user's keywords win.
        growth: How the spectral norm of the algorithm's update grows with the width, for muP. None: not known.
        rest: Takes the other parameters.
        rest_options: Its defaults.
        rest_growth: As ``growth``, of ``rest``.
    """

    algorithm: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    roles: frozenset[Role] | None = None
    growth: Growth | None = None
    rest: type[Optimizer] = torch.optim.AdamW
    rest_options: Mapping[str, Any] = field(default_factory=dict)
    rest_growth: Growth = sign


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
}


def resolve(base: str | type[Optimizer]) -> Base:
    """A base by name, or any Optimizer class for all parameters.

    Raises:
        ValueError: Unknown name.
    """
    if isinstance(base, type) and issubclass(base, Optimizer):
        return Base(base)
    if base in BASES:
        return BASES[base]
    raise ValueError(f"unknown base optimizer {base!r}; choose from {', '.join(sorted(BASES))}, or an Optimizer class")
