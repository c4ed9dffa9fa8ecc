"""Turns heads by a Hadamard matrix, which spreads outliers over
all channels (QuaRot, arXiv:2404.00456)."""

import math
from functools import cache
from itertools import product

import torch
from torch import Tensor

from kvtune.parts import Code, Codec, Fold, Site

_PALEY = {12: 11, 20: 19}  # order, and the prime that it is built of


class Hadamard(Codec):
    """x H / sqrt(D) with an orthonormal matrix of plus and minus ones, and back by its transpose.

    Heads of 1, 12 or 20 times a power of two channels have one: Sylvester's matrix times one of
    Paley's. The turn is exact, so this part alone changes nothing and saves nothing; it pays before
    a quantiser whose groups lie along the channels.
    """

    linear = True

    def check(self, head_dim: int, side: str) -> None:
        """There is a matrix of the head's size."""
        if _core(head_dim) is None:
            raise ValueError(
                f"hadamard turns 1, 12 or 20 times a power of two channels: head_dim {head_dim} "
                "is none of them"
            )

    def fold(self, site: Site, heads: int, head_dim: int) -> Fold:
        """The matrix itself, for every head."""
        turn = _turned(torch.eye(head_dim), inverse=False).expand(heads, -1, -1)
        return Fold(torch.zeros(heads, head_dim), turn, turn.transpose(-1, -2))

    def encode(self, x: Tensor, site: Site) -> Code:
        """Returns the turned x [B, H, T, D]."""
        return Code(_turned(x, inverse=False).to(x.dtype))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns x [B, H, T, D], turned back."""
        return _turned(code.body, inverse=True).to(site.dtype)


def _core(size: int) -> int | None:
    """The order, 1, 12 or 20, that is not Sylvester's in a matrix of a size; None without one."""
    for core in (1, 12, 20):
        rest, odd = divmod(size, core)
        if rest > 0 and odd == 0 and rest & (rest - 1) == 0:
            return core
    return None


def _turned(x: Tensor, inverse: bool) -> Tensor:
    """Sums and differences one after the other, so that a token's
    bits do not depend on how many tokens are turned at once, as those of a product would."""
    size = x.shape[-1]
    core = _core(size)
    assert core is not None, "check() refuses other sizes"
    x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], core, -1)
    half = 1
    while half < x.shape[-1]:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    if core > 1:
        x = _by_signs(x, paley(core), inverse)
    return x.flatten(-2) / math.sqrt(size)


def _by_signs(x: Tensor, rows: tuple[tuple[int, ...], ...], inverse: bool) -> Tensor:
    """Returns x [*, n, m] times a matrix [n, n] of signs, or its transpose, along the axis n."""
    signs = tuple(zip(*rows, strict=True)) if inverse else rows
    pieces = x.unbind(-2)
    sums = []
    for row in signs:
        total = torch.zeros_like(pieces[0])
        for sign, piece in zip(row, pieces, strict=True):
            total = total + piece if sign > 0 else total - piece
        sums.append(total)
    return torch.stack(sums, -2)


@cache
def paley(order: int) -> tuple[tuple[int, ...], ...]:
    """Paley's first Hadamard matrix (1933), of order p + 1 for a prime p = 3 mod 4: 12 or 20.

    I + S, where S is skew: a border of ones around the Legendre symbols of i - j.
    """
    prime = _PALEY[order]
    squares = {i * i % prime for i in range(1, prime)}
    rows = [[1] * order, *([-1] + [0] * prime for _ in range(prime))]
    for i, j in product(range(prime), repeat=2):
        rows[i + 1][j + 1] = 1 if i == j or (i - j) % prime in squares else -1
    return tuple(map(tuple, rows))
