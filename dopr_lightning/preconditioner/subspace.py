r"""The low-rank solver's mathematics: which few directions of a covariance matter, and what is lost without the rest.

Damping relative to the trace, :math:`\lambda = \gamma \operatorname{tr} \Sigma`, leaves fewer than :math:`1/\gamma`
eigenvalues above :math:`\lambda` whatever the width, and in practice one or two tens. With U the r leading
eigenvectors, s their eigenvalues and :math:`\mu = (\operatorname{tr} \Sigma - \sum_i s_i) / (d - r)` the mean of the
others,

.. math:: \hat M = G \left(U \operatorname{diag}(s) U^\top + \mu (I - U U^\top) + \lambda I\right)^{-1}
          = (G - G\, U \operatorname{diag}(c)\, U^\top) / \lambda', \quad
          \lambda' = \lambda + \mu, \quad c_i = 1 - \frac{\lambda'}{s_i + \lambda}.

:math:`\Sigma`, of d^2 numbers, is never formed. A refresh takes the image :math:`\Sigma V`, where V is the last U with
a few vectors drawn anew (:func:`probe`); :func:`nystrom` makes the next U of it, and
:func:`~.certificate.relative_error` says what the approximation costs.

Everything is pure and batched over a leading dimension B of covariances, of one size where matrices with d rows are
concerned. What is k x k or less is done on the host: an eigenproblem of that size takes a few tenths of a millisecond
there and 2 on an H200, where each of the small operators around it costs a launch besides. Calibrated by
``benchmarks/rank_and_error.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dopr_lightning.preconditioner.threads import pinned, side_by_side, threads

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

WORTH_A_THREAD = 4 * 48**3
"""k^3 of the eigenproblems that are solved before another thread has begun (measured, four of 48 x 48)."""


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
    gaussian = torch.randn(blocks, dim, min(rank, dim), generator=generator, dtype=torch.float64, device="cpu")
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
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(dim, new, generator=generator, device="cpu") / dim**0.5
    fresh = pinned(random.to(basis.dtype), basis.device).to(basis.device, non_blocking=True)
    return torch.cat([basis[..., : k - new], fresh.expand(blocks, -1, -1)], dim=-1)


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


def core_eigenpairs(core_and_gram: Tensor, valid: Tensor, *, workers: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    r"""What is k x k of :func:`nystrom`, on the host and in float64.

    Args:
        core_and_gram: What :func:`products` returns, (2, B, k, k).
        valid: Blocks to look at, (B,).
        workers: Threads that share the eigenproblems, where the host has nothing else to do meanwhile.

    Returns:
        Eigenvalues of the approximation in units of the trace, descending, at least 0, (B, k); the matrices R with
        which U is Y R, (B, k, k); and which blocks can be trusted, (B,).
    """
    core, gram = core_and_gram
    worth = gram.numel() * gram.shape[-1] // WORTH_A_THREAD
    count = min(workers, worth)
    with threads(1):  # more of them take longer, with matrices as small as these
        factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
        # NaN and infinity are not positive definite either; where only the image has them, the sum of its squares does.
        good = valid & (info == 0) & gram.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
        if not good.all():
            # One bad block would make the whole batched call raise, so bad ones go on as blocks of the identity.
            identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
            factor = torch.where(good[:, None, None], factor, identity)
            gram = torch.where(good[:, None, None], gram, identity)
        # With root = Y factor^-T the approximation is root root^T, and root^T root has its eigenvalues.
        half = torch.linalg.solve_triangular(factor, gram, upper=False)
        small = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
        values, rotation = side_by_side(torch.linalg.eigh, (small + small.mT) / 2, count)
        values, rotation = values.flip(-1), rotation.flip(-1)
        rotation = rotation / values.clamp(min=SHIFT / 2).sqrt()[:, None, :]
        rotation = torch.linalg.solve_triangular(factor.mT, rotation, upper=True)
    return (values - SHIFT).clamp(min=0), rotation, good
