"""A few settings in which every two values of any two factors meet: what a full product says of pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows in which every allowed pair of values occurs: greedily, the row with the most new pairs next.

    Args:
        factors: Values by name.
        allowed: Whether a whole row is.
    """
    rows = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    return _cover([row for row in rows if allowed(row)], 2)


def each(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows in which every value occurs."""
    rows = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    return _cover([row for row in rows if allowed(row)], 1)


def _cover(rows: Sequence[Row], strength: int) -> list[Row]:
    parts = [frozenset(itertools.combinations(row.items(), strength)) for row in rows]
    missing = set().union(*parts)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(parts[index] & missing))
        chosen.append(rows[best])
        missing -= parts[best]
    return chosen
