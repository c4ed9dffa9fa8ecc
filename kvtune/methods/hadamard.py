"""Turns heads by a Hadamard matrix, which spreads outliers over
all channels (QuaRot, arXiv:2404.00456)."""

import torch
from torch import Tensor

from kvtune.orthogonal import core, matrix, turned
from kvtune.parts import Code, Codec, Fold, Site


class Hadamard(Codec):
    """x H / sqrt(D) with an orthonormal matrix of plus and minus ones, and back by its transpose.

    Heads of 1, 12 or 20 times a power of two channels have one: Sylvester's matrix times one of
    Paley's. The turn is exact, so this part alone changes nothing and saves nothing; it pays before
    a quantiser whose groups lie along the channels.
    """

    linear = True

    def check(self, head_dim: int, side: str) -> None:
        """There is a matrix of the head's size."""
        if core(head_dim) is None:
            raise ValueError(
                f"hadamard turns 1, 12 or 20 times a power of two channels: head_dim {head_dim} "
                "is none of them"
            )

    def fold(self, site: Site, heads: int, head_dim: int) -> Fold:
        """The matrix itself, for every head."""
        turn = matrix(head_dim).expand(heads, -1, -1)
        return Fold(torch.zeros(heads, head_dim), turn, turn.transpose(-1, -2))

    def encode(self, x: Tensor, site: Site) -> Code:
        """Returns the turned x [B, H, T, D]."""
        return Code(turned(x, inverse=False).to(x.dtype))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns x [B, H, T, D], turned back."""
        return turned(code.body, inverse=True).to(site.dtype)
