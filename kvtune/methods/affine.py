"""Affine group quantisation, keys per channel and values
per token (KIVI, arXiv:2402.02750), really packed."""

from typing import Annotated, Literal

from kvtune_kernels import PAGE, Format, Packed, decode, encode
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.parts import Code, Quantizer, Site


class Affine(Quantizer):
    """x = codes * scale + zero over groups of values; scale and zero take 16 bits each.

    `axis = "channel"`: a group is `group` consecutive tokens of one channel. `axis = "token"`: a
    group is `group` channels of one token, or with `group = "head"` all channels of the head.
    Tokens are stored in pages of 64, which a GPU reads as they are.
    """

    bits: Annotated[int, OneOf((2, 3, 4, 8))] = 4
    group: Annotated[int | Literal["head"], OneOf((32, 64, 128, "head"))] = 32
    axis: Literal["token", "channel"] = "token"

    @property
    def payload_bits(self) -> float:
        """The code bits."""
        return float(self.bits)

    @property
    def block(self) -> int:
        """Whole pages, and whole groups of tokens."""
        return max(PAGE, self.group) if self.axis == "channel" and self.group != "head" else PAGE

    def check(self, head_dim: int, side: str) -> None:
        """Groups of channels divide the head; a group of tokens has a length."""
        if head_dim % 8:
            raise ValueError(
                f"affine packs whole bytes: head_dim {head_dim} is not a multiple of 8"
            )
        if self.axis == "channel" and self.group == "head":
            raise ValueError(
                'affine per channel groups tokens: give group = 32, 64 or 128 instead of "head"'
            )
        if (
            self.axis == "token"
            and isinstance(self.group, int)
            and (head_dim % self.group or head_dim == self.group)
        ):
            whole = ' (group = "head" is the whole head)' if self.group >= head_dim else ""
            raise ValueError(
                f"affine per token: group {self.group} does not divide head_dim {head_dim}{whole}"
            )

    def format(self, head_dim: int) -> Format:
        """What kernels read of it."""
        group = head_dim if self.group == "head" else self.group
        return Format(self.bits, group, self.axis == "token")

    def encode(self, x: Tensor, site: Site) -> Code:
        """Pages of codes [B, H, T / 64, 64 * D * bits / 8], and scale and zero of each group."""
        codes, meta = encode(x, self.format(x.shape[-1]), site.side == "keys")
        return Code(codes, (meta,))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns codes * scale + zero."""
        head_dim = code.body.shape[-1] * 8 // (PAGE * self.bits)
        packed = Packed(code.body, code.side[0], self.format(head_dim))
        return decode(packed, site.side == "keys", site.dtype)
