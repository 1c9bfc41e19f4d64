"""What is preconditioned, how anisotropic its inputs are, and what is left out and why: a table for a person."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SummaryRow:
    """One parameter.

    Attributes:
        parameter: Public name.
        kind: Layer type, None if not covered.
        d_in: Size of the covariance.
        rows: Rows behind it at the last refresh, over all ranks.
        condition_number: Largest eigenvalue over the smallest, the worst block's; infinite where rank-deficient.
        effective_rank: exp of the entropy of the normalised eigenvalues (Roy & Vetterli, 2007), mean over blocks.
        reason: Why the parameter is not covered, empty if it is.
    """

    parameter: str
    kind: str | None = None
    d_in: int | None = None
    rows: int | None = None
    condition_number: float | None = None
    effective_rank: float | None = None
    reason: str = ""

    @property
    def covered(self) -> bool:
        """Whether the parameter's gradient is preconditioned."""
        return not self.reason


class Summary(list[SummaryRow]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        head = ("parameter", "kind", "d_in", "rows", "condition", "eff. rank", "not covered because")
        body = [
            (
                row.parameter,
                row.kind or "-",
                _show(row.d_in),
                _show(row.rows),
                _show(row.condition_number),
                _show(row.effective_rank),
                row.reason,
            )
            for row in self
        ]
        return _table([head, *body])


def spectrum(covariance: Tensor | None, diagonal: bool) -> tuple[float | None, float | None]:
    """Condition number (worst block) and effective rank (mean over blocks); None before any row was seen."""
    if covariance is None or not covariance.any():
        return None, None
    covariance = covariance.double()
    eigenvalues = covariance.sort(-1)[0] if diagonal else torch.linalg.eigvalsh(covariance)
    # Below the rounding error of the fp32 sums an eigenvalue is zero.
    largest = eigenvalues[..., -1:]
    floor = largest * eigenvalues.shape[-1] * torch.finfo(torch.float32).eps
    eigenvalues = torch.where(eigenvalues > floor, eigenvalues, 0.0)
    condition = (largest[..., 0] / eigenvalues[..., 0]).max()
    share = eigenvalues / eigenvalues.sum(-1, keepdim=True)
    rank = torch.special.entr(share).sum(-1).exp().mean()
    return float(condition), float(rank)


def _show(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or math.isinf(value):
        return str(value)
    return f"{value:.3g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
