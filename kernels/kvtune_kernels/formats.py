"""What an op is told about its tensors: formats, packed sides, exact tokens and windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 64  # tokens of a page: what attention reads at once


class Format(NamedTuple):
    """Affine codes: `group` tokens of a channel share scale and zero, or channels of a token."""

    bits: int  # 2, 3, 4 or 8
    group: int
    per_token: bool

    @property
    def block(self) -> int:
        """Tokens that are encoded together: whole pages, and whole groups."""
        return PAGE if self.per_token else max(PAGE, self.group)


class Packed(NamedTuple):
    """Keys or values in pages: see `reference.encode`."""

    codes: Tensor  # uint8 [B, H, pages, PAGE * D * bits / 8]
    meta: Tensor  # float16 [B, H, lines, *], scale and zero of each group side by side
    format: Format

    @classmethod
    def empty(
        cls, format: Format, batch: int, heads: int, tokens: int, dim: int, device: torch.device
    ) -> Packed:
        """Room for `tokens` tokens, a multiple of the format's block."""
        pages = (batch, heads, tokens // PAGE)
        meta = (*pages, 2 * PAGE * (dim // format.group))
        if not format.per_token:
            meta = (batch, heads, tokens // format.group, 2 * dim)
        return cls(
            torch.empty(*pages, PAGE * dim * format.bits // 8, dtype=torch.uint8, device=device),
            torch.empty(meta, dtype=torch.float16, device=device),
            format,
        )


class Exact(NamedTuple):
    """Tokens in 16 bits: slots 0 to sinks - 1 hold the sinks, then a ring holds what follows them.

    Token t after the sinks lies in slot sinks + (t - shift) % ring.
    """

    keys: Tensor  # [B, H, sinks + ring, D]
    values: Tensor
    shift: int = 0


class Window(NamedTuple):
    """Which tokens stay exact: the first `sinks`, the last `recent`, and what fills no block."""

    sinks: int
    recent: int
    block: int

    def due(self, seen: int) -> int:
        """Tokens after the sinks that have left the window once `seen` are known."""
        return max(0, seen - self.sinks - self.recent) // self.block * self.block

    @property
    def ring(self) -> int:
        """Slots that decoding needs: a full window, a full block, and the token that comes in."""
        return -(-(self.recent + self.block + 1) // 16) * 16
