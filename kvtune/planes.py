"""Planes: channels of mixed bits in pages of one layout, which two methods share."""

from __future__ import annotations

from abc import abstractmethod

import torch
from kvtune_kernels import PAGE, Format, Packed, decode, encode, plane_table
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvtune.parts import Code, Quantizer, Seen, Site

DIGITS = 2  # bits of a plane
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class PlaneQuantizer(Quantizer):
    """Each channel has planes of two bits, as many as a fit gave it; a channel of none is zero.

    x = digits * scale + zero over groups of tokens of one channel, of which a channel of m planes
    has 2 m bits. All heads have equally many planes, so a page is one block of two-bit codes.
    """

    fits = True

    @abstractmethod
    def planes_of(self, head_dim: int) -> int:
        """How many planes a token of one head has."""

    @abstractmethod
    def counts(self, seen: Seen) -> Tensor:
        """Returns how many planes each channel has [H, D]."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many tokens of a channel share scale and zero."""

    @property
    def block(self) -> int:
        """Whole pages, and whole groups of tokens."""
        return max(PAGE, self.tokens)

    def check(self, head_dim: int, side: str) -> None:
        """Planes fill whole bytes (kernels want a multiple of 16)."""
        if self.planes_of(head_dim) % 8 or head_dim % 8:
            raise ValueError(
                f"{self.name()} would store {self.planes_of(head_dim)} planes for head_dim "
                f"{head_dim}: they must be a multiple of 8"
            )

    def format(self, head_dim: int) -> Format:
        """What kernels read of it."""
        return Format(DIGITS, self.tokens, False, channels=self.planes_of(head_dim))

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """A byte for each channel: how many planes it has."""
        return {"planes": torch.empty(heads, head_dim, dtype=torch.uint8, device="meta")}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the planes of each channel."""
        return {"planes": self.counts(seen).to(torch.uint8)}

    def planes(self, site: Site) -> Tensor:
        """The table [H, C] that kernels read."""
        counts = site.tensors[f"{self.name()}.planes"]
        if counts.is_meta:
            shape = (counts.shape[0], self.planes_of(counts.shape[1]))
            return torch.empty(shape, dtype=torch.int32, device="meta")
        if counts not in _tables:
            _tables[counts] = plane_table(counts)
        table: Tensor = _tables[counts]
        return table

    def encode(self, x: Tensor, site: Site) -> Code:
        """Pages of digits [B, H, T / 64, 64 * C / 4], and scale and zero of each plane's groups."""
        codes, meta = encode(x, self.format(x.shape[-1]), site.side == "keys", self.planes(site))
        return Code(codes, (meta,))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Sums the planes of each channel."""
        dim = site.tensors[f"{self.name()}.planes"].shape[1]
        packed = Packed(code.body, code.side[0], self.format(dim), self.planes(site))
        return decode(packed, site.side == "keys", site.dtype, dim)
