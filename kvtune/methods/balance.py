"""Balances the channels of keys and queries, so that outlier channels of keys do not set the scale
of a token (MiKV, arXiv:2402.18096)."""

import torch
from torch import Tensor

from kvtune.parts import Fold, Seen
from kvtune.turns import Turn


class Balance(Turn):
    """k b with b = sqrt(max |q| / max |k|) for each channel, and q / b when they meet.

    With grouped queries the maximum is over all query heads of the kv head. MiKV takes both maxima
    from each prompt; here they are calibrated, so that a cache has one b from its first token on.
    """

    def check(self, head_dim: int, side: str) -> None:
        """Only keys meet queries."""
        if side != "keys":
            raise ValueError("balance works on keys: values meet no queries")

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """A factor for each channel in 16 bits."""
        return {"factor": torch.empty(heads, head_dim, dtype=torch.float16, device="meta")}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the factors; a channel that is always zero keeps its scale."""
        asked, held = seen.readers.abs().amax(1), seen.sample.abs().amax(1)
        factor = (asked / held).sqrt()
        factor = torch.where((asked > 0) & (held > 0), factor, torch.ones_like(factor))
        return {"factor": factor.clamp(1e-3, 1e3).half()}

    def made(self, tensors: dict[str, Tensor]) -> Fold:
        """A diagonal."""
        factor = tensors["factor"].float()
        zero = torch.zeros_like(factor)
        return Fold(zero, torch.diag_embed(factor), torch.diag_embed(1 / factor))
