"""Budgets at the least price: what evicting a layer to several shares costs in KL."""

from typing import ClassVar

from torch import Tensor

from kvtune.gains import cheapest
from kvtune.retention import Allocator, Stats


class Priced(Allocator):
    """Minimises the sum of the layers' prices over all budgets of that sum.

    A layer's price is the KL that keeping a share of its tokens alone adds to the model's answers
    (see `prices`), so what the errors of several layers do together is left out.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"tokens.prices"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L], by `tokens.prices` [L, S, 2]: a share of the tokens that leave
        the window, the same in all layers and ascending, and what it costs in nats."""
        shares, prices = stats.tensors["tokens.prices"].double().unbind(-1)
        return cheapest(shares[0], prices, mean, stats.least, stats.most)
