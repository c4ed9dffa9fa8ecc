"""Subspaces: the strongest directions of large Gram matrices by filtered subspace iteration.

An eigendecomposition of 4,096 channels takes a GPU a tenth of a second, nearly all of it for
directions that nobody keeps. A block of vectors that is multiplied with the matrix and made
orthonormal again turns into the strongest directions, and the eigenvectors of a small matrix put
them in order (Halko et al., arXiv:0909.4061). Where many directions are about as strong as the last
one kept, Chebyshev polynomials tell them apart in fewer products than powers (Zhou et al., J.
Comput. Phys. 219, 2006).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

SMALL = 1024  # channels up to which an eigendecomposition is as fast
SPARE = 1.5  # vectors of a block for each one kept: what is left over makes the others converge
ROUNDS, DEGREE = 2, 16  # filters, and products of one at most
REACH = 1e5  # how much more the strongest direction may grow than the weakest in one filter


def pays(gram: Tensor, rank: int) -> bool:
    """Whether an iteration is faster than an eigendecomposition of a Gram matrix [*, w, w]."""
    width = gram.shape[-1]
    return gram.device.type == "cuda" and width > SMALL and rank * SPARE <= width / 2


def quick_gram(x: Tensor) -> Tensor:
    """The sums of x x^T [*, w, w] over tokens of x [*, T, w] on a GPU, by its tensor cores: of 16-
    bit numbers exact products, of float32 ones rounded to 11 bits; sums in float32."""
    turned = x.transpose(-1, -2)
    if x.dtype in (torch.bfloat16, torch.float16):
        flat = x.reshape(-1, *x.shape[-2:])
        found = [torch.mm(one.T, one, out_dtype=torch.float32) for one in flat]
        return torch.stack(found).reshape(*x.shape[:-2], *found[0].shape)
    with _tensor_cores():
        product: Tensor = turned @ x
    return product


def strongest(gram: Tensor, rank: int, seed: int = 0) -> Tensor:
    """Orthonormal columns [w, rank], strongest first, that keep as much of the trace of a Gram
    matrix [w, w] as its eigenvectors do, to 1e-4 of it; in float32.

    The same seed gives the same basis on the same machine.
    """
    wide = gram.to(torch.float32)
    wide = wide / wide.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(seed)
    count = min(gram.shape[-1], math.ceil(SPARE * rank / 64) * 64)
    block = torch.randn(gram.shape[-1], count, generator=generator).to(gram.device)
    with _tensor_cores():
        block = wide @ block
        for _ in range(ROUNDS):
            block = _filtered(wide, orthonormal(block))
        block = orthonormal(block)
        image = wide @ block
    inner = block.T @ image
    _, turn = torch.linalg.eigh((inner + inner.T) / 2)
    found: Tensor = block @ turn.flip(-1)[:, :rank]
    return found


def orthonormal(block: Tensor) -> Tensor:
    """Orthonormal columns [w, r] of the same span, by Cholesky factors of the columns' own Gram
    matrix: three times, and the first time shifted, so that columns which are nearly dependent do
    not break it (shifted Cholesky QR 3, arXiv:1809.11085); by reflections where it breaks."""
    eps, tiny = torch.finfo(block.dtype).eps, torch.finfo(block.dtype).tiny
    with _tensor_cores(False):
        for shift in (block.shape[0] * eps, 0.0, 0.0):
            block = block / block.norm(dim=0).clamp_min(tiny)
            inner = block.T @ block
            inner.diagonal().add_(shift)
            factor, failed = torch.linalg.cholesky_ex(inner, upper=True)
            if failed:  # fewer directions than columns
                reflected: Tensor = torch.linalg.qr(block)[0]
                return reflected
            block = torch.linalg.solve_triangular(factor, block, upper=True, left=False)
    return block


def _filtered(gram: Tensor, block: Tensor) -> Tensor:
    """A Chebyshev polynomial of the matrix times the block [w, r]: below the weakest direction of
    the block it is at most one, above that it grows."""
    image = gram @ block
    kept = (block * image).sum(0)
    high, cut = torch.stack([kept.max(), kept.min()]).tolist()
    cut = max(cut, 1e-6 * high, 1e-30)
    growth = math.acosh(max(2 * high / cut - 1, 1 + 1e-6))
    degree = max(1, min(DEGREE, int(math.acosh(REACH) / growth)))
    old: Tensor = block
    new: Tensor = image * (2 / cut) - block
    for _ in range(degree - 1):
        old, new = new, torch.sub((gram @ new).mul_(4 / cut).sub_(new, alpha=2), old)
    return new


@contextmanager
def _tensor_cores(on: bool = True) -> Iterator[None]:
    """Lets a GPU round the factors of float32 products to 11 bits, for a while."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
