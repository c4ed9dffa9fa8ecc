"""Splits: how the tokens that leave a window part into those that win and those that do not."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 0.005  # a split may miss its share by half a percentage point, for the sake of small blocks
LEAST = 64  # tokens that compete at least: among a few neighbours a rank says little


class Split(NamedTuple):
    """So many of a block of tokens win, and so many do not; every head has the same counts."""

    kept: int
    rest: int

    @property
    def block(self) -> int:
        """Tokens that leave the window together."""
        return self.kept + self.rest


@lru_cache(maxsize=1024)
def smallest(share: float, kept_block: int, rest_block: int) -> Split:
    """The split with the smallest rest near a share (0 to 1), in whole blocks of both tiers.

    Every block is split alike, so the length of a tier depends on nothing but a position.
    """
    if share >= 1:
        return Split(kept_block, 0)
    rest = 0
    while True:  # ends: at rest_block * kept_block / share the split is as near as rounding gets
        rest += rest_block
        kept = max(1, round(share * rest / (1 - share) / kept_block)) * kept_block
        block = kept + rest
        if block >= LEAST and abs(kept / block - share) <= NEAR:
            return Split(kept, rest)


def parted(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Places of the `kept` largest of scores [B, H, T], and of the others, each in order.

    Of equal scores the later token wins.
    """
    order = score.shape[-1] - 1 - score.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return order[..., :kept].sort(-1).values, order[..., kept:].sort(-1).values


def others(places: Tensor, total: int) -> Tensor:
    """All other places [B, H, total - n] of so many than those given [B, H, n], in order."""
    taken = torch.zeros(*places.shape[:2], total, dtype=torch.int8, device=places.device)
    taken = taken.scatter(2, places, 1)
    return taken.argsort(dim=-1, stable=True)[..., : total - places.shape[2]]


def gathered(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of x [B, H, T, D] at places [B, H, n] of each head."""
    return x.gather(2, places[..., None].expand(-1, -1, -1, x.shape[-1]))
