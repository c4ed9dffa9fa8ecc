"""One threshold for all layers: the fewest tokens that cover so much attention (PrefixKV)."""

from typing import ClassVar

from torch import Tensor

from kvtune.retention import Allocator, Stats
from kvtune.shares import levelled, reached, tokens


class Prefix(Allocator):
    """Layers keep the fewest tokens that have the share p of their attention, and the least.

    tokens_l = least + min(o: the o best of the tokens that compete have p of the layer's mass).
    One p for all layers, found by bisection so that the budget is met (PrefixKV, arXiv:2412.03409).
    The paper scales what the search gives to its sum; here the tokens of the last step of p are
    dealt out one by one, so that a larger budget takes no token from any layer.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"tokens.curves"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L], by `tokens.curves` [L, K]: the attention that the best tokens
        cover, by their part of those that compete, in even steps from none to all."""
        curves = stats.tensors["tokens.curves"].double().contiguous()
        compete = stats.most - stats.least

        def counts(p: float) -> Tensor:
            return stats.least + tokens(reached(curves, p), compete)

        return levelled(counts, mean * stats.layers, stats.least, stats.most)
