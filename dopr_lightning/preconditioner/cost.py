r"""What preconditioning one layer costs, in FLOPs and bytes: the basis of ``solver="auto"`` and of ``dopr bench``.

Per covariance, with n rows per refresh, gradient G of m x d, k tracked and r used directions:

============================  ====================  ==========================  =======================
                              exact                 low rank                    woodbury (n < d / 2)
============================  ====================  ==========================  =======================
apply (FLOPs a step)          2 m d^2               4 m d r                     4 m d n
statistics (FLOPs a refresh)  n d^2 (1 + 1/p)       4 n d k                     0, the rows are kept
solve (FLOPs a refresh)       d^3, or d^3 / 3       8 d k^2                     3 n^2 d + n^3 / 3
held between steps (numbers)  d^2 (3/2 + 1/(2p))    4 d k                       n d
summed over ranks (numbers)   d^2 (1/2 + 1/(2p))    d k + 1                     -
gathered from ranks           d^2                   0                           -
============================  ====================  ==========================  =======================

p is the number of panels of a packed covariance (:class:`~dopr_lightning.preconditioner.packed.PackedSymmetric`): 4,
or fewer where they would be narrower than 128. d^3 / 3 is a Cholesky factor, kept in place of the inverse where that
would be used too seldom. For an Embedding (``"diagonal"``) everything is linear in d.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from dopr_lightning.preconditioner.packed import packed_size

NUMBER = 4
"""Bytes of a number of the statistics, float32 under any autocast."""

COUNT = 8
"""Bytes of a row count (int64), which every covariance has, and of the flag (float64) that tells of its inverse."""


@dataclass(frozen=True)
class LayerSize:
    """One layer, seen by the preconditioner.

    Attributes:
        name: The weight's public name.
        blocks: Independent covariances, of a grouped convolution for example.
        m: Rows of one block's gradient; of one rank's shard where gradients are sharded.
        dim: d, the size of one covariance.
        rows: n, rows of its input that one refresh counts on one rank.
    """

    name: str
    blocks: int
    m: int
    dim: int
    rows: int


@dataclass(frozen=True)
class Method:
    """How one layer is solved.

    Attributes:
        solver: ``"exact"``, ``"woodbury"``, ``"lowrank"`` or ``"diagonal"``.
        tracked: k, directions tracked by the low-rank solver.
        rank: r, those it uses.
        factor: Whether the exact solver keeps a Cholesky factor and not the inverse.
    """

    solver: str
    tracked: int = 0
    rank: int = 0
    factor: bool = False


@dataclass(frozen=True)
class Cost:
    """What a layer costs.

    Attributes:
        statistics: FLOPs of one refresh.
        solve: FLOPs of one refresh, if one rank does it all.
        apply: FLOPs of every step.
        held: Bytes that live between steps.
        summed: Bytes of one refresh that are summed over ranks.
        gathered: Bytes of one refresh that one rank sends to all, each covariance's from another rank.
    """

    statistics: float
    solve: float
    apply: float
    held: int
    summed: int
    gathered: int


def layer_cost(size: LayerSize, method: Method) -> Cost:
    """Cost of one layer.

    Args:
        size: Its sizes.
        method: How it is solved.

    Raises:
        ValueError: An unknown solver.
    """
    return Cost(*(size.blocks * each for each in astuple(_block_cost(size, method))))


def _block_cost(size: LayerSize, method: Method) -> Cost:
    m, d, n, k = size.m, size.dim, size.rows, method.tracked
    if method.solver == "exact":
        return Cost(
            statistics=2.0 * n * packed_size(d),
            solve=solve_flops(d, None) / (3 if method.factor else 1),
            apply=apply_flops(m, d, None),
            held=NUMBER * (packed_size(d) + d * d) + COUNT,
            summed=NUMBER * packed_size(d) + COUNT,
            gathered=NUMBER * d * d + COUNT,
        )
    if method.solver == "lowrank":
        small = 2 * k + 6  # eigenvalues and coefficients; trace and its sum, floor and its inverse, error, weight
        return Cost(
            statistics=statistics_flops(n, d, k),
            solve=solve_flops(d, k),
            apply=apply_flops(m, d, method.rank),
            held=NUMBER * ((4 if k < d else 3) * d * k + small) + COUNT,
            summed=NUMBER * (d * k + 1) + COUNT,
            gathered=0,
        )
    if method.solver == "woodbury":
        return Cost(
            statistics=0.0,
            solve=3.0 * n * n * d + n**3 / 3,
            apply=apply_flops(m, d, n),
            held=NUMBER * (n * d + 1) + COUNT,
            summed=COUNT,
            gathered=0,
        )
    if method.solver == "diagonal":
        held, summed = NUMBER * 2 * d + COUNT, NUMBER * d + COUNT
        return Cost(statistics=n, solve=2.0 * d, apply=m * d, held=held, summed=summed, gathered=0)
    raise ValueError(f"no cost is known for solver {method.solver!r}")


def apply_flops(m: int, dim: int, rank: int | None) -> float:
    """One product with the gradient, (m, dim); ``rank`` None for the exact solver."""
    return 2.0 * m * dim**2 if rank is None else 4.0 * m * dim * rank


def statistics_flops(rows: float, dim: int, tracked: int | None) -> float:
    """One refresh's statistics over ``rows``: half the Gram product, or the image of the tracked directions."""
    return 1.0 * rows * dim**2 if tracked is None else 4.0 * rows * dim * tracked


def solve_flops(dim: int, tracked: int | None) -> float:
    """One Cholesky inverse (factor d^3 / 3, inverse 2 d^3 / 3), or the products of one Nystrom step.

    These are three, and with an average over refreshes five, of 2 d k^2 each, two of them in float64; four are counted.
    """
    return 1.0 * dim**3 if tracked is None else 8.0 * dim * tracked**2


SKINNY = 2.0
"""How much slower than square products those with k columns are, per FLOP (measured, CPU: 1.7 to 2.2 for k = 40)."""


def low_rank_is_cheaper(dim: int, tracked: int, update_every: int) -> bool:
    """Whether the low-rank solver costs less per step for a square layer with d rows or more per step."""

    def step(k: int | None) -> float:
        return apply_flops(dim, dim, k) + (statistics_flops(dim, dim, k) + solve_flops(dim, k)) / update_every

    return SKINNY * step(tracked) < step(None)
