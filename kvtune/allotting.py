"""Bits for the components of a token: groups of neighbours that share a scale, by exact dynamic
programming (KVTC, arXiv:2511.01815)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtune.errors import UsageError

SIZES = (1, 16, 64, 256, 1024)  # components of one token that share a scale
TYPES = (0, 2, 4, 8)  # bits of a component's code
SIDE = 32  # bits of a group's own: a 16-bit scale and a 16-bit shift
ROUNDING = 2.0**-24  # squared relative error that a 16-bit shift leaves of the value it holds

Floats = NDArray[np.float64]
# (energies [w], size, bits) -> the squared error [w - size + 1] of a group by where it begins
Errors = Callable[[Floats, int, int], Floats]


class Group(NamedTuple):
    """So many neighbouring components, at so many bits each; 0 bits: dropped, and nothing stored.

    A group that is stored has one of the legal sizes, a dropped one any length.
    """

    size: int
    bits: int


def expected(energies: Floats, size: int, bits: int) -> Floats:
    """The squared error [w - size + 1] that a group of normal components is expected to have.

    Codes divide the range of the group's own values into 2^bits - 1 steps. Of n values the range is
    that of n normal ones (Blom, 1958) times their deviations' mean of the power 2 ln n, which
    leans to the largest. A single value is its own shift, so only that is rounded.
    """
    sums = _sums(energies, size)
    if size == 1:
        return sums * ROUNDING
    # by the largest energy, whose powers stay finite
    most = max(float(energies.max(initial=0.0)), 1e-300)
    power = max(1.0, math.log(size))
    norm = (_sums((energies / most) ** power, size) / size) ** (1 / power) * most
    span = (2 * NormalDist().inv_cdf((size - 0.375) / (size + 0.25))) ** 2 * norm
    # a code of no use is no worse than the middle of its range
    found: Floats = np.minimum(size * span / (12 * (2**bits - 1) ** 2), sums) + sums * ROUNDING
    return found


def allot(
    energies: Sequence[float] | Floats,
    bits: int,
    sizes: Sequence[int] = SIZES,
    types: Sequence[int] = TYPES,
    side: int = SIDE,
    errors: Errors = expected,
) -> list[Group]:
    """Returns the groups, in the order of the components, that leave the least error of all.

    The program is exact: best(i, b) = the least error of the first i components at b bits at most,
    over all groups that may end at i.

    Args:
        energies: mean squares [w] of a token's components, in any order; neighbours share groups.
        bits: what a token may take, the groups' own bits counted.
        sizes: components that may share a scale.
        types: bits that a component may have; 0 may always be had.
        side: bits that each stored group takes beside its codes.
        errors: what a group costs; what KVTC measures on text, or `expected`.

    Raises:
        UsageError: negative or non-finite energies, sizes, types or bits.
    """
    x = np.asarray(energies, dtype=np.float64)
    kinds = [(size, kind) for size in sorted(set(sizes)) for kind in sorted(set(types)) if kind]
    _check(x, bits, kinds, side)
    kinds = [(n, kind) for n, kind in kinds if n <= len(x) and n * kind + side <= bits]
    if not kinds:
        return [Group(len(x), 0)] if len(x) else []
    unit = math.gcd(*(n * kind + side for n, kind in kinds))
    costs = [(n * kind + side) // unit for n, kind in kinds]
    losses = [errors(x, n, kind) for n, kind in kinds]
    chosen = _choices(x, [n for n, _ in kinds], costs, losses, bits // unit)
    return _walked(chosen, kinds, costs)


def total(groups: Sequence[Group], side: int = SIDE) -> int:
    """The bits that a token takes."""
    return sum(size * bits + side for size, bits in groups if bits)


def _check(x: Floats, bits: int, kinds: list[tuple[int, int]], side: int) -> None:
    if x.ndim != 1 or not np.isfinite(x).all() or (x < 0).any():
        raise UsageError("Energies are one list of finite numbers that are not negative.")
    if bits < 0 or side < 0 or any(size < 1 or kind < 0 for size, kind in kinds):
        what = f"{bits} bits for a token and {side} for a group, in (size, bits) of {kinds}"
        raise UsageError(f"{what}: none may be negative, and no group empty.")


def _sums(x: Floats, size: int) -> Floats:
    """Sums [w - size + 1] of neighbours, by doubling: of a running total small ones would be lost
    behind large ones."""
    total = np.zeros(len(x) - size + 1)
    part, width, start, left = x, 1, 0, size
    while left:
        if left & 1:
            total += part[start : start + len(total)]
            start += width
        left >>= 1
        if left:
            part = part[:-width] + part[width:]
            width *= 2
    return total


def _choices(
    x: Floats, sizes: list[int], costs: list[int], losses: list[Floats], budget: int
) -> NDArray[np.int8]:
    """Which kind of group ends at component i with b units left to spend: [w, budget + 1].

    -1 drops the component.
    """
    best = [np.zeros(budget + 1)]
    chosen = np.full((len(x), budget + 1), -1, dtype=np.int8)
    for i in range(len(x)):
        row = best[-1] + x[i]
        for kind, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            if size > i + 1:
                continue
            other = best[-size][: budget + 1 - cost] + losses[kind][i + 1 - size]
            better = other < row[cost:]
            np.copyto(row[cost:], other, where=better)
            chosen[i, cost:][better] = kind
        best.append(row)
        if len(best) > max(sizes):
            del best[0]  # no group reaches back so far
    return chosen


def _walked(
    chosen: NDArray[np.int8], kinds: list[tuple[int, int]], costs: list[int]
) -> list[Group]:
    found: list[Group] = []
    end, left = chosen.shape[0], chosen.shape[1] - 1
    while end:
        kind = int(chosen[end - 1, left])
        if kind >= 0:
            found.append(Group(*kinds[kind]))
            left -= costs[kind]
        elif found and not found[-1].bits:
            found[-1] = Group(found[-1].size + 1, 0)
        else:
            found.append(Group(1, 0))
        end -= found[-1].size if kind >= 0 else 1
    return found[::-1]
