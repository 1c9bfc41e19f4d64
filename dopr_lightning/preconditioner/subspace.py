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

Everything is pure and batched over a leading dimension B of covariances of one size. What is k x k or less is done on
the host: an eigenproblem of that size takes a few tenths of a millisecond there and 2 on an H200, where each of the
small operators around it costs a launch besides. Calibrated by ``benchmarks/rank_and_error.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dopr_lightning.preconditioner.threads import threads

FRESH = 1 / 8
"""Share of the vectors that :func:`probe` draws anew.

Subspace iteration never sees a direction orthogonal to its subspace, such as that of a feature which was constant so
far, and neither would the certificate. On Humanoid an eighth halves the worst error (rank 48: 0.19 to 0.09) and adds a
tenth to the median (0.034 to 0.038).
"""

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
    # In units of the trace. The shift keeps the core definite where the image has fewer dimensions than columns, and
    # where its rows were rounded to TF32 or bfloat16; directions below it cannot be told apart and need not be.
    shift = 100 * torch.finfo(torch.float32).eps
    scale = torch.where(trace.isfinite() & (trace > 0), trace, 1)
    image = (image / scale[:, None, None]).add_(basis, alpha=shift)
    # Float64 for what is orthonormal only by cancellation, products of the image with itself and the new vectors, and
    # for all that is k x k.
    wide = image.double()
    core, gram = torch.stack([(basis.mT @ image).double(), wide.mT @ wide]).cpu()
    trace = trace.cpu()
    good = trace.isfinite() & (trace > 0)
    with threads(1):  # on two, eigenproblems from 64 x 64 on can take 2.5 times as long (measured, MKL)
        good, values, rotation = _solve_core(core, gram, good, shift)
    leading = (wide @ rotation.to(wide.device, non_blocking=True)).to(basis.dtype)
    if not good.all():
        leading = torch.where(good.to(basis.device)[:, None, None], leading, basis)
    eigenvalues = torch.where(good[:, None], (values - shift).clamp(min=0) * trace[:, None], 0)
    return leading, eigenvalues.to(trace.dtype), good


def _solve_core(core: Tensor, gram: Tensor, good: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is k x k of :func:`nystrom`, in float64: which blocks are good, eigenvalues, and U by way of the image."""
    factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
    # NaN and infinity are not positive definite either; where only the image has them, the sum of its squares does.
    good = good & (info == 0) & gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    # One bad block would make the whole batched call raise, so bad ones go on as blocks of the identity.
    identity = torch.eye(core.shape[-1], dtype=core.dtype)
    factor = torch.where(good[:, None, None], factor, identity)
    gram = torch.where(good[:, None, None], gram, identity)
    # With root = image factor^-T the approximation is root root^T, and root^T root has its eigenvalues.
    half = torch.linalg.solve_triangular(factor, gram, upper=False)
    small = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
    values, rotation = torch.linalg.eigh((small + small.mT) / 2)
    values, rotation = values.flip(-1), rotation.flip(-1)
    rotation = rotation / values.clamp(min=shift / 2).sqrt()[:, None, :]
    return good, values, torch.linalg.solve_triangular(factor.mT, rotation, upper=True)


def tail_mean(eigenvalues: Tensor, trace: Tensor, dim: int) -> Tensor:
    r""":math:`\mu_r`, the mean of the eigenvalues that rank r leaves out, for every r.

    Args:
        eigenvalues: s, descending, (B, k).
        trace: (B,).
        dim: d.

    Returns:
        (B, k + 1), for r = 0 .. k; 0 for r = d.
    """
    k = eigenvalues.shape[-1]
    left = dim - torch.arange(k + 1, device=eigenvalues.device)
    return _remainder(eigenvalues, trace, dim) / left.clamp(min=1)


def coefficients(
    eigenvalues: Tensor, trace: Tensor, damping: Tensor, dim: int, rank: int | Tensor
) -> tuple[Tensor, Tensor]:
    r"""What the update :math:`\hat M = (G - G U \operatorname{diag}(c) U^\top) / \lambda'` needs.

    Args:
        eigenvalues: s, descending, (B, k).
        trace: (B,).
        damping: :math:`\lambda`, positive, (B,).
        dim: d.
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


def relative_error(eigenvalues: Tensor, trace: Tensor, damping: Tensor, dim: int) -> Tensor:
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
        dim: d.

    Returns:
        (B, k + 1), for r = 0 .. k. NaN where the trace is 0.
    """
    k = eigenvalues.shape[-1]
    # In units of the trace: squares of 1 / lambda would overflow in float32.
    eigenvalues, damping, trace = eigenvalues / trace[:, None], damping / trace, trace / trace
    lam, mu, s = damping[:, None, None], tail_mean(eigenvalues, trace, dim)[..., None], eigenvalues[:, None, :]
    outside, ceiling = _remainder(eigenvalues, trace, dim)[:, None, -1:], _ceiling(eigenvalues)[:, None, None]
    skipped = torch.arange(k, device=s.device) >= torch.arange(k + 1, device=s.device)[:, None]
    known = (skipped * s * _inverse_error(s, mu, lam) ** 2).sum(-1, keepdim=True)
    high, low = _inverse_error(ceiling, mu, lam) ** 2, (mu / (lam * (lam + mu))) ** 2
    slope = mu + 3 * lam
    peak = 2 * mu * lam / (slope + (slope**2 + 4 * mu * lam).sqrt())  # of sigma e(sigma)^2 below mu
    hump = torch.minimum((dim - k) * peak * _inverse_error(peak, mu, lam) ** 2, outside * (low - high).clamp(min=0))
    norm = (s / (s + lam) ** 2).sum(-1, keepdim=True) + outside / (ceiling + lam) ** 2
    return ((known + outside * high + hump) / norm).sqrt()[..., 0]


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


def _ceiling(eigenvalues: Tensor) -> Tensor:
    """What the eigenvalues outside are taken not to exceed, (B,)."""
    return eigenvalues[:, max(int(TRUSTED * eigenvalues.shape[-1]), 1) - 1]


def _remainder(eigenvalues: Tensor, trace: Tensor, dim: int) -> Tensor:
    """The trace outside the first r directions, (B, k + 1); rounding makes it neither negative nor more than 0 at d."""
    remainder = (trace[:, None] - F.pad(eigenvalues, (1, 0)).cumsum(-1)).clamp(min=0)
    return torch.where(torch.arange(remainder.shape[-1], device=trace.device) < dim, remainder, 0)
