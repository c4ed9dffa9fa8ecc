"""Affine group quantisation, keys per channel and values
per token (KIVI, arXiv:2402.02750), really packed."""

from typing import Annotated, Literal

from kvtune_kernels import dequantize, pack, quantize, unpack
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.parts import Code, Quantizer, Site


class Affine(Quantizer):
    """x = codes * scale + zero over groups of values; scale and zero take 16 bits each.

    `axis = "channel"`: a group is `group` consecutive tokens of one channel. `axis = "token"`: a
    group is `group` channels of one token, or with `group = "head"` all channels of the head.
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
        """A per-channel group spans `group` tokens."""
        return self.group if self.axis == "channel" and isinstance(self.group, int) else 1

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

    def encode(self, x: Tensor, site: Site) -> Code:
        """Packs codes [B, H, T, D * bits / 8], scale and zero [B,
        H, T / group, D] or [B, H, T, D / group]."""
        if self.axis == "channel":
            codes, scale, zero = quantize(x.unflatten(2, (-1, self.block)), self.bits)
            return Code(pack(codes.flatten(2, 3), self.bits), (scale.squeeze(3), zero.squeeze(3)))
        size = x.shape[-1] if self.group == "head" else self.group
        codes, scale, zero = quantize(x.unflatten(-1, (-1, size, 1)), self.bits)
        return Code(pack(codes.flatten(-3), self.bits), (scale.flatten(-3), zero.flatten(-3)))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns codes * scale + zero."""
        codes = unpack(code.body, self.bits)
        scale, zero = code.side
        if self.axis == "channel":
            grouped = codes.unflatten(2, (-1, self.block))
            return dequantize(grouped, scale.unsqueeze(3), zero.unsqueeze(3), site.dtype).flatten(
                2, 3
            )
        grouped = codes.unflatten(-1, (scale.shape[-1], -1))
        return dequantize(grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), site.dtype).flatten(-2)
