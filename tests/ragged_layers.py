"""Ragged layers for laws: random tokens, as many of each head as it keeps, and the true answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from kvtune_kernels import Format
from kvtune_kernels.ragged import Ragged
from kvtune_kernels.ragged_launch import attend_ragged, decode_ragged, keep_ragged
from torch import Tensor

GPU = torch.cuda.is_available()
UNEVEN = [[0, 1], [63, 65]]
if GPU:
    UNEVEN = [[0, 1, 63, 64], [65, 8191, 1024, 4097]]
SIDES: dict[str, tuple[Format | None, Format | None]] = {
    "16 bits": (None, None),
    "2 bits per channel": (Format(2, 32, False), Format(2, 64, True)),
    "4 bits per channel, groups of two pages": (Format(4, 128, False), Format(4, 32, True)),
    "8 bits per token": (Format(8, 64, True), Format(8, 64, True)),
    "3 bits of keys, values per channel": (Format(3, 64, False), Format(4, 64, False)),
    "symmetric": (Format(4, 32, True, 0, True), Format(2, 32, True, 0, True)),
}
TWO_PAGES = "4 bits per channel, groups of two pages"
FOUR = SIDES[TWO_PAGES]


class Layer(NamedTuple):
    """What is stored of a layer, and what it was made of."""

    keys: Ragged
    values: Ragged
    exact: tuple[Tensor, Tensor]
    kept: tuple[Tensor, Tensor]  # [B, H, T, D]
    marks: Tensor  # bool [B, H, T]

    def attend(self, query: Tensor, **more: Any) -> Tensor:
        return attend_ragged(query, self.keys, self.values, *self.exact, **more)


def layer(
    formats: tuple[Format | None, Format | None], device: torch.device,
    lengths: list[list[int]] = UNEVEN, dim: int = 64, exact: int = 21,
    dtype: torch.dtype = torch.bfloat16, planes: Tensor | None = None,
) -> Layer:  # fmt: skip
    """Random tokens, of which every head keeps so many, anywhere; slots behind them are NaN."""
    generator = torch.Generator().manual_seed(dim)
    counts = torch.tensor(lengths)
    size = (*counts.shape, int(counts.max()) + 9, dim)
    rank = torch.rand(size[:3], generator=generator).argsort(-1).argsort(-1)
    marks = (rank < counts[..., None]).to(device)
    kept = torch.randn(2, *size, generator=generator).to(dtype).to(device)
    held = torch.randn(2, *counts.shape, exact, dim, generator=generator).to(dtype).to(device)
    keys = keep_ragged(kept[0], marks, formats[0], True, planes)
    values = keep_ragged(kept[1], marks, formats[1], False)
    return Layer(keys, values, (held[0], held[1]), (kept[0], kept[1]), marks)


def ask(found: Layer, share: int = 2, count: int = 1) -> Tensor:
    """Queries [B, Hq, M, D], turned round as a model's are."""
    batch, heads, _, dim = found.exact[0].shape
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, count, heads * share, dim, generator=generator) * 1.5
    return query.to(found.exact[0]).transpose(1, 2)


def by_the_book(
    found: Layer, query: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """The answers [B, Hq, M, D] token by token, in float64."""
    batch, query_heads, count, dim = query.shape
    share = query_heads // found.marks.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for b in range(batch):
        for q in range(query_heads):
            h = q // share
            sides = (found.keys, True), (found.values, False)
            kept = [
                decode_ragged(x, b, h, is_keys, torch.float64, dim)[0, 0] for x, is_keys in sides
            ]
            for m in range(count):
                seen = found.exact[0].shape[2] - (count - 1 - m)
                k, v = (
                    torch.cat([x, e[b, h, :seen].double()])
                    for x, e in zip(kept, found.exact, strict=True)
                )
                s = k @ query[b, q, m].double() * (dim**-0.5 if scale is None else scale)
                s = s if softcap is None else softcap * torch.tanh(s / softcap)
                out[b, q, m] = s.softmax(0) @ v
    return out
