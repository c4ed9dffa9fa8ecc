"""Shares: whole numbers that sum to a budget exactly, each within its limits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HALVINGS = 128  # of a range of thresholds: float64 has no number in between by then
SLACK = 1e-9  # in tokens: what rounding leaves of a sum of shares


def dealt(room: Tensor, count: int, order: Tensor) -> Tensor:
    """Deals `count` tokens out one by one, round after round in an order [n] of places, to those
    that have room [n] left; int64 [n]. A greater count gives no place less.

    Raises:
        ValueError: more than there is room for.
    """
    if not 0 <= count <= int(room.sum()):
        raise ValueError(f"{count} tokens do not fit into room for {int(room.sum())}")
    low, high = 0, int(room.max()) + 1  # whole rounds that the count suffices for, and does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = int(room.clamp(max=middle).sum()) <= count
        low, high = (middle, high) if fits else (low, middle)
    found = room.clamp(max=low)
    still = order[room[order] > low][: count - int(found.sum())]
    found[still] += 1
    return found


def exact(wanted: Tensor, total: int, least: int, most: int) -> Tensor:
    """Whole numbers int64 [n] from `least` to `most` that sum to `total`, nearest to those wanted.

    All wanted [n] are shifted by one number and clamped, which is the nearest point that sums to
    the total; then the largest remainders are rounded up (Hamilton), of equal ones the first.

    Raises:
        ValueError: no such numbers sum to the total.
    """
    real = wanted.double()
    low, high = least - float(real.max()), most - float(real.min())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = float((real + middle).clamp(least, most).sum()) < total
        low, high = (middle, high) if short else (low, middle)
    real = (real + high).clamp(least, most)
    whole = (real + SLACK).floor().long().clamp(max=most)
    order = (whole - real).argsort(stable=True)
    return whole + dealt(most - whole, total - int(whole.sum()), order)


def levelled(counts: Callable[[float], Tensor], total: int, least: int, most: int) -> Tensor:
    """The numbers int64 [n] that one threshold for all gives, and which sum to `total` exactly.

    A larger threshold never gives less: `counts` [n] of thresholds from -1 to 1, which are clamped
    to the limits; below all have their least, and above their most. Where the last step of the
    threshold gives more than is left of the total, that is dealt out one by one. A greater total
    gives no place less.

    Raises:
        ValueError: the limits do not hold the total.
    """

    def clamped(threshold: float) -> Tensor:
        return counts(threshold).clamp(least, most)

    low, high, before = -1.0, 1.0, torch.full_like(counts(-1.0), least)
    after = torch.full_like(before, most)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = clamped(middle)
        if int(found.sum()) == total:
            return found  # whatever the next steps were, they would end here
        if int(found.sum()) < total:
            low, before = middle, found
        else:
            high, after = middle, found
    left = total - int(before.sum())
    return before + dealt(after - before, left, torch.arange(len(before)))


def reached(curves: Tensor, level: float) -> Tensor:
    """The least x [n], from 0 to 1, at which curves [n, K] reach a level; 1 where they never do.

    Curves rise, or stay, from x = 0 to 1 in even steps, and are straight in between.
    """
    last = curves.shape[1] - 1
    after = torch.searchsorted(curves, torch.full((len(curves), 1), level, dtype=curves.dtype))
    inner = after.clamp(1, last)
    left, right = curves.gather(1, inner - 1), curves.gather(1, inner)
    part = ((level - left) / (right - left).clamp_min(1e-300)).clamp(0, 1)
    x = torch.where(after > last, float(last), torch.where(after == 0, 0.0, inner - 1 + part))
    return x[:, 0] / last


def tokens(x: Tensor, of: int) -> Tensor:
    """How many of so many tokens are a part x [n], from 0 to 1, of them, rounded up; int64 [n]."""
    return (x * of - SLACK).ceil().long().clamp_min(0)
