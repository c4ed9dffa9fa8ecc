"""Routing: which winner each token that lost is most like, and the sums of what goes to each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvtune.view import View

PAIRS = 1 << 24  # of a winner and a loser, that are held at once: 64 MiB of float32


class Routes(NamedTuple):
    """Where each of E tokens that lost goes, head by head."""

    target: Tensor  # int64 [B, H, E]: a place among the winners
    cosine: Tensor  # [B, H, E], of its key with its winner's, in float32 at least


def routed(won: Tensor, lost: Tensor) -> Routes:
    """The winner of keys [B, H, W, D] that each key [B, H, E, D] has the largest cosine with.

    Keys are compared as they are cached, as the papers do. A zero vector is like no other: its
    cosine is 0. A block at a time, so that no [W, E] is ever held whole.
    """
    one, two = (_units(x).flatten(0, 1) for x in (won, lost))
    target = torch.empty(two.shape[:2], dtype=torch.int64, device=two.device)
    cosine = two.new_empty(two.shape[:2])
    for rows, some in _blocks(one.shape[0], one.shape[1], two.shape[1]):
        best = (two[rows, some] @ one[rows].transpose(1, 2)).max(-1)
        cosine[rows, some], target[rows, some] = best.values.clamp(-1, 1), best.indices
    return Routes(target.unflatten(0, lost.shape[:2]), cosine.unflatten(0, lost.shape[:2]))


def summed(x: Tensor, weight: Tensor, target: Tensor, winners: int) -> tuple[Tensor, Tensor]:
    """Sums [B, H, W, D] of x [B, H, E, D] times weights [B, H, E] at each winner, and the sums of
    the weights [B, H, W, 1], in float32 at least.

    A product with a matrix of one weight a column, block by block: unlike a scatter's, its sums
    have the same order every time, on a GPU too.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    heavy = torch.cat([x.to(wide), x.new_ones(*x.shape[:3], 1, dtype=wide)], -1).flatten(0, 1)
    weight, target = weight.to(wide).flatten(0, 1), target.flatten(0, 1)
    total = heavy.new_zeros(heavy.shape[0], winners, heavy.shape[2])
    for rows, some in _blocks(heavy.shape[0], winners, heavy.shape[1]):
        sent = weight[rows, None, some]  # [n, 1, e]
        spread = sent.new_zeros(sent.shape[0], winners, sent.shape[2])
        spread.scatter_(1, target[rows, None, some], sent)
        total[rows] += spread @ heavy[rows, some]
    total = total.unflatten(0, x.shape[:2])
    return total[..., :-1], total[..., -1:]


def counted(target: Tensor, merged: Tensor, winners: int) -> Tensor:
    """How many tokens go to each winner, int64 [B, H, W], of those that are `merged` [B, H, E]."""
    none = torch.zeros(*target.shape[:2], winners, dtype=torch.int64, device=target.device)
    return none.scatter_add(2, target, merged.long())


def blended(own: Tensor, lost: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """(x_j + sum_e w_e x_e) / (1 + sum_e w_e) of winners x [B, H, W, D], in float32 at least.

    Weights that are not negative keep it within the hull of what it is made of; a winner to which
    none goes comes out as it is.
    """
    sums, total = summed(lost, weight, target, own.shape[2])
    return (own.to(sums) + sums) / (1 + total)


def unturned(view: View) -> Tensor:
    """The keys [B, H, T, D] of a view before their rotary embedding, in float32 at least: only
    so may keys of different places be averaged, since turned ones cancel out."""
    return _turning(view, view.keys, inverse=True)


def turned(view: View, keys: Tensor) -> Tensor:
    """Keys [B, H, T, D] before their rotary embedding, turned to the places of a view's tokens."""
    return _turning(view, keys, inverse=False)


def _turning(view: View, keys: Tensor, inverse: bool) -> Tensor:
    rope, positions = view.spot.rope, view.positions
    assert rope is not None and positions is not None, "the layer gives what a part needs"
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return rope.unturn(wide, positions) if inverse else rope.turn(wide, positions)


def _units(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length: Tensor = wide.norm(dim=-1, keepdim=True)
    return wide / length.clamp_min(torch.finfo(wide.dtype).tiny)


def _blocks(heads: int, winners: int, losers: int) -> Iterator[tuple[slice, slice]]:
    """Slices of all heads of all rows, and of the losers."""
    several = max(1, min(heads, PAIRS // max(1, winners)))
    step = max(1, PAIRS // max(1, several * winners))
    for first in range(0, heads, several):
        for start in range(0, losers, step):
            yield slice(first, first + several), slice(start, start + step)
