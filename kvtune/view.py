"""What a selector sees of a layer, and the attention that its tokens got, summed block by block."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtune.rope import Rope

LOGITS = 1 << 24  # that are held at once: 64 MiB of float32


class Spot(NamedTuple):
    """Where a selector or a merger works: what a part may know of its place."""

    layer: int = 0
    layers: int = 1  # of the model
    tensors: Mapping[str, Tensor] = MappingProxyType({})  # fitted ones: "retrieval_heads.heads"
    rope: Rope | None = None  # where it `needs` "rope"
    output: Tensor | None = None  # [Hq, D, E], the output projection, where it `needs` "output"
    scale: float | None = None  # of logits
    softcap: float | None = None

    def of_heads(self, heads: tuple[int, ...], kv_heads: int) -> Spot:
        """The same for some of the kv heads of a layer; axis 0 of tensors is the query heads."""

        def own(x: Tensor) -> Tensor:
            apart: Tensor = x.unflatten(0, (kv_heads, -1))
            return apart[list(heads)].flatten(0, 1)

        tensors = {name: own(x) for name, x in self.tensors.items()}
        output = None if self.output is None else own(self.output)
        return self._replace(tensors=tensors, output=output)


class View(NamedTuple):
    """Some tokens of a layer in the order of their positions, head by head, which compete.

    What stands under `attention`, `queries`, `first` and `kinds` is there where a part needs it.
    """

    keys: Tensor  # [B, H, T, D], as they are cached
    values: Tensor
    attention: Tensor | None = None  # [B, H, T]: see `received`; of a replay, the most they got
    queries: Tensor | None = None  # [B, Hq, n, D], of the last n tokens: seen - n ... seen - 1
    first: Tensor | None = None  # keys [B, H, S, D] of sinks, which do not compete
    last: Tensor | None = None  # keys [B, H, R, D] of the window, and of tokens that are looked at
    positions: Tensor | None = None  # [T] or [B, H, T]: the true index of each
    seen: int = 0  # tokens so far
    kinds: Tensor | None = None  # bool [B, H, T]: true of tokens that go before all others
    spot: Spot = Spot()
    memory: Any = None  # what the part returned of an earlier choice
    ahead: int = 0  # of the last tokens: they are only looked at, and stand in `queries` and `last`


class Observed(NamedTuple):
    """What is known of a prompt beside its keys and values, each where a selector needs it."""

    attention: Tensor | None = None  # [B, H, T]
    queries: Tensor | None = None  # [B, Hq, n, D], of the last n tokens and what is looked at
    kinds: Tensor | None = None  # bool [B, T]
    ahead: Tensor | None = None  # keys [B, H, a, D] of tokens that are only looked at
    scale: float | None = None
    softcap: float | None = None


def received(
    query: Tensor, keys: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """Attention mass [B, H, T] that each key [B, H, T, D] gets, summed over queries [B, Hq, n, D]
    and over the query heads of its kv head (H2O, arXiv:2306.14048).

    The queries are those of the last n tokens; each sees what stands up to its own token. In
    float32 at least: sums of 16 bits tie, and which token wins would be chance. A few queries
    at a time, so that no [n, T] is ever held whole.
    """
    batch, query_heads, count, dim = query.shape
    heads, length = keys.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (heads, -1))
    across = keys.to(wide).transpose(-1, -2)
    total = torch.zeros(batch, heads, length, dtype=wide, device=keys.device)
    step = max(1, LOGITS // (batch * query_heads * length))
    for start in range(0, count, step):
        some = grouped[..., start : start + step, :].to(wide)
        own = some.shape[-2]
        reach = length - count + start + own  # what the last of these queries sees
        logits = some.flatten(2, 3) @ across[..., :reach] * (scale or dim**-0.5)
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        ones = torch.ones(own, reach, dtype=torch.bool, device=keys.device)
        future = ones.triu(reach - own + 1).repeat(query_heads // heads, 1)
        total[..., :reach] += logits.masked_fill(future, float("-inf")).softmax(-1).sum(-2)
    return total


def looked(view: View, most: int) -> Tensor:
    """Attention [B, Hq, n, T] of the last n <= `most` queries of a view to the tokens that compete.

    Sinks and window take their part of each row, which so sums to one at most; a query sees what
    stands before it and itself. In float32 at least.
    """
    assert view.queries is not None, "the layer gives what a part needs"
    query = view.queries[:, :, -most:]
    wide = torch.promote_types(query.dtype, torch.float32)
    held = [x for x in (view.first, view.keys, view.last) if x is not None]
    keys = torch.cat(held, 2) if len(held) > 1 else held[0]
    heads, length, dim = keys.shape[1:]
    count = query.shape[2]
    logits = query.to(wide).unflatten(1, (heads, -1)).flatten(2, 3) @ keys.to(wide).transpose(2, 3)
    logits = logits * (view.spot.scale or dim**-0.5)
    if view.spot.softcap is not None:
        logits = torch.tanh(logits / view.spot.softcap) * view.spot.softcap
    logits = logits.unflatten(2, (-1, count)).flatten(1, 2)
    # what is held ends with the last n tokens, one after the other
    every = torch.ones(count, length, dtype=torch.bool, device=keys.device)
    logits = logits.masked_fill(every.triu(length - count + 1), float("-inf"))
    start = 0 if view.first is None else view.first.shape[2]
    weights: Tensor = logits.softmax(-1)
    return weights.narrow(-1, start, view.keys.shape[2])
