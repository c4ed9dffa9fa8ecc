"""Symmetric codes for groups that a rotation has made normal, with one unbiased 16-bit scale
(TurboQuant, arXiv:2504.19874)."""

from typing import Annotated, Literal

import torch
from kvtune_kernels import PAGE, Format, Packed, decode, encode
from torch import Tensor

from kvtune import levels
from kvtune.marks import OneOf
from kvtune.parts import Code, Quantizer, Site


class Normal(Quantizer):
    """x = level * scale over groups of channels of one token; half the metadata of affine codes.

    `spacing = "lloyd-max"`: the levels that cost a normal distribution least. `"even"`: levels at
    even steps, which at 2 bits cost a normal distribution 1 % more and which kernels read. The
    scale makes the code unbiased in place of TurboQuant's second code for the residual.
    """

    bits: Annotated[int, OneOf((2, 3, 4))] = 2
    group: Annotated[int | Literal["head"], OneOf((32, 64, "head"))] = "head"
    spacing: Literal["even", "lloyd-max"] = "even"

    @property
    def payload_bits(self) -> float:
        """The code bits."""
        return float(self.bits)

    @property
    def block(self) -> int:
        """Whole pages."""
        return PAGE

    def check(self, head_dim: int, side: str) -> None:
        """Groups divide the head."""
        if head_dim % 8:
            raise ValueError(f"normal packs whole bytes: head_dim {head_dim} is no multiple of 8")
        if self.group != "head" and (head_dim % self.group or head_dim == self.group):
            whole = ' (group = "head" is the whole head)' if self.group >= head_dim else ""
            raise ValueError(
                f"normal: group {self.group} does not divide head_dim {head_dim}{whole}"
            )

    def format(self, head_dim: int) -> Format | None:
        """Kernels read even levels; others they would have to look up."""
        return self._format(head_dim) if self.spacing == "even" else None

    def _format(self, head_dim: int) -> Format:
        group = head_dim if self.group == "head" else self.group
        return Format(self.bits, group, True, symmetric=True)

    def encode(self, x: Tensor, site: Site) -> Code:
        """Pages of codes [B, H, T / 64, 64 * D * bits / 8], and the scale of each group."""
        if self.spacing == "even":
            codes, meta = encode(x, self._format(x.shape[-1]), site.side == "keys")
            return Code(codes, (meta,))
        book = self._levels(x)
        groups = levels.grouped(x.float(), "token", self._format(x.shape[-1]).group)
        spread = groups.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        codes = levels.nearest(groups / spread, book)
        scale = levels.unbiased(groups, levels.looked_up(codes, book), -1).squeeze(-1)
        flat = levels.whole(codes, "token")
        return Code(levels.stored(flat, self.bits, site.side == "keys"), (scale,))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns level * scale."""
        head_dim = code.body.shape[-1] * 8 // (PAGE * self.bits)
        if self.spacing == "even":
            packed = Packed(code.body, code.side[0], self._format(head_dim))
            return decode(packed, site.side == "keys", site.dtype)
        codes = levels.restored(code.body, self.bits, site.side == "keys")
        read = levels.looked_up(codes, self._levels(code.side[0]))
        groups = levels.grouped(read, "token", self._format(head_dim).group)
        return (groups * code.side[0].float().unsqueeze(-1)).flatten(-2).to(site.dtype)

    def _levels(self, like: Tensor) -> Tensor:
        return torch.tensor(levels.lloyd_max(2**self.bits), device=like.device)
