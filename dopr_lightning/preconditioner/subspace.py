r"""The low-rank solver's mathematics: which few directions of a covariance matter, and what is lost without the rest.

Damping relative to the trace, :math:`\lambda = \gamma \operatorname{tr} \Sigma`, leaves fewer than :math:`1/\gamma`
eigenvalues above :math:`\lambda` whatever the width, and in practice one or two tens. With U the r leading
eigenvectors, s their eigenvalues and :math:`\mu = (\operatorname{tr} \Sigma - \sum_i s_i) / (d - r)` the mean of the
others,

.. math:: \hat M = G \left(U \operatorname{diag}(s) U^\top + \mu (I - U U^\top) + \lambda I\right)^{-1}
          = (G - G\, U \operatorname{diag}(c)\, U^\top) / \lambda', \quad
          \lambda' = \lambda + \mu, \quad c_i = 1 - \frac{\lambda'}{s_i + \lambda}.

:math:`\Sigma`, of d^2 numbers, is never formed. A refresh takes the image :math:`\Sigma V`, where V is the last U with
a few vectors drawn anew (:func:`probe`); :func:`nystrom` makes the next U of it, and :func:`relative_error` says what
the approximation costs.

Everything is pure and batched over a leading dimension B of covariances, of one size where matrices with d rows are
concerned. What is k x k or less is done on the host: an eigenproblem of that size takes a few tenths of a millisecond
there and 2 on an H200, where each of the small operators around it costs a launch besides. Calibrated by
``benchmarks/rank_and_error.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dopr_lightning.preconditioner.threads import side_by_side, threads

FRESH = 1 / 8
"""Share of the vectors that :func:`probe` draws anew.

Subspace iteration never sees a direction orthogonal to its subspace, such as that of a feature which was constant so
far, and neither would the certificate. On Humanoid an eighth halves the worst error (rank 48: 0.19 to 0.09) and adds a
tenth to the median (0.034 to 0.038).
"""

SHIFT = 100 * torch.finfo(torch.float32).eps
"""Added to a covariance in units of its trace, so that the core of its image is definite even where the image has fewer
dimensions than columns, and where its rows were rounded to TF32 or bfloat16. Directions below it cannot be told apart
and need not be."""

TRUSTED = 3 / 4
"""The eigenvalue at this share of the rank bounds what was left out.

The last directions of a subspace iteration are the least converged, and what they miss is left out: the largest
eigenvalue outside exceeds the last one inside, but hardly one some places before (the reason for oversampling in
Halko, Martinsson & Tropp, 2011). With three quarters of k the certificate was above the true error in 95 % of the
cases in which that was above 0.05.
"""


def random_basis(
    blocks: int, dim: int, rank: int, *, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype
) -> Tensor:
    """Orthonormal bases of random subspaces, to start from.

    Drawn and orthonormalised on the CPU in float64: the same on every rank, whatever its device.

    Args:
        blocks: Number of bases B.
        dim: d.
        rank: k; a space of d dimensions holds no more than d.
        seed: The same seed gives the same bases.
        device: Where they go.
        dtype: What they are stored in.

    Returns:
        (B, d, min(k, d)).
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(blocks, dim, min(rank, dim), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian)[0].to(device, dtype)


def probe(basis: Tensor, *, seed: int) -> Tensor:
    """The vectors whose image the next :func:`nystrom` step needs: a basis with its last vectors drawn anew.

    Args:
        basis: U, leading direction first, (B, d, k).
        seed: Of the new vectors, which all blocks share. Change it at every refresh; it must agree between ranks.

    Returns:
        V, (B, d, k): linearly independent, of about unit length, the new ones not orthogonal to the others. The basis
        itself where k = d, which leaves nothing to look for.
    """
    blocks, dim, k = basis.shape
    new = 0 if k == dim else int(FRESH * k)
    # On the CPU, whose stream is the same on every machine.
    random = torch.randn(dim, new, generator=torch.Generator().manual_seed(seed)) / dim**0.5
    return torch.cat([basis[..., : k - new], random.to(basis, non_blocking=True).expand(blocks, -1, -1)], dim=-1)


def nystrom(basis: Tensor, image: Tensor, trace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Eigenvectors and eigenvalues of the Nystrom approximation: one step of subspace iteration.

    :math:`\hat\Sigma = (\Sigma V) (V^\top \Sigma V)^{-1} (\Sigma V)^\top` is the best that the image can say:
    :math:`0 \preceq \hat\Sigma \preceq \Sigma` and :math:`\hat\Sigma V = \Sigma V`. So no eigenvalue is overestimated,
    and the trace of what is left out is known exactly. Stabilised by a small shift as in Tropp, Yurtsever, Udell &
    Cevher (2017), "Fixed-rank approximation of a positive-semidefinite matrix from streaming data", Algorithm 3
    (Martinsson & Tropp, 2020, arXiv 2002.01387, Algorithm 16). Per step an error along eigenvector j in the place of i
    shrinks by :math:`\sigma_j / \sigma_i`.

    For one size of covariance; the engine takes the same steps for several at once (:mod:`~.lowrank`).

    Args:
        basis: V, linearly independent and of about unit length, (B, d, k).
        image: :math:`\Sigma V`, (B, d, k).
        trace: :math:`\operatorname{tr} \Sigma`, (B,).

    Returns:
        U, orthonormal, leading direction first, (B, d, k), in the dtype of ``basis``; and on the host its eigenvalues,
        (B, k), at least 0, in the dtype of ``trace``; and which blocks can be trusted, (B,). A block with NaN or
        infinity, with a trace of 0 or below, or with an image that no covariance has (not positive semidefinite,
        beyond rounding) cannot; its U is ``basis``, and its eigenvalues are 0. The host waits for the device.
    """
    good = trace.isfinite() & (trace > 0)
    scale = torch.where(good, trace, 1)[:, None, None]
    image = (image / scale).add_(basis, alpha=SHIFT)
    values, rotation, good = core_eigenpairs(products(basis, image).cpu(), good.cpu())
    leading = (image.double() @ rotation.to(image.device)).to(basis.dtype)
    leading = torch.where(good.to(basis.device)[:, None, None], leading, basis)
    return leading, torch.where(good[:, None], values * trace.cpu()[:, None], 0).to(trace.dtype), good


def products(basis: Tensor, image: Tensor) -> Tensor:
    r"""What :func:`core_eigenpairs` needs to know of an image.

    Args:
        basis: V, (B, d, k).
        image: Y, that of V under :math:`\Sigma / \operatorname{tr} \Sigma +` :data:`SHIFT`, (B, d, k).

    Returns:
        :math:`V^\top Y` and :math:`Y^\top Y`, (2, B, k, k), in float64: U is orthonormal only by cancellation in
        products of Y with itself and with R.
    """
    wide = image.double()
    return torch.stack([(basis.mT @ image).double(), wide.mT @ wide])


def core_eigenpairs(core_and_gram: Tensor, valid: Tensor, *, idle: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    r"""What is k x k of :func:`nystrom`, on the host and in float64.

    Args:
        core_and_gram: What :func:`products` returns, (2, B, k, k).
        valid: Blocks to look at, (B,).
        idle: Whether the host has nothing else to do meanwhile: its threads share the eigenproblems then.

    Returns:
        Eigenvalues of the approximation in units of the trace, descending, at least 0, (B, k); the matrices R with
        which U is Y R, (B, k, k); and which blocks can be trusted, (B,).
    """
    core, gram = core_and_gram
    most = torch.get_num_threads()
    with threads(1):  # more of them take longer, with matrices as small as these
        factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
        # NaN and infinity are not positive definite either; where only the image has them, the sum of its squares does.
        good = valid & (info == 0) & gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
        if not good.all():
            # One bad block would make the whole batched call raise, so bad ones go on as blocks of the identity.
            identity = torch.eye(core.shape[-1], dtype=core.dtype)
            factor = torch.where(good[:, None, None], factor, identity)
            gram = torch.where(good[:, None, None], gram, identity)
        # With root = Y factor^-T the approximation is root root^T, and root^T root has its eigenvalues.
        half = torch.linalg.solve_triangular(factor, gram, upper=False)
        small = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
        values, rotation = side_by_side(torch.linalg.eigh, (small + small.mT) / 2, most if idle else 1)
        values, rotation = values.flip(-1), rotation.flip(-1)
        rotation = rotation / values.clamp(min=SHIFT / 2).sqrt()[:, None, :]
        rotation = torch.linalg.solve_triangular(factor.mT, rotation, upper=True)
    return (values - SHIFT).clamp(min=0), rotation, good


def tail_mean(eigenvalues: Tensor, trace: Tensor, dim: int | Tensor) -> Tensor:
    r""":math:`\mu_r`, the mean of the eigenvalues that rank r leaves out, for every r.

    Args:
        eigenvalues: s, descending, (B, k).
        trace: (B,).
        dim: d, one number or one per block, (B,).

    Returns:
        (B, k + 1), for r = 0 .. k; 0 for r = d.
    """
    left = _column(dim) - torch.arange(eigenvalues.shape[-1] + 1, device=eigenvalues.device)
    return _remainder(eigenvalues, trace, dim) / left.clamp(min=1)


def coefficients(
    eigenvalues: Tensor, trace: Tensor, damping: Tensor, dim: int | Tensor, rank: int | Tensor
) -> tuple[Tensor, Tensor]:
    r"""What the update :math:`\hat M = (G - G U \operatorname{diag}(c) U^\top) / \lambda'` needs.

    Args:
        eigenvalues: s, descending, (B, k).
        trace: (B,).
        damping: :math:`\lambda`, positive, (B,).
        dim: d, one number or one per block, (B,).
        rank: How many directions r <= k to use: one number, or one per block, (B,).

    Returns:
        c, (B, k), 0 beyond each block's rank, and :math:`\lambda' = \lambda + \mu_r`, (B,).
    """
    blocks, k = eigenvalues.shape
    if isinstance(rank, int):
        rank = torch.full((blocks,), rank, device=eigenvalues.device)
    used = rank[:, None]
    rest = damping[:, None] + tail_mean(eigenvalues, trace, dim).gather(-1, used)
    c = 1 - rest / (eigenvalues + damping[:, None])
    return torch.where(torch.arange(k, device=eigenvalues.device) < used, c, 0), rest[:, 0]


def relative_error(eigenvalues: Tensor, trace: Tensor, damping: Tensor, dim: int | Tensor) -> Tensor:
    r"""Certificate: a bound on the expected :math:`\|\hat M - M\|_F / \|M\|_F` of every rank r <= k.

    :math:`\hat M - M` is G times a matrix with the eigenvectors of :math:`\Sigma` and, along those left out, the
    eigenvalues

    .. math:: e(\sigma) = \frac{1}{\lambda + \mu_r} - \frac{1}{\sigma + \lambda}
              = \frac{\sigma - \mu_r}{(\lambda + \mu_r)(\sigma + \lambda)}.

    Of :math:`G = \sum \delta z^\top` it is assumed that the output gradients :math:`\delta` are white and independent
    of z, so that :math:`\mathbb E |G u_j|^2 \propto \sigma_j` (beyond the first steps of training, real gradients give
    about the same error). Then, with N eigenvalues of sum T outside all k directions,

    .. math:: \text{error}^2 \le \frac{\sum_{r < i \le k} s_i e(s_i)^2 + T e(\bar s)^2 + \Delta}
              {\sum_{i \le k} s_i / (s_i + \lambda)^2 + T / (\bar s + \lambda)^2},

    where :math:`\bar s` bounds the eigenvalues outside (:data:`TRUSTED`). The second term is attained if those are
    either :math:`\bar s` or 0; decaying ones cost about half. :math:`\Delta`, mostly 0, is what eigenvalues below
    :math:`\mu_r` can add to it: :math:`\min(N \max_{\sigma < \mu_r} \sigma e(\sigma)^2, T [e(0)^2 - e(\bar s)^2]_+)`.

    Well below k the known eigenvalues decide, and the certificate is nearly the error: of 64 directions as many used
    as a tolerance of 0.1 to 0.25 asks for, the errors of real gradients lay just below it, 3 % of them by more than a
    tenth above, the worst by 0.3. At r = k the remainder decides, and the bound is loose by about 2.

    That the k directions are eigenvectors, and that :math:`\bar s` is a bound, holds once the subspace has converged,
    two or three refreshes after the start; before that the true error can be several times as large. Errors below
    0.05 can be, too: there the last bit of convergence counts.

    Args:
        eigenvalues: s, descending, (B, k).
        trace: (B,).
        damping: :math:`\lambda`, (B,).
        dim: d, one number or one per block, (B,).

    Returns:
        (B, k + 1), for r = 0 .. k. NaN where the trace is 0.
    """
    k = eigenvalues.shape[-1]
    # In units of the trace: squares of 1 / lambda would overflow in float32.
    eigenvalues, damping, trace = eigenvalues / trace[:, None], damping / trace, trace / trace
    lam, mu, s = damping[:, None], tail_mean(eigenvalues, trace, dim), eigenvalues
    count = _column(dim) - k
    outside, ceiling = mu[:, -1:] * count, _ceiling(eigenvalues)[:, None]
    # The sum of s (s - mu_r)^2 / (s + lambda)^2 over the directions skipped, for every r, multiplied out.
    weight = s / (s + lam) ** 2
    first, second, third = (_sum_from(weight * s**power) for power in range(3))
    known = (third - 2 * mu * second + mu**2 * first).clamp(min=0) / (lam + mu) ** 2
    high, low = _inverse_error(ceiling, mu, lam) ** 2, (mu / (lam * (lam + mu))) ** 2
    slope = mu + 3 * lam
    peak = 2 * mu * lam / (slope + (slope**2 + 4 * mu * lam).sqrt())  # of sigma e(sigma)^2 below mu
    hump = torch.minimum(count * peak * _inverse_error(peak, mu, lam) ** 2, outside * (low - high).clamp(min=0))
    norm = first[:, :1] + outside / (ceiling + lam) ** 2
    return ((known + outside * high + hump) / norm).sqrt()


def worst_case_error(eigenvalues: Tensor, trace: Tensor, damping: Tensor, dim: int) -> Tensor:
    r"""Bound on :math:`\|\hat M - M\|_F / \|M\|_F` for every gradient whatsoever, for every rank r <= k.

    :math:`\hat M - M` is M times a matrix with eigenvalues :math:`(\sigma - \mu_r) / (\lambda + \mu_r)` along what is
    left out. Only the second assumption of :func:`relative_error` is needed, on the eigenvalues outside.

    Args:
        eigenvalues: s, descending, (B, k).
        trace: (B,).
        damping: :math:`\lambda`, (B,).
        dim: d.

    Returns:
        (B, k + 1), for r = 0 .. k. NaN where the trace is 0.
    """
    mu = tail_mean(eigenvalues, trace, dim)
    ceiling = _ceiling(eigenvalues) if eigenvalues.shape[-1] < dim else torch.zeros_like(trace)
    largest = torch.cat([eigenvalues, ceiling[:, None]], dim=-1)
    return torch.maximum(largest - mu, mu) / (damping[:, None] + mu)


def required_rank(error: Tensor, tolerance: float) -> Tensor:
    """Smallest rank whose error is at most ``tolerance``.

    Args:
        error: (B, k + 1), for r = 0 .. k.
        tolerance: The error allowed.

    Returns:
        (B,), k + 1 where no rank will do.
    """
    ranks = torch.arange(error.shape[-1], device=error.device)
    return torch.where(error <= tolerance, ranks, error.shape[-1]).amin(-1)


def _inverse_error(sigma: Tensor, mu: Tensor, damping: Tensor) -> Tensor:
    """How much too large 1 / (sigma + damping) becomes when mu stands for sigma, negated; increases with sigma."""
    return (sigma - mu) / ((damping + mu) * (sigma + damping))


def _sum_from(terms: Tensor) -> Tensor:
    """Sums of the terms from r on, (B, k + 1), for r = 0 .. k."""
    return F.pad(terms, (0, 1)).flip(-1).cumsum(-1).flip(-1)


def _ceiling(eigenvalues: Tensor) -> Tensor:
    """What the eigenvalues outside are taken not to exceed, (B,)."""
    return eigenvalues[:, max(int(TRUSTED * eigenvalues.shape[-1]), 1) - 1]


def _remainder(eigenvalues: Tensor, trace: Tensor, dim: int | Tensor) -> Tensor:
    """The trace outside the first r directions, (B, k + 1); rounding makes it neither negative nor more than 0 at d."""
    remainder = (trace[:, None] - F.pad(eigenvalues, (1, 0)).cumsum(-1)).clamp(min=0)
    return torch.where(torch.arange(remainder.shape[-1], device=trace.device) < _column(dim), remainder, 0)


def _column(numbers: int | Tensor) -> int | Tensor:
    """One per block, to go with what has a column more."""
    return numbers[..., None] if isinstance(numbers, Tensor) else numbers
