"""The low-rank solver's subspace iteration against eigendecompositions in float64."""

import pytest
import torch
from spectra import DIM, converged, covariance, exponential, power_law, rotation
from torch import Tensor

from dopr_lightning.preconditioner.subspace import nystrom, probe, random_basis

SHIFT = 1e-4  # what the stabilising shift may change, in units of the trace


def step(sigma: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One refresh of one covariance (d, d) from V (1, d, k)."""
    return nystrom(basis, sigma @ basis, sigma.trace()[None])


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
