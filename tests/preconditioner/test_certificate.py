"""What the low-rank solver knows of its error, against inverses in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from spectra import DIM, approximate, converged, covariance, exact, exponential, power_law
from torch import Tensor

from dopr_lightning.preconditioner import certificate


def on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays, which others than arrays pass through, as one of tensors."""

    @wraps(function)
    def wrapped(*arguments: Any) -> Any:
        result = function(*(x.numpy() if isinstance(x, Tensor) else x for x in arguments))
        return torch.from_numpy(result) if isinstance(result, np.ndarray) else tuple(map(torch.from_numpy, result))

    return wrapped


coefficients = on_tensors(certificate.coefficients)
relative_error = on_tensors(certificate.relative_error)
required_rank = on_tensors(certificate.required_rank)
tail_mean = on_tensors(certificate.tail_mean)


def test_tail_mean_of_every_rank() -> None:
    spectrum = power_law(1.0, 6)
    means = tail_mean(spectrum[None], spectrum.sum()[None], 6)[0]
    expected = [float(spectrum[r:].mean()) for r in range(6)] + [0.0]
    torch.testing.assert_close(means, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_update_is_exact_when_the_rest_of_the_spectrum_is_flat() -> None:
    spectrum = torch.cat([torch.tensor([5.0, 3.0, 1.0]), torch.full((DIM - 3,), 0.2)]).double()
    sigma, gradient = covariance(spectrum), torch.randn(7, DIM, dtype=torch.float64)
    damping = 0.01 * sigma.trace()[None]
    basis, values = converged(sigma, 8)
    for rank in (3, 5, 8):
        c, rest = coefficients(values, sigma.trace()[None], damping, DIM, rank)
        assert (c[0, rank:] == 0).all()
        torch.testing.assert_close(approximate(gradient, basis, c, rest), exact(gradient, sigma, damping))


def test_the_update_is_exact_at_full_rank() -> None:
    sigma, gradient = covariance(power_law(1.0, 10)), torch.randn(7, 10, dtype=torch.float64)
    damping = 0.01 * sigma.trace()[None]
    basis, values = converged(sigma, 10)
    c, rest = coefficients(values, sigma.trace()[None], damping, 10, 10)
    torch.testing.assert_close(approximate(gradient, basis, c, rest), exact(gradient, sigma, damping))


def test_each_block_has_its_own_rank() -> None:
    values = power_law(1.0)[:8].expand(3, -1)
    trace, damping = power_law(1.0).sum().expand(3), torch.full((3,), 0.05, dtype=torch.float64)
    together = coefficients(values, trace, damping, DIM, torch.tensor([0, 4, 8]))
    for block, rank in enumerate((0, 4, 8)):
        alone = coefficients(values[:1], trace[:1], damping[:1], DIM, rank)
        torch.testing.assert_close(together[0][block], alone[0][0])
        torch.testing.assert_close(together[1][block], alone[1][0])


def white_error(spectrum: Tensor, damping: Tensor, rank: int) -> float:
    """The relative error with |G u_j|^2 proportional to sigma_j, from the matrices themselves."""
    sigma = torch.diag(spectrum)
    gradient = sigma.sqrt()
    c, rest = coefficients(spectrum[None], spectrum.sum()[None], damping, len(spectrum), rank)
    basis = torch.eye(len(spectrum), dtype=spectrum.dtype)[None]
    truth = exact(gradient, sigma, damping)
    return float((approximate(gradient, basis, c, rest) - truth).norm() / truth.norm())


def test_the_certificate_is_the_error_where_its_bound_is_attained() -> None:
    # The last quarter of the known eigenvalues equals the ceiling; so do ten of the rest, and what remains is 0.
    known = torch.cat([power_law(1.0, 12), torch.full((4,), 1 / 12)]).double()
    spectrum = torch.cat([known, torch.full((10,), 1 / 12), torch.zeros(300)]).double()
    trace = spectrum.sum()[None]
    damping = 0.01 * trace
    certified = relative_error(known[None], trace, damping, len(spectrum))[0]
    for rank in range(17):
        assert float(certified[rank]) == pytest.approx(white_error(spectrum, damping, rank), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("spectrum", [power_law(0.5), power_law(1.0), power_law(2.0), exponential()])
def test_the_certificate_bounds_the_error_without_being_vacuous(spectrum: Tensor, gamma: float) -> None:
    trace = spectrum.sum()[None]
    damping = gamma * trace
    certified = relative_error(spectrum[None, :24], trace, damping, DIM)[0]
    errors = torch.tensor([white_error(spectrum, damping, rank) for rank in range(25)], dtype=torch.float64)
    assert (certified >= errors * (1 - 1e-9)).all()
    if gamma * DIM > 1:  # else the damping is below the mean eigenvalue and low rank is the wrong solver
        assert (certified <= (3.5 * errors).clamp(min=0.15)).all()


def test_blocks_of_several_sizes_are_certified_as_each_alone() -> None:
    dims = torch.tensor([DIM, 24, 16])  # the last one's directions are all of them
    spectra = [power_law(1.0, int(d)) for d in dims]
    trace = torch.stack([spectrum.sum() for spectrum in spectra])
    leading = torch.stack([spectrum[:16] for spectrum in spectra])
    rank = torch.tensor([3, 16, 9])
    together = (
        relative_error(leading, trace, 0.01 * trace, dims),
        *coefficients(leading, trace, 0.01 * trace, dims, rank),
    )
    for block, dim in enumerate(dims.tolist()):
        one = slice(block, block + 1)
        arguments = leading[one], trace[one], 0.01 * trace[one], dim
        for all_, alone in zip(
            together, (relative_error(*arguments), *coefficients(*arguments, rank[one])), strict=True
        ):
            torch.testing.assert_close(all_[one], alone, rtol=1e-12, atol=0)


def test_the_certificate_does_not_depend_on_the_scale() -> None:
    spectrum = power_law(1.0).float()
    expected = relative_error(spectrum[None, :16], spectrum.sum()[None], 0.01 * spectrum.sum()[None], DIM)
    for scale in (1e-30, 1e30):
        scaled = scale * spectrum
        found = relative_error(scaled[None, :16], scaled.sum()[None], 0.01 * scaled.sum()[None], DIM)
        torch.testing.assert_close(found, expected)


def test_the_certificate_is_zero_at_full_rank() -> None:
    spectrum = power_law(1.0, 8)
    trace = spectrum.sum()[None]
    errors = relative_error(spectrum[None], trace, 0.01 * trace, 8)[0]
    assert errors.shape == (9,)
    assert float(errors[8]) < 1e-6 < 1e-3 < float(errors[6])


def test_required_rank_is_the_smallest_within_the_tolerance() -> None:
    error = torch.tensor([[0.9, 0.5, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.6], [torch.nan] * 4])
    assert required_rank(error, 0.2).tolist() == [2, 0, 4, 4]
    assert required_rank(error, 0.6).tolist() == [1, 0, 3, 4]
