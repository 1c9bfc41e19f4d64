"""What is preconditioned, how anisotropic its inputs are, and what is left out and why: a table for a person."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dopr_lightning.preconditioner.coverage import OTHERS
from dopr_lightning.preconditioner.lowrank import LowRankStack
from dopr_lightning.preconditioner.stack import Stack


@dataclass(frozen=True)
class SummaryRow:
    """One parameter. What is not known, or does not apply, is None.

    Attributes:
        parameter: Public name.
        kind: Layer type.
        solver: How its covariance is inverted: ``"exact"``; ``"woodbury"``, the same by the rows themselves, while a
            batch has less than half as many as the layer has inputs; ``"lowrank"``; ``"diagonal"``, of embeddings.
        d_in: Size of the covariance.
        rows: Rows behind it at the last refresh, over all ranks.
        condition_number: Largest eigenvalue over the smallest, the worst block's; infinite where rank-deficient. Of
            the low-rank solver, with the mean of the unresolved eigenvalues for the smallest.
        effective_rank: exp of the entropy of the normalised eigenvalues (Roy & Vetterli, 2007), mean over blocks.
        rank: Directions that the low-rank solver uses.
        error: Its certified relative error of M.
        cosine: Between M and the gradient G, where measured.
        update_rms: Root mean square of M's entries, where measured.
        failures: Refreshes that gave no usable inverse.
        reason: Why the parameter is not covered, empty if it is.
    """

    parameter: str
    kind: str | None = None
    solver: str | None = None
    d_in: int | None = None
    rows: int | None = None
    condition_number: float | None = None
    effective_rank: float | None = None
    rank: int | None = None
    error: float | None = None
    cosine: float | None = None
    update_rms: float | None = None
    failures: int | None = None
    reason: str = ""

    @property
    def covered(self) -> bool:
        """Whether the parameter's gradient is preconditioned."""
        return not self.reason


class Summary(list[SummaryRow]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        head = {
            "parameter": "parameter",
            "kind": "kind",
            "solver": "solver",
            "d_in": "d_in",
            "rows": "rows",
            "condition_number": "condition",
            "effective_rank": "eff. rank",
            "rank": "rank",
            "error": "error",
            "cosine": "cos(M, G)",
            "update_rms": "RMS of M",
            "failures": "failures",
            "reason": "not covered because",
        }
        body = [[_show(getattr(row, attribute)) for attribute in head] for row in self]
        return _table([list(head.values()), *body])


def joined(summaries: Sequence[Summary]) -> Summary:
    """One summary of a model whose layers several preconditioners share: each says what is of its own optimizer."""
    chosen: dict[str, list[SummaryRow]] = {}
    for summary in summaries:
        for parameter, rows in groupby(summary, lambda row: row.parameter.partition("[")[0]):
            if parameter not in chosen or chosen[parameter][0].reason == OTHERS:
                chosen[parameter] = list(rows)
    return Summary(chain.from_iterable(chosen.values()))


class Alignment(NamedTuple):
    """How a gradient was rewritten, as tensors on its device: the cosine between M and G, and the RMS of M."""

    cosine: Tensor
    rms: Tensor


def covered_rows(stack: Stack, measured: Mapping[str, Alignment]) -> list[SummaryRow]:
    """One row per parameter of a stack's layers.

    Args:
        stack: Of the layers.
        measured: By the parameter's public name.
    """
    low_rank = stack if isinstance(stack, LowRankStack) else None
    rows = []
    for index, layer in enumerate(stack.layers):
        spectrum = stack.spectrum(index)
        for label, name in zip(layer.labels, layer.parameter_names, strict=True):
            rewrite = measured.get(name)
            rows.append(
                SummaryRow(
                    parameter=label,
                    kind=layer.kind,
                    solver=stack.solver,
                    d_in=stack.dim,
                    rows=stack.records[index].rows_seen,
                    condition_number=None if spectrum is None else spectrum.condition_number,
                    effective_rank=None if spectrum is None else spectrum.effective_rank,
                    rank=None if low_rank is None else low_rank.ranks[index],
                    error=None if low_rank is None else low_rank.errors[index],
                    cosine=None if rewrite is None else float(rewrite.cosine),
                    update_rms=None if rewrite is None else float(rewrite.rms),
                    failures=stack.records[index].failures,
                )
            )
    return rows


def moments(gradient: Tensor, rewritten: Tensor) -> Tensor:
    """Sums over the entries of G M, G^2, M^2 and 1, (4,) in float64; those of shards add up to those of the whole."""
    g, m = gradient.double(), rewritten.double()
    return torch.stack([(g * m).sum(), g.square().sum(), m.square().sum(), m.new_full((), m.numel())])


def alignment(moments: Tensor) -> Alignment:
    """What :func:`moments` of a gradient and its rewrite say."""
    product, g, m, entries = moments
    return Alignment(product / (g * m).sqrt(), (m / entries).sqrt())


def _show(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}"
    return str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
