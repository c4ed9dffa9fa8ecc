"""1-bit codes: plus or minus a scale (VidKV, arXiv:2503.16257)."""

from typing import Annotated, Literal

import torch
from kvtune_kernels import PAGE
from torch import Tensor

from kvtune import levels
from kvtune.marks import OneOf
from kvtune.parts import Code, Quantizer, Site


class Binary(Quantizer):
    """x = sign * scale; eight codes to a byte, and a scale takes 16 bits.

    `axis = "channel"`: groups of `group` tokens of one channel; `"token"`: all channels of a token.
    `scale = "mean"` is the mean magnitude (VidKV means it; its released code reads 0 and scale in
    place of both signs), `"unbiased"` keeps averages over tokens free of bias. VidKV's Fourier
    transform doubles what is stored, so it is left to a rotation. Kernels do not read it.
    """

    axis: Literal["channel", "token"] = "channel"
    group: Annotated[int, OneOf((32, 64, 128))] = 64  # tokens, per channel
    scale: Literal["unbiased", "mean"] = "unbiased"

    @property
    def payload_bits(self) -> float:
        """A sign."""
        return 1.0

    @property
    def block(self) -> int:
        """Whole pages, and whole groups of tokens."""
        return max(PAGE, self.group) if self.axis == "channel" else PAGE

    def check(self, head_dim: int, side: str) -> None:
        """Pages hold whole bytes."""
        if head_dim % 8:
            raise ValueError(f"binary packs whole bytes: head_dim {head_dim} is no multiple of 8")

    def encode(self, x: Tensor, site: Site) -> Code:
        """Pages of bytes [B, H, T / 64, 8 * D], and the scale of each group."""
        size = x.shape[-1] if self.axis == "token" else self.group
        limit = torch.finfo(torch.float16).max
        groups = levels.grouped(x.float().clamp(-limit, limit), self.axis, size)
        signs = torch.where(groups < 0, -1.0, 1.0)
        if self.scale == "unbiased":
            scale = levels.unbiased(groups, signs, -1)
        else:
            scale = groups.abs().mean(-1, keepdim=True).half()
        codes = levels.whole((signs > 0).to(torch.uint8), self.axis)
        return Code(levels.stored(codes, 1, site.side == "keys"), (scale.squeeze(-1),))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns sign * scale."""
        signs = levels.restored(code.body, 1, site.side == "keys").float() * 2 - 1
        size = signs.shape[-1] if self.axis == "token" else self.group
        groups = levels.grouped(signs, self.axis, size)
        return levels.whole(groups * code.side[0].float().unsqueeze(-1), self.axis).to(site.dtype)
