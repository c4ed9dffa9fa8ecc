"""Levels: codes that name the levels of a codebook, their storage, and scales without bias."""

from __future__ import annotations

from functools import cache

import torch
from kvtune_kernels import PAGE
from kvtune_kernels.reference import pack_pages, unpack_pages
from torch import Tensor

TRITS = 5  # ternary codes of a byte: 3**5 = 243
LARGEST = 65504.0


@cache
def lloyd_max(count: int) -> tuple[float, ...]:
    """The levels that cost a normal distribution of variance 1 least (Lloyd 1957, Max 1960)."""
    levels = torch.linspace(-2, 2, count, dtype=torch.float64)
    normal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    )
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    for _ in range(2000):
        edges = torch.cat([ends[:1], (levels[1:] + levels[:-1]) / 2, ends[1:]])
        density = torch.where(edges.isinf(), 0.0, normal.log_prob(edges.clamp(-40, 40)).exp())
        mass = normal.cdf(edges).diff()
        levels = -density.diff() / mass  # the mean of each cell
    return tuple(levels.tolist())


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Codes [B, H, ...] (uint8) of the nearest of ascending levels [n], or [H, n] of each head."""
    if levels.dim() == 1:
        return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    rows = [nearest(x[:, head], own) for head, own in enumerate(levels)]
    return torch.stack(rows, 1)


def looked_up(codes: Tensor, levels: Tensor) -> Tensor:
    """The levels that codes name: the inverse of `nearest`."""
    if levels.dim() == 1:
        return levels[codes.long()]
    head = torch.arange(levels.shape[0], device=codes.device)
    return levels[head.view(-1, *[1] * (codes.dim() - 2)), codes.long()]


def unbiased(x: Tensor, read: Tensor, dim: int) -> Tensor:
    """The scale, float16, by which what is read of groups x is on average x itself:
    <scale * read, x> = <x, x> (as in EDEN, arXiv:2108.08842).

    Averages over many tokens, which is what values are read for, keep the noise of rounding small,
    but all of a bias; the scale with the least squared error has one, and costs several times the
    KL at 2 bits and less. A group of zeros has scale 0.
    """
    x, read = x.float(), read.float()
    along = (x * read).sum(dim, keepdim=True)
    scale = (x * x).sum(dim, keepdim=True) / torch.where(along > 0, along, 1.0)
    return torch.where(along > 0, scale, 0.0).clamp_max(LARGEST).half()


def grouped(x: Tensor, axis: str, group: int) -> Tensor:
    """x [B, H, T, D] as groups along the last axis: of channels of a token [B, H, T, D / G, G], or
    of tokens of a channel [B, H, T / G, D, G]."""
    cut: Tensor = x.unflatten(-1 if axis == "token" else 2, (-1, group))
    return cut if axis == "token" else cut.transpose(-1, -2)


def whole(x: Tensor, axis: str) -> Tensor:
    """The inverse of `grouped`."""
    return x.flatten(-2) if axis == "token" else x.transpose(-1, -2).flatten(2, 3)


def stored(codes: Tensor, bits: int, keys: bool) -> Tensor:
    """Codes [B, H, T, D] in pages [B, H, T / 64, 8 * D * bits]."""
    return pack_pages(codes, bits, keys)


def restored(pages: Tensor, bits: int, keys: bool) -> Tensor:
    """The inverse of `stored`."""
    return unpack_pages(pages, bits, keys)


def stored_trits(codes: Tensor) -> Tensor:
    """Codes 0, 1, 2 [B, H, T, D] in pages of bytes, five to a byte: 1.6 bits each."""
    pages: Tensor = codes.unflatten(2, (-1, PAGE)).flatten(3).to(torch.int16)
    short = -pages.shape[-1] % TRITS
    pages = torch.nn.functional.pad(pages, (0, short)).unflatten(-1, (-1, TRITS))
    powers = 3 ** torch.arange(TRITS, dtype=torch.int16, device=codes.device)
    packed: Tensor = (pages * powers).sum(-1).to(torch.uint8)
    return packed


def restored_trits(pages: Tensor, head_dim: int) -> Tensor:
    """The inverse of `stored_trits`."""
    powers = 3 ** torch.arange(TRITS, dtype=torch.int16, device=pages.device)
    codes = (pages.to(torch.int16).unsqueeze(-1) // powers % 3).flatten(-2)
    lines: Tensor = codes[..., : PAGE * head_dim].unflatten(-1, (PAGE, head_dim)).flatten(2, 3)
    return lines
