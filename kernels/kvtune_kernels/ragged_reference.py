"""Attention to kept tokens of ragged heads in plain torch: the definition of right for `ragged`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune_kernels.ragged import Ragged
from kvtune_kernels.reference import attend, decode


def decode_ragged(
    ragged: Ragged, row: int, head: int, keys: bool, dtype: torch.dtype, dim: int = 0
) -> Tensor:
    """The tokens [1, 1, T, D] of one head, T its length. Planes do not tell D: give it as `dim`."""
    length = int(ragged.lengths[row, head])
    if ragged.format is None:
        return ragged.tokens(row, head)[None, None, :length].to(dtype)
    return decode(ragged.head(row, head), keys, dtype, dim)[:, :, :length]


def attend_ragged(
    query: Tensor, keys: Ragged, values: Ragged, exact_keys: Tensor, exact_values: Tensor,
    scale: float | None = None, softcap: float | None = None, known: Tensor | None = None,
    told: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Answers query [B, Hq, M, D] head by head; see `ragged_launch.attend_ragged`."""
    batch, query_heads, count, dim = query.shape
    heads = keys.lengths.shape[1]
    share = query_heads // heads
    seen = [exact_keys.shape[2]] * batch if known is None else known.tolist()
    out = torch.zeros_like(query, dtype=torch.float32)
    for b in range(batch):
        for h in range(heads):
            sides = []
            for side, held, is_keys in ((keys, exact_keys, True), (values, exact_values, False)):
                kept = decode_ragged(side, b, h, is_keys, torch.float32, dim)
                sides.append(torch.cat([kept, held[b : b + 1, h : h + 1, : seen[b]].float()], 2))
            length = sides[0].shape[2]
            if length:
                own = slice(h * share, (h + 1) * share)
                place = torch.arange(length, device=query.device)
                last = torch.arange(length - count, length, device=query.device)
                mask = place <= last[:, None]
                asked = query[b : b + 1, own].float()
                out[b : b + 1, own] = attend(asked, *sides, mask, scale, softcap)
                if told is not None:
                    logits = asked[0] @ sides[0][0, 0].T * (dim**-0.5 if scale is None else scale)
                    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                    told[b, own] = logits.masked_fill(~mask, float("-inf")).logsumexp(-1)
            elif told is not None:
                told[b, h * share : (h + 1) * share] = float("-inf")
    return out.to(query.dtype)
