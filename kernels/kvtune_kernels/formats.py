"""What an op is told about its tensors: formats, packed sides, exact tokens and windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 64  # tokens of a page: what attention reads at once
MOST_PLANES = 4  # of a channel: codes of 8 bits


class Format(NamedTuple):
    """Codes: `group` tokens of a channel share scale and zero, or channels of a token.

    Symmetric codes have no zero: x = (code - (2**bits - 1) / 2) * scale.
    """

    bits: int  # 2, 3, 4 or 8
    group: int
    per_token: bool
    channels: int = 0  # stored lines of codes a token; 0 = head_dim, other numbers need planes
    symmetric: bool = False

    @property
    def block(self) -> int:
        """Tokens that are encoded together: whole pages, and whole groups."""
        return PAGE if self.per_token else max(PAGE, self.group)


class Packed(NamedTuple):
    """Keys or values in pages: see `reference.encode`."""

    codes: Tensor  # uint8 [B, H, pages, PAGE * C * bits / 8], C channels of the format
    meta: Tensor  # float16 [B, H, lines, *], scale and zero of each group side by side
    format: Format
    planes: Tensor | None = None  # int32 [H, C], the digits of mixed bits: see `plane_table`

    @classmethod
    def empty(
        cls, format: Format, batch: int, heads: int, tokens: int, dim: int, device: torch.device,
        planes: Tensor | None = None,
    ) -> Packed:  # fmt: skip
        """Room for `tokens` tokens, a multiple of the format's block."""
        width = format.channels or dim
        pages = (batch, heads, tokens // PAGE)
        meta = (*pages, (1 if format.symmetric else 2) * PAGE * (width // format.group))
        if not format.per_token:
            meta = (batch, heads, tokens // format.group, 2 * width)
        return cls(
            torch.empty(*pages, PAGE * width * format.bits // 8, dtype=torch.uint8, device=device),
            torch.empty(meta, dtype=torch.float16, device=device),
            format,
            planes,
        )

    def of_rows(self, rows: slice | Tensor) -> Packed:
        """The pages of some batch rows."""
        return self._replace(codes=self.codes[rows], meta=self.meta[rows])

    def clone(self) -> Packed:
        """Pages of its own."""
        return self._replace(codes=self.codes.clone(), meta=self.meta.clone())


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


def plane_table(counts: Tensor) -> Tensor:
    """The planes [H, C] of heads whose channels have `counts` [H, D] of them; each row's sum is C.

    A channel of 2 * m bits is m virtual channels of 2-bit digits, the lowest first: its code is the
    sum of digit * 4**plane. An entry is source channel | plane << 16 | count << 24.

    Raises:
        ValueError: heads with different sums, or more than four planes of a channel.
    """
    sums = counts.sum(-1)
    if bool((sums != sums[0]).any()) or int(counts.max()) > MOST_PLANES:
        raise ValueError(
            f"every head needs as many planes, at most {MOST_PLANES} a channel: they have "
            f"{sorted(set(sums.tolist()))}, at most {int(counts.max())}"
        )
    rows = []
    for row in counts.long():
        source = torch.arange(len(row), device=row.device).repeat_interleave(row)
        first = (row.cumsum(0) - row).repeat_interleave(row)
        plane = torch.arange(len(source), device=row.device) - first
        rows.append(source | plane << 16 | row[source] << 24)
    return torch.stack(rows).to(torch.int32)
