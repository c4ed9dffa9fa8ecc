"""1.58-bit codes: -1, 0 or 1 times a scale (VidKV, arXiv:2503.16257), five of them to a byte."""

from typing import Annotated, Literal

import torch
from kvtune_kernels import PAGE
from torch import Tensor

from kvtune import levels
from kvtune.marks import OneOf
from kvtune.parts import Code, Quantizer, Site

THRESHOLD = 0.5  # of the mean magnitude: below it a code is 0


class Ternary(Quantizer):
    """x = code * scale; a byte holds five codes, so 1.6 bits each, and a scale takes 16.

    `axis = "channel"`: groups of `group` tokens of one channel, as in VidKV; `"token"`: all
    channels of a token, for groups that a rotation has made alike. `scale = "mean"` is the mean
    magnitude of what is not 0 (VidKV means to apply it; its released code does not), `"unbiased"`
    keeps averages over tokens free of bias. Kernels do not read it.
    """

    axis: Literal["channel", "token"] = "channel"
    group: Annotated[int, OneOf((32, 64, 128))] = 64  # tokens, per channel
    scale: Literal["unbiased", "mean"] = "unbiased"

    @property
    def payload_bits(self) -> float:
        """Five codes to a byte."""
        return 8 / levels.TRITS

    @property
    def block(self) -> int:
        """Whole pages, and whole groups of tokens."""
        return max(PAGE, self.group) if self.axis == "channel" else PAGE

    def encode(self, x: Tensor, site: Site) -> Code:
        """Pages of bytes [B, H, T / 64, 64 * D / 5], and the scale of each group [B, H, *, D]."""
        size = x.shape[-1] if self.axis == "token" else self.group
        limit = torch.finfo(torch.float16).max
        groups = levels.grouped(x.float().clamp(-limit, limit), self.axis, size)
        size_of = groups.abs()
        near = THRESHOLD * size_of.mean(-1, keepdim=True)
        signs = torch.where(size_of > near, groups.sign(), 0.0)
        if self.scale == "unbiased":
            scale = levels.unbiased(groups, signs, -1)
        else:
            count = signs.abs().sum(-1, keepdim=True).clamp_min(1)
            scale = ((groups * signs).sum(-1, keepdim=True) / count).half()
        codes = levels.whole((signs + 1).to(torch.uint8), self.axis)
        return Code(levels.stored_trits(codes), (scale.squeeze(-1),))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns code * scale."""
        head_dim = code.body.shape[-1] * levels.TRITS // PAGE
        codes = levels.restored_trits(code.body, head_dim).float() - 1
        size = head_dim if self.axis == "token" else self.group
        groups = levels.grouped(codes, self.axis, size)
        return levels.whole(groups * code.side[0].float().unsqueeze(-1), self.axis).to(site.dtype)
