"""What scorers share: attention of an observation window pooled along the tokens, and the weight of
a token's value behind the output projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvtune.view import LOGITS, View, looked


def pooled(x: Tensor, kernel: int, pool: str) -> Tensor:
    """Means, or largest (`pool = "max"`), of `kernel` neighbours along the last axis of [..., T].

    Beyond both ends stand zeros, as in SnapKV (arXiv:2404.14469): a token at an end gets less.
    """
    if kernel == 1 or not x.shape[-1]:
        return x
    flat = x.reshape(-1, 1, x.shape[-1])
    apply = max_pool1d if pool == "max" else avg_pool1d
    return apply(flat, kernel, stride=1, padding=kernel // 2).view(x.shape)


def watched(view: View, window: int, kernel: int, pool: str, reduce: str) -> Tensor:
    """Attention [B, H, T] that the last `window` queries give on average, pooled, and then the mean
    or the largest over the query heads of a kv head (SnapKV, arXiv:2404.14469)."""
    each = pooled(looked(view, window).mean(2), kernel, pool)
    grouped: Tensor = each.unflatten(1, (view.keys.shape[1], -1))
    return grouped.amax(2) if reduce == "max" else grouped.mean(2)


def weight(view: View) -> Tensor:
    """What a token adds to the layer's output per attention that it gets, [B, H, T]: ||W_o v||_1,
    the mean over the query heads of a kv head (CriticalKV, arXiv:2502.03805).

    Without the output projection it is ||v||_2, which is proportional to it for a W_o without
    preferred directions.
    """
    wide = torch.promote_types(view.values.dtype, torch.float32)
    output = view.spot.output
    if output is None:
        norm: Tensor = torch.linalg.vector_norm(view.values, dim=-1, dtype=wide)
        return norm
    batch, heads, length = view.values.shape[:3]
    found = torch.zeros(batch, heads, length, dtype=wide, device=view.values.device)
    share = output.shape[0] // heads
    step = max(1, LOGITS // (batch * output.shape[2]))  # W_o v of all is far larger than the cache
    for head in range(heads):
        for start in range(0, length, step):
            some = view.values[:, head, start : start + step].to(wide)
            for matrix in output[head * share : (head + 1) * share].to(wide):
                found[:, head, start : start + step] += (some @ matrix).abs().sum(-1)
    return found / share


def raised(score: Tensor, first: Tensor, by: Tensor) -> Tensor:
    """Scores [B, H, T] >= 0 in which tokens of a mask `first` stand above all others of their row,
    in the order of `by` (0 to 1)."""
    top = score.amax((1, 2), keepdim=True) + 1
    return torch.where(first, top * (2 + by), score)
