"""Views for the tests of scorers: tokens that compete, between sinks and a window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvtune.rope import Rope
from kvtune.view import Spot, View, received

BATCH, HEADS, DIM = 2, 2, 16


class Turning(nn.Module):
    """Rotary tables of so many channels."""

    def __init__(self, width: int = DIM, theta: float = 1e4) -> None:
        super().__init__()
        self.width, self.theta = width, theta

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        speed = self.theta ** (-torch.arange(0, self.width, 2) / self.width)
        angles = positions[..., None] * speed
        both = torch.cat([angles, angles], -1)
        return both.cos().to(like), both.sin().to(like)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def view_of(
    tokens: int,
    sinks: int = 2,
    window: int = 8,
    group: int = 3,
    dtype: torch.dtype = torch.float32,
    output: bool = True,
) -> View:
    """Returns `tokens` [2, 2, T, 16] that compete, all queries, and their query heads' group."""
    total = sinks + tokens + window
    keys, values = (drawn(BATCH, HEADS, total, DIM, seed=s, dtype=dtype) for s in (0, 1))
    query = drawn(BATCH, HEADS * group, total, DIM, seed=2, dtype=dtype)
    own = slice(sinks, sinks + tokens)
    projection = drawn(HEADS * group, DIM, 24, seed=3, dtype=dtype)
    return View(
        keys[:, :, own],
        values[:, :, own],
        received(query, keys)[:, :, own],
        query,
        keys[:, :, :sinks] if sinks else None,
        keys[:, :, sinks + tokens :] if window else None,
        torch.arange(sinks, sinks + tokens),
        total,
        None,
        Spot(rope=Rope(Turning()), output=projection if output else None),
    )
