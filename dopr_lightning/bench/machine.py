"""How fast is this machine at what the preconditioner does?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dopr_lightning.preconditioner.inverse import damped_cholesky
from dopr_lightning.preconditioner.lowrank import add_rows
from dopr_lightning.preconditioner.stack import subtract_low_rank
from dopr_lightning.preconditioner.subspace import core_eigenpairs, nystrom, random_basis

TRACKED = 48
"""Columns of the skinny products: what the low-rank solver starts with."""

RANKS = (16, 32, 48, 64)
"""Directions of the low-rank updates and statistics that are timed: what layers use."""

REPEATS = 9
"""Of each measurement, of which the median counts."""

COLD = 1 << 25
"""Bytes that no core's own cache holds."""

BUSY = 4096
"""Size of matrices that keep a GPU busy for longer than the host takes to ask for the next."""

ROWS = 2048
"""At a time, of the inputs whose statistics are timed: of a batch, in part."""

MAPS = (64, 128, 64)
"""The convolution's input that is rearranged: samples, channels, positions. On a CPU those of a 1-D U-Net, which are
fewer, are rearranged somewhat faster, and images half as fast."""

KERNEL = 5
"""Taps of the convolution whose gradient is rearranged: the 1-D U-Net's."""

EIGENPROBLEMS = 8
"""At a time, as many as a small policy has layers."""

LAYER_CALLS = 16
"""Small operators in a row between large products: what a layer takes at every step, finding the gradient, one or two
products, putting it back."""


@dataclass(frozen=True)
class Rates:
    """What the cost model multiplies FLOPs and bytes with.

    Attributes:
        square: FLOP/s of float32 products of square matrices: what the FLOP floor assumes of everything.
        skinny: FLOP/s of float32 products with few columns, as the low-rank solver's rewrites have them: of one column
            more.
        touch: Seconds per entry of a gradient that a low-rank update takes besides: reading and writing it.
        read: The same of a layer's input, whose statistics the low-rank solver takes.
        factor: FLOP/s of Cholesky factors, d^3 / 3 each.
        inverse: FLOP/s of inverses from them, 2 d^3 / 3 each.
        nystrom: FLOP/s of one Nystrom step, 8 d k^2, in float64.
        small: Seconds of one Nystrom step beyond its products, k x k Cholesky and eigenvalues, at k = 48, among many.
        bandwidth: Bytes/s of copies, reads and writes both counted.
        strided: The same of copies between a kernel's layout and a matrix with its channels side by side.
        rearranged: The same of copies of a convolution's input to rows with its channels side by side.
        call: Seconds of one small operator on the host, which Python and the dispatcher take, among others after a
            large product: on a CPU some times what it takes in a tight loop, whose code and data the cache holds.
        network: Bytes/s at which one rank sends and receives; None where there is but one.
        latency: Seconds of one collective beyond its bytes.
        overlap: The host runs ahead of the device, which is a GPU.
    """

    square: float
    skinny: float
    touch: float
    read: float
    factor: float
    inverse: float
    nystrom: float
    small: float
    bandwidth: float
    strided: float
    rearranged: float
    call: float
    network: float | None = None
    latency: float = 0.0
    overlap: bool = False


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_rates(device: torch.device, dim: int = 1024) -> Rates:
    """Measure, in about a second.

    Args:
        device: Where.
        dim: Of the products' matrices: near the widest of the model that is judged, since caches matter. A GPU has at
            least :data:`BUSY`.
    """

    def seconds(function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """The median; ``before`` runs ahead of each, untimed."""
        function()
        times = []
        for _ in range(REPEATS):
            before()
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    overlap = device.type != "cpu"
    dim = max(dim, BUSY) if overlap else dim
    a, b = normal(dim, dim), normal(dim, dim)
    square = 2 * dim**3 / seconds(lambda: torch.mm(a, b))

    def line(height: int, use: Callable[[int], Callable[[Tensor], object]], least: float) -> tuple[float, float]:
        """Seconds per entry of a matrix (1, height, dim), by columns that it is multiplied with: slope and intercept.

        Products with few columns are no faster than ``least`` per column.
        """
        # Many in turn: a real one was written a while ago and is in no core's cache.
        cold = [normal(1, height, dim) for _ in range(max(4, COLD // (4 * height * dim)))]

        def per_entry(columns: int) -> float:
            once = use(columns)
            return seconds(lambda: [once(matrix) for matrix in cold]) / len(cold) / height / dim

        taken = {columns: per_entry(columns) for columns in RANKS}
        # Rounding and noise aside.
        slope = max(statistics.linear_regression(list(taken), list(taken.values())).slope, least)
        return slope, max(0.0, statistics.mean(taken.values()) - slope * statistics.mean(RANKS))

    def update(rank: int) -> Callable[[Tensor], object]:
        left, right = normal(1, dim, rank), normal(1, rank, dim) / dim
        return lambda gradient: subtract_low_rank(gradient, left, right, 0.5)

    def count(tracked: int) -> Callable[[Tensor], object]:
        return partial(add_rows, test=normal(1, tracked, dim), image=normal(1, tracked, dim), trace=normal(1))

    slope, touch = line(dim, update, least=4 / square)
    skinny = 4 / slope
    _, read = line(ROWS, count, least=slope)
    size = min(dim, 512)
    matrix = torch.eye(size, device=device)[None]
    cholesky = torch.linalg.cholesky(matrix)
    undamped = torch.zeros(1, device=device)
    factor = size**3 / 3 / seconds(lambda: damped_cholesky(matrix.clone(), undamped))
    inverse = 2 * size**3 / 3 / seconds(lambda: torch.cholesky_inverse(cholesky))

    def renewal(height: int) -> float:
        basis = random_basis(1, height, TRACKED, seed=0, device=device, dtype=torch.float32)
        image = basis * torch.linspace(1, 0.1, TRACKED, device=device)
        trace = torch.full((1,), float(TRACKED), device=device)
        return seconds(lambda: nystrom(basis, image, trace))

    nystrom_rate = 8 * (2048 - 64) * TRACKED**2 / max(renewal(2048) - renewal(64), 1e-9)
    x = normal(1 << 27 if overlap else 1 << 23)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / seconds(lambda: y.copy_(x))
    kernel = normal(4096 if overlap else 512, 512, KERNEL)
    strided = 4 * kernel.nbytes / seconds(lambda: kernel.copy_(kernel.mT.contiguous().mT))
    maps = normal(*((64, 512, 1024) if overlap else MAPS))
    rearranged = 2 * maps.nbytes / seconds(lambda: maps.mT.reshape(-1, maps.shape[1]), before=lambda: y.add_(x))
    one = torch.ones(1)
    call = seconds(lambda: [one.mul_(1) for _ in range(LAYER_CALLS)], before=lambda: torch.mm(a, b)) / LAYER_CALLS
    cores, valid = _cores(), torch.ones(EIGENPROBLEMS, dtype=torch.bool)
    workers = torch.get_num_threads() if overlap else 1
    small = (
        seconds(lambda: core_eigenpairs(cores, valid, workers=workers), before=lambda: torch.mm(a, b)) / EIGENPROBLEMS
    )
    return Rates(
        square,
        skinny,
        touch,
        read,
        factor,
        inverse,
        nystrom_rate,
        small,
        bandwidth,
        strided,
        rearranged,
        call,
        overlap=overlap,
    )


def _cores() -> Tensor:
    """What the low-rank solver knows of covariances whose eigenvalues fall a thousandfold, each in its own basis."""
    values = torch.logspace(0, -3, TRACKED, dtype=torch.float64)
    bases = random_basis(EIGENPROBLEMS, TRACKED, TRACKED, seed=0, dtype=torch.float64)
    core = (bases * values) @ bases.mT
    return torch.stack([core, core @ core])
