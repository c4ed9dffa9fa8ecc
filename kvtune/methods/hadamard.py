"""Turns heads by a Hadamard matrix, which spreads outliers over
all channels (QuaRot, arXiv:2404.00456)."""

from functools import cache

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
        return _fold(heads, head_dim, site.positions.device)

    def encode(self, x: Tensor, site: Site) -> Code:
        """Returns the turned x [B, H, T, D]."""
        return Code(turned(x, inverse=False).to(x.dtype))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns x [B, H, T, D], turned back."""
        return turned(code.body, inverse=True).to(site.dtype)


@cache
def _fold(heads: int, head_dim: int, device: torch.device) -> Fold:
    """One for all layers of a device."""
    with torch.inference_mode(False):  # it is kept beyond the caller's mode
        turn = matrix(head_dim).expand(heads, -1, -1).contiguous().to(device)
        symmetric = torch.equal(turn[0], turn[0].T)
        back = turn if symmetric else turn.transpose(-1, -2).contiguous()
        return Fold(torch.zeros(heads, head_dim, device=device), turn, back)
