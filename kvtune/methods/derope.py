"""Stores keys as they were before the rotary embedding
(pre-RoPE keys; KVQuant, arXiv:2401.18079)."""

from torch import Tensor

from kvtune.parts import Code, Codec, Site


class Derope(Codec):
    """Turns keys back by their positions on the way in, and forward again on the way out.

    Low-rank methods and per-channel statistics want keys before rotation; the turn is exact, so
    this part alone changes nothing and saves nothing.
    """

    needs = frozenset({"rope"})
    unturns = True

    def check(self, head_dim: int, side: str) -> None:
        """Only keys are rotated."""
        if side != "keys":
            raise ValueError("derope works on keys: values carry no rotary embedding")

    def encode(self, x: Tensor, site: Site) -> Code:
        """Returns pre-RoPE keys [B, H, T, D]."""
        assert site.rope is not None, "load() gives every chain that needs it a rope"
        return Code(site.rope.unturn(x, site.positions))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns post-RoPE keys [B, H, T, D]."""
        assert site.rope is not None, "load() gives every chain that needs it a rope"
        return site.rope.turn(code.body, site.positions)
