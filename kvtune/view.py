"""What a selector sees of a layer, and the attention that its tokens got, summed block by block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGITS = 1 << 24  # that are held at once: 64 MiB of float32


class View(NamedTuple):
    """Some tokens of a layer, head by head, between which a selector chooses."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor
    attention: Tensor | None = None  # [B, H, T], of a selector that needs it: see `received`


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
