"""Budgets of kv heads at the least price: what evicting a head to several shares costs in KL."""

from typing import ClassVar

from torch import Tensor

from kvtune.gains import cheapest
from kvtune.retention import Allocator, Stats


class PricedHeads(Allocator):
    """Minimises the sum of the prices of all kv heads of all layers, over all budgets of that sum.

    The prices of a layer's heads are in proportion to what each costs alone, and add up to the
    layer's. A layer in which heads differ stores them apart, each with its own length.
    """

    per_head: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"tokens.prices_by_head"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L, H], by `tokens.prices_by_head` [L, H, S, 2]: a share of the
        tokens that leave the window, the same everywhere and ascending, and its cost in nats."""
        shares, prices = stats.tensors["tokens.prices_by_head"].double().unbind(-1)
        found = cheapest(shares[0, 0], prices.flatten(0, 1), mean, stats.least, stats.most)
        return found.reshape(prices.shape[:2])
