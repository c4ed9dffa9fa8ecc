"""Laws of subspace iteration: it keeps what eigenvectors keep, in order, and is repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtune import spectral, subspace

WIDTH = 384


def matrix(spectrum: str) -> Tensor:
    """A Gram matrix [WIDTH, WIDTH] in float32."""
    generator = torch.Generator().manual_seed(3)
    if spectrum == "noise":
        x = torch.randn(4 * WIDTH, WIDTH, generator=generator)
        return x.T @ x
    i = torch.arange(1, WIDTH + 1, dtype=torch.float64)
    strengths = {
        "flat": torch.ones_like(i),
        "slow": i**-0.5,
        "steady": 1 / i,
        "fast": torch.exp(-i / 20),
        "step": torch.where(i < 30, 1.0, 0.01),
        "outlier": torch.where(i == 1, 1e5, 1 / i),
        "low rank": torch.where(i < 20, 1.0, 0.0),
    }[spectrum]
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    return ((basis * strengths) @ basis.T).float()


def kept(gram: Tensor, basis: Tensor) -> Tensor:
    """What each column [w, r] keeps of the trace."""
    wide = basis.double()
    return (wide * (gram.double() @ wide)).sum(0)


SPECTRA = ("noise", "flat", "slow", "steady", "fast", "step", "outlier", "low rank")


@pytest.mark.parametrize("rank", [16, 48])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_subspace_keeps_what_eigenvectors_keep(spectrum: str, rank: int) -> None:
    gram = matrix(spectrum)
    best = torch.linalg.eigvalsh(gram.double())[-rank:].sum()
    found = kept(gram, subspace.strongest(gram, rank))
    assert found.sum() >= (1 - 1e-4) * best
    assert found.sum() <= (1 + 1e-5) * best


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_its_columns_are_orthonormal_and_the_strongest_come_first(spectrum: str) -> None:
    gram = matrix(spectrum)
    basis = subspace.strongest(gram, 48)
    torch.testing.assert_close(basis.T @ basis, torch.eye(48), atol=2e-5, rtol=0)
    energy = kept(gram, basis)
    assert (energy[1:] <= energy[:-1] + 1e-4 * energy[0]).all()


@pytest.mark.parametrize("rank", [16, 48])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_span_leaves_hardly_more_than_eigenvectors_do(spectrum: str, rank: int) -> None:
    gram = matrix(spectrum)
    whole, best = gram.double().trace(), torch.linalg.eigvalsh(gram.double())[-rank:].sum()
    basis = subspace.spanning(gram, rank)
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=2e-5, rtol=0)
    assert whole - kept(gram, basis).sum() <= 1.1 * (whole - best) + 1e-5 * whole


def test_the_seed_decides_the_basis() -> None:
    gram = matrix("slow")
    assert torch.equal(subspace.strongest(gram, 32, 5), subspace.strongest(gram, 32, 5))
    assert not torch.equal(subspace.strongest(gram, 32, 5), subspace.strongest(gram, 32, 6))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_is_no_matter(scale: float) -> None:
    gram = matrix("steady")
    torch.testing.assert_close(
        kept(gram, subspace.strongest(gram * scale, 32)).sum(),
        kept(gram, subspace.strongest(gram, 32)).sum(),
        rtol=1e-4,
        atol=0,
    )


def test_a_matrix_of_zeros_has_an_orthonormal_basis_too() -> None:
    basis = subspace.strongest(torch.zeros(WIDTH, WIDTH), 16)
    assert bool(basis.isfinite().all())


def test_columns_that_hardly_differ_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(WIDTH, 1, generator=generator)
    block = one + 1e-3 * torch.randn(WIDTH, 24, generator=generator)
    basis = subspace.orthonormal(block)
    torch.testing.assert_close(basis.T @ basis, torch.eye(24), atol=1e-5, rtol=0)
    inside = basis @ (basis.T @ block)
    torch.testing.assert_close(inside, block, atol=1e-4, rtol=1e-4)


def test_small_matrices_and_those_of_a_cpu_are_decomposed() -> None:
    assert not subspace.pays(torch.empty(4096, 4096), 384)
    gram = matrix("steady")
    vectors = torch.linalg.eigh(gram)[1].flip(-1)[:, :16]
    torch.testing.assert_close(spectral.top(gram, 16).abs(), vectors.abs())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_finds_the_directions_of_many_channels_by_iteration(dtype: torch.dtype) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    strengths = torch.arange(1, 2049, device="cuda") ** -0.5
    x = torch.randn(2, 4096, 2048, device="cuda", generator=generator) * strengths
    gram = spectral.gram(x.to(dtype))
    basis = spectral.top(gram, 192)
    for own, found in zip(gram, basis, strict=True):
        best = torch.linalg.eigvalsh(own.double())[-192:].sum()
        assert kept(own, found).sum() >= (1 - 1e-4) * best
