"""Are the options of a preconditioner what they should be?"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any, get_args

from dopr_lightning.preconditioner.covariance import DampingScale
from dopr_lightning.preconditioner.layers import ConvCovariance
from dopr_lightning.preconditioner.solvers import Solver


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_globs(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(glob, str) for glob in value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("damping", "ema", "max_error"), (_is_number, "a number")),
    **dict.fromkeys(("update_every", "max_failures"), (_is_whole, "a whole number")),
    **dict.fromkeys(("max_dim", "max_rows", "log_every"), (_is_whole, "a whole number or None")),
    **dict.fromkeys(("bias", "overlap"), (_is_flag, "True or False")),
    "include": (_are_globs, "a list of globs or None"),
    "exclude": (_are_globs, "a list of globs"),
}
_CHOICES: dict[str, Any] = {"damping_scale": DampingScale, "solver": Solver, "conv": ConvCovariance}


def check_options(**options: Any) -> None:
    """Check some options of a preconditioner, or the callback's ``log_every``, before anything is built.

    Raises:
        TypeError: One is of another type.
        ValueError: One is out of range.
    """
    for name, value in options.items():
        if name in _CHOICES:
            if value not in get_args(_CHOICES[name]):
                raise ValueError(f"{name} must be one of {get_args(_CHOICES[name])}, got {value!r}")
            continue
        fits, kind = _TYPES[name]
        if value is None and kind.endswith("or None"):
            continue
        if not fits(value):
            way_out = f"; write [{value!r}]" if fits is _are_globs and isinstance(value, str) else ""
            raise TypeError(f"{name} must be {kind}, got {value!r}{way_out}")
        if fits is _is_whole and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < options.get("damping", 1) < math.inf:
        raise ValueError(f"damping must be positive, got {options['damping']}; 0.01 is a good start")
    if not 0 <= options.get("ema", 0) < 1:
        raise ValueError(f"ema must lie in [0, 1), got {options['ema']}")
    if not 0 < options.get("max_error", 1) < math.inf:
        raise ValueError(f"max_error must be positive, got {options['max_error']}")
