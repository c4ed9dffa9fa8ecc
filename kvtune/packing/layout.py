"""Between a cache's layers and vectors of tokens: heads and layers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from kvtune.models import Facts
from kvtune.rope import Rope

WIDEST = 6144  # values of a token that share a basis: its eigenvectors take minutes above


def spans(known: Facts, widest: int = WIDEST) -> list[tuple[int, ...]]:
    """Parts the full-attention layers into runs of equal shape, evenly, as few as may be."""
    full = known.compressible()
    found: list[tuple[int, ...]] = []
    for (heads, dim), run in groupby(
        full, key=lambda i: (known.layers[i].kv_heads, known.layers[i].head_dim)
    ):
        layers = tuple(run)
        parts = -(-len(layers) // max(1, widest // (heads * dim)))
        edges = [len(layers) * part // parts for part in range(parts + 1)]
        found += [layers[a:b] for a, b in pairwise(edges)]
    return found


def plain(keys: Tensor, rope: Rope | None) -> Tensor:
    """Keys [1, H, T, D] before the rotary embedding, where there is one to take off."""
    if rope is None:
        return keys
    return rope.unturn(keys.float(), torch.arange(keys.shape[2], device=keys.device))


def turned(keys: Tensor, rope: Rope | None) -> Tensor:
    """The inverse of `plain`."""
    if rope is None:
        return keys
    return rope.turn(keys, torch.arange(keys.shape[2], device=keys.device))


def columns(
    held: Mapping[int, Tensor] | Sequence[Any],
    layers: tuple[int, ...],
    ropes: Mapping[int, Rope] | None = None,
) -> Tensor:
    """One side [1, H, T, D] of some layers as tokens [T, W] in 32 bits, keys pre-RoPE."""
    found = [plain(held[i].detach(), (ropes or {}).get(i)).float().cpu() for i in layers]
    return torch.stack([x[0] for x in found]).permute(2, 0, 1, 3).flatten(1)


def heads(x: Tensor, count: int, dim: int) -> list[Tensor]:
    """Tokens [T, W] as one [1, H, T, D] for each layer."""
    parts = x.unflatten(1, (-1, count, dim)).permute(1, 2, 0, 3)
    return [part[None].contiguous() for part in parts]
