"""One threshold for all layers: the fewest tokens that cover so much attention (PrefixKV)."""

from typing import ClassVar

from torch import Tensor

from kvtune.retention import Allocator, Stats
from kvtune.shares import levelled, reached, tokens


class Prefix(Allocator):
    """tokens_l = the least o for which a layer's o best tokens have the share p of its attention.

    One p for all layers, found by bisection so that the budget is met (PrefixKV, arXiv:2412.03409).
    The paper scales what the search gives to its sum; here the tokens of the last step of p are
    dealt out one by one, so that a larger budget takes no token from any layer. A layer
    has at least its sinks and its window, which count among its best tokens.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"tokens.curves"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L], by `tokens.curves` [L, K]: the attention that the best tokens
        of a layer cover, by their part of all tokens in even steps from none to all."""
        curves = stats.tensors["tokens.curves"].double().contiguous()

        def counts(p: float) -> Tensor:
            return tokens(reached(curves, p), stats.most)

        return levelled(counts, mean * stats.layers, stats.least, stats.most)
