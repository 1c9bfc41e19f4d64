"""The low-rank solver's mathematics against eigendecompositions and inverses in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dopr_lightning.preconditioner.subspace import (
    coefficients,
    nystrom,
    probe,
    random_basis,
    relative_error,
    required_rank,
    tail_mean,
    worst_case_error,
)

DIM = 60
SHIFT = 1e-4  # what the stabilising shift may change, in units of the trace


def rotation(seed: int = 0, dim: int = DIM) -> Tensor:
    return random_basis(1, dim, dim, seed=seed, dtype=torch.float64)[0]


def covariance(spectrum: Tensor, seed: int = 0) -> Tensor:
    vectors = rotation(seed, len(spectrum))
    return vectors * spectrum @ vectors.T


def power_law(exponent: float, dim: int = DIM) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float64) ** -exponent


def exponential(dim: int = DIM) -> Tensor:
    return 0.8 ** torch.arange(dim, dtype=torch.float64)


def step(sigma: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One refresh of one covariance (d, d) from V (1, d, k)."""
    return nystrom(basis, sigma @ basis, sigma.trace()[None])


def converged(sigma: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors (1, d, k) and eigenvalues (1, k), by an eigendecomposition."""
    values, vectors = torch.linalg.eigh(sigma)
    return vectors.flip(-1)[None, :, :rank], values.flip(-1)[None, :rank]


def approximate(gradient: Tensor, basis: Tensor, c: Tensor, rest: Tensor) -> Tensor:
    return (gradient - gradient @ basis[0] * c[0] @ basis[0].T) / rest[0]


def exact(gradient: Tensor, sigma: Tensor, damping: Tensor) -> Tensor:
    return gradient @ torch.linalg.inv(sigma + damping * torch.eye(len(sigma), dtype=sigma.dtype))


def assert_orthonormal(basis: Tensor, tolerance: float) -> None:
    identity = torch.eye(basis.shape[-1], dtype=basis.dtype).expand(len(basis), -1, -1)
    torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=tolerance)


def test_a_random_basis_is_orthonormal_reproducible_and_no_larger_than_the_space() -> None:
    basis = random_basis(3, 20, 6, seed=1, dtype=torch.float32)
    assert basis.shape == (3, 20, 6)
    assert basis.dtype == torch.float32
    assert_orthonormal(basis, 1e-6)
    assert torch.equal(basis, random_basis(3, 20, 6, seed=1, dtype=torch.float32))
    assert not torch.allclose(basis, random_basis(3, 20, 6, seed=2, dtype=torch.float32))
    assert random_basis(2, 4, 6, seed=1, dtype=torch.float32).shape == (2, 4, 4)


def test_nystrom_is_the_textbook_formula() -> None:
    sigma, basis = covariance(power_law(1.0)), random_basis(1, DIM, 12, seed=3, dtype=torch.float64)
    new, values, good = step(sigma, basis)
    image = sigma @ basis[0]
    expected = image @ torch.linalg.pinv(basis[0].T @ image) @ image.T
    assert good.all()
    assert_orthonormal(new, 1e-12)
    assert (values[:, :-1] >= values[:, 1:]).all()
    torch.testing.assert_close(new[0] * values[0] @ new[0].T, expected, rtol=0, atol=SHIFT * float(sigma.trace()))


def test_nystrom_keeps_eigenvectors_and_finds_their_eigenvalues() -> None:
    sigma = covariance(power_law(1.5))
    vectors, values = converged(sigma, 10)
    mixed = vectors @ rotation(5, 10)
    new, found, _ = step(sigma, mixed)
    torch.testing.assert_close(found, values, rtol=1e-9, atol=0)
    torch.testing.assert_close((new.mT @ vectors).abs()[0], torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("spectrum", [power_law(1.0), exponential(), torch.ones(DIM, dtype=torch.float64)])
def test_nystrom_never_overestimates_and_knows_the_trace_it_leaves_out(spectrum: Tensor) -> None:
    sigma = covariance(spectrum)
    new, values, _ = step(sigma, random_basis(1, DIM, 8, seed=0, dtype=torch.float64))
    assert (values[0] <= spectrum[:8] * (1 + 1e-9)).all()
    left_out = sigma - new[0] * values[0] @ new[0].T
    assert float(torch.linalg.eigvalsh(left_out)[0]) >= -SHIFT * float(sigma.trace())
    torch.testing.assert_close(left_out.trace(), sigma.trace() - values.sum())


def test_repeated_steps_converge_at_the_rate_of_subspace_iteration() -> None:
    spectrum = exponential()
    sigma, basis = covariance(spectrum), random_basis(1, DIM, 10, seed=0, dtype=torch.float64)
    target, errors = converged(sigma, 3)[0], []
    for _ in range(6):
        basis, values, _ = step(sigma, basis)
        errors.append(float(torch.linalg.matrix_norm(target - basis @ (basis.mT @ target), 2)))
    # The third direction against the eleventh: 0.8^8 = 0.17 per step.
    assert errors[-1] < 0.25**5 * errors[0]
    torch.testing.assert_close(values[0, :3], spectrum[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_rows_than_vectors(dtype: torch.dtype) -> None:
    rows = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = rows.T @ rows / 5
    basis = random_basis(1, DIM, 16, seed=0, dtype=dtype)
    new, values, good = nystrom(basis, (sigma @ basis.double()).to(dtype), sigma.trace()[None].to(dtype))
    assert good.all()
    assert_orthonormal(new, 1e-5)
    expected = torch.linalg.eigvalsh(sigma).flip(0)[:16].to(dtype)
    torch.testing.assert_close(values[0], expected, rtol=0, atol=3 * SHIFT * float(sigma.trace()))


def test_one_step_is_exact_when_the_vectors_span_the_space() -> None:
    sigma = covariance(power_law(0.5, 9))
    new, values, _ = step(sigma, probe(random_basis(1, 9, 20, seed=0, dtype=torch.float64), seed=0))
    torch.testing.assert_close(new[0] * values[0] @ new[0].T, sigma, rtol=0, atol=1e-9)


def test_the_scale_of_the_data_does_not_matter() -> None:
    sigma, basis = covariance(power_law(1.0)), random_basis(1, DIM, 8, seed=0, dtype=torch.float64)
    plain = step(sigma, basis)
    for scale in (1e-30, 1e30):
        scaled = step(scale * sigma, basis)
        assert scaled[2].all()
        torch.testing.assert_close(scaled[0].abs(), plain[0].abs())
        torch.testing.assert_close(scaled[1], scale * plain[1])


def to_tf32(x: Tensor) -> Tensor:
    """Float32 with 10 bits of mantissa: what a GPU multiplies under matmul precision "high"."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_rows_rounded_by_the_gpu_do_not_break_the_factorisation() -> None:
    # The core U^T Sigma U loses symmetry and definiteness at 1e-3 of its small eigenvalues.
    rows = torch.randn(256, DIM, generator=torch.Generator().manual_seed(0)) * power_law(1.5).sqrt().float()
    basis = random_basis(1, DIM, 32, seed=0, dtype=torch.float32)
    trace = rows.square().sum()[None] / 256
    for _ in range(8):
        scores = to_tf32(to_tf32(rows) @ to_tf32(basis))
        basis, values, good = nystrom(basis, to_tf32(rows).T @ scores / 256, trace)
        assert good.all()
        assert_orthonormal(basis, 1e-5)
    expected = torch.linalg.eigvalsh(rows.double().T @ rows.double() / 256).flip(0)[:10].float()
    torch.testing.assert_close(values[0, :10], expected, rtol=5e-3, atol=0)


def test_bad_blocks_neither_raise_nor_disturb_the_others() -> None:
    sigma = covariance(power_law(1.0))
    basis = random_basis(6, DIM, 8, seed=0, dtype=torch.float64)
    image, trace = sigma @ basis, sigma.trace().expand(6).clone()
    image[1, 0, 0] = torch.nan
    image[2, 3, 4] = torch.inf
    image[3] = 0.0
    trace[3] = 0.0
    image[4] = -image[4]
    trace[4] = torch.nan
    image[5] = -image[5]
    new, values, good = nystrom(basis, image, trace)
    assert good.tolist() == [True, False, False, False, False, False]
    assert (values[1:] == 0).all()
    assert_orthonormal(new, 1e-9)
    alone = nystrom(basis[:1], image[:1], trace[:1])
    torch.testing.assert_close(new[:1], alone[0])
    torch.testing.assert_close(values[:1], alone[1])


def test_probe_draws_the_last_vectors_anew_the_same_for_all_blocks() -> None:
    basis = random_basis(2, DIM, 16, seed=0, dtype=torch.float32)
    vectors = probe(basis, seed=1)
    assert torch.equal(vectors[..., :14], basis[..., :14])
    assert torch.equal(vectors[0, :, 14:], vectors[1, :, 14:])
    assert torch.linalg.matrix_rank(vectors).tolist() == [16, 16]
    assert torch.equal(vectors, probe(basis, seed=1))
    assert not torch.allclose(vectors[..., 14:], probe(basis, seed=2)[..., 14:])


def test_probe_finds_a_direction_that_the_subspace_is_blind_to() -> None:
    spectrum = power_law(1.0)
    sigma = covariance(spectrum)
    basis, _ = converged(sigma, 16)
    unseen = rotation()[:, -1]  # an eigenvector outside, which becomes the leading one
    moved = sigma + 10 * torch.outer(unseen, unseen)
    blind, _, _ = step(moved, basis)
    assert float((blind[0].T @ unseen).norm()) < 1e-6
    seen, values, _ = step(moved, probe(basis, seed=0))
    assert float((seen[0].T @ unseen).norm()) > 0.9
    assert float(values[0, 0]) > 5


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


@pytest.mark.parametrize("certificate", [relative_error, worst_case_error])
def test_the_certificates_do_not_depend_on_the_scale(certificate: Callable[..., Tensor]) -> None:
    spectrum = power_law(1.0).float()
    expected = certificate(spectrum[None, :16], spectrum.sum()[None], 0.01 * spectrum.sum()[None], DIM)
    for scale in (1e-30, 1e30):
        scaled = scale * spectrum
        found = certificate(scaled[None, :16], scaled.sum()[None], 0.01 * scaled.sum()[None], DIM)
        torch.testing.assert_close(found, expected)


def test_the_certificate_is_zero_at_full_rank() -> None:
    spectrum = power_law(1.0, 8)
    trace = spectrum.sum()[None]
    for certificate in (relative_error, worst_case_error):
        errors = certificate(spectrum[None], trace, 0.01 * trace, 8)[0]
        assert errors.shape == (9,)
        assert float(errors[8]) < 1e-6 < 1e-3 < float(errors[6])


def test_no_gradient_exceeds_the_worst_case_and_one_attains_it() -> None:
    spectrum = exponential()
    sigma, trace = torch.diag(spectrum), spectrum.sum()[None]
    damping = 0.01 * trace
    bound = worst_case_error(spectrum[None, :16], trace, damping, DIM)[0]
    basis = torch.eye(DIM, dtype=torch.float64)[None, :, :16]
    gradients = [*torch.eye(DIM, dtype=torch.float64)[:, None], torch.randn(5, DIM, dtype=torch.float64)]
    for rank in range(17):
        c, rest = coefficients(spectrum[None, :16], trace, damping, DIM, rank)
        errors = []
        for gradient in gradients:
            truth = exact(gradient, sigma, damping)
            errors.append(float((approximate(gradient, basis, c, rest) - truth).norm() / truth.norm()))
        assert max(errors) <= float(bound[rank]) * (1 + 1e-9)
        if rank < 16:  # beyond, the next eigenvalue is not known but bounded
            assert max(errors) == pytest.approx(float(bound[rank]))


def test_required_rank_is_the_smallest_within_the_tolerance() -> None:
    error = torch.tensor([[0.9, 0.5, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.6], [torch.nan] * 4])
    assert required_rank(error, 0.2).tolist() == [2, 0, 4, 4]
    assert required_rank(error, 0.6).tolist() == [1, 0, 3, 4]
