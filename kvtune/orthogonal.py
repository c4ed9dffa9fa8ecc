"""Hadamard matrices of 1, 12 or 20 times a power of two, and turns by them."""

import math
from functools import cache
from itertools import product

import torch
from torch import Tensor

_PALEY = {12: 11, 20: 19}  # order, and the prime that it is built of


def matrix(size: int) -> Tensor:
    """The orthonormal matrix [D, D] itself, in float32."""
    return turned(torch.eye(size), inverse=False)


def core(size: int) -> int | None:
    """The order, 1, 12 or 20, that is not Sylvester's in a matrix of a size; None without one."""
    for order in (1, 12, 20):
        rest, odd = divmod(size, order)
        if rest > 0 and odd == 0 and rest & (rest - 1) == 0:
            return order
    return None


def turned(x: Tensor, inverse: bool) -> Tensor:
    """Returns x [*, D] times the matrix, or its transpose.

    Sums and differences one after the other, so that a token's
    bits do not depend on how many tokens are turned at once, as those of a product would."""
    size = x.shape[-1]
    odd = core(size)
    assert odd is not None, "check() refuses other sizes"
    x = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], odd, -1)
    half = 1
    while half < x.shape[-1]:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    if odd > 1:
        x = _by_signs(x, paley(odd), inverse)
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
