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
ROUNDS, DEGREE = 3, 16  # filters, and products of one at most
POWERS, LIFTS, POLISH = 2, 6, 6  # of `spanning`: products, and steps that keep columns apart
MOST, LIFTED = 14, 0.6  # steps at most, and the mean square of what need not be lifted further
QUINTIC = (3.4445, -4.7750, 2.0315)  # y = a x + b x^3 + c x^5 takes singular values close to one
CLOSE = 1e-3  # to one, and to nothing, are the products of its columns
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
    count = min(gram.shape[-1], math.ceil(SPARE * rank / 64) * 64)
    wide, block = _begun(gram, count, seed)
    with _tensor_cores():
        for _ in range(ROUNDS):
            block = _filtered(wide, orthonormal(block, passes=1))
        block = orthonormal(block)
        image = wide @ block
    inner = block.T @ image
    # in float64, since torch takes a GPU's slower Jacobi method for up to 512 float32 columns
    _, turn = torch.linalg.eigh((inner + inner.T).double())
    found: Tensor = block @ turn.flip(-1)[:, :rank].float()
    return found


def spanning(gram: Tensor, rank: int, seed: int = 0) -> Tensor:
    """Orthonormal columns [w, rank] in no order, which leave at most a twentieth more of the trace
    of a Gram matrix [w, w] than its eigenvectors do; in float32.

    Powers of the matrix times a random block, without the eigenvectors of a small matrix that
    `strongest` puts its columns in order with. Between powers products alone keep columns apart
    (Newton and Schulz), as a GPU takes long over factors of a few hundred columns.
    """
    wide, block = _begun(gram, rank, seed)
    for _ in range(POWERS):
        block = _apart(block)
        with _tensor_cores():
            block = wide @ block
    block = _apart(block)
    for _ in range(POLISH):
        inner = block.T @ block
        block = torch.addmm(block, block, inner, beta=1.5, alpha=-0.5)
    inner = block.T @ block
    inner.diagonal().sub_(1)
    if not inner.abs().max() < CLOSE:  # fewer directions than columns
        block = orthonormal(block)
    return block


def _begun(gram: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The matrix [w, w] in float32, at a scale of its own, and it times random columns."""
    wide = gram.to(torch.float32)
    wide = wide / wide.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    generator = torch.Generator(gram.device).manual_seed(seed)
    block = torch.randn(gram.shape[-1], count, generator=generator, device=gram.device)
    with _tensor_cores():
        return wide, wide @ block


def _apart(block: Tensor) -> Tensor:
    """Columns [w, r] of the same span, nearly orthonormal where they were apart before: quintic
    steps towards the closest orthonormal matrix, which first of all lift what is small."""
    inner = block.T @ block
    size = inner.norm().clamp_min(torch.finfo(block.dtype).tiny)
    block, inner = block / size.sqrt(), inner / size
    for step in range(MOST):
        with _tensor_cores():  # a rounded turn is a turn within the same span
            if step:
                inner = block.T @ block
            if step >= LIFTS and step % 2 == 0 and inner.diagonal().mean() > LIFTED:
                break
            turn = torch.addmm(inner, inner, inner, beta=QUINTIC[1], alpha=QUINTIC[2])
        block = torch.addmm(block, block, turn, beta=QUINTIC[0])
    return block


def orthonormal(block: Tensor, passes: int = 3) -> Tensor:
    """Orthonormal columns [w, r] of the same span, by Cholesky factors of the columns' own Gram
    matrix: three times, and the first time shifted, so that columns which are nearly dependent do
    not break it (shifted Cholesky QR 3, arXiv:1809.11085); by reflections where it breaks. One pass
    alone makes them about orthonormal, which is enough to go on from."""
    eps, tiny = torch.finfo(block.dtype).eps, torch.finfo(block.dtype).tiny
    with _tensor_cores(False):
        for shift in (block.shape[0] * eps, 0.0, 0.0)[:passes]:
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
