"""Budgets at the least price: what evicting a layer to several shares costs in KL."""

from typing import ClassVar

import torch
from torch import Tensor

from kvtune.retention import Allocator, Stats
from kvtune.shares import levelled, tokens


class Priced(Allocator):
    """Minimises the sum of the layers' prices over all budgets of that sum.

    Prices were measured at some shares. In between, the price of a layer is the largest convex
    function below them, and nothing is lost where all is kept. Then each token has a gain, and
    the budget that takes the best gains of all layers is exact: no knapsack is cheaper. Layers are
    priced alone, so what their errors do together is left out.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"tokens.prices"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L], by `tokens.prices` [L, S, 2]: a share of the tokens that leave
        the window, the same in all layers and ascending, and what it costs in nats."""
        shares, prices = stats.tensors["tokens.prices"].double().unbind(-1)
        knots, gains = gained(shares[0], prices)
        losses = 1 - gains / gains.max().clamp_min(1e-300)
        compete = stats.most - stats.least

        def counts(threshold: float) -> Tensor:
            at = torch.searchsorted(
                losses, torch.full((stats.layers, 1), threshold, dtype=losses.dtype)
            )
            return stats.least + tokens(knots[at[:, 0]], compete)

        return levelled(counts, mean * stats.layers, stats.least, stats.most)


def gained(shares: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """Shares [K + 1] from 0 to 1, and how fast convex prices fall between them [L, K], per share.

    Below the first share they go on as they begin.
    """
    known = shares < 1
    knots = torch.cat([shares[known], torch.ones(1, dtype=shares.dtype)])
    prices = torch.cat([prices[:, known].clamp_min(0), torch.zeros_like(prices[:, :1])], 1)
    gains = torch.stack([_falls(knots, own) for own in prices])
    if knots[0] > 0:
        knots = torch.cat([torch.zeros(1, dtype=shares.dtype), knots])
        gains = torch.cat([gains[:, :1], gains], 1)
    return knots, gains


def _falls(knots: Tensor, prices: Tensor) -> Tensor:
    """How fast the lower convex hull of prices [K + 1] falls between knots, [K]."""
    found, at, last = torch.zeros(len(knots) - 1, dtype=prices.dtype), 0, len(knots) - 1
    while at < last:
        slopes = (prices[at] - prices[at + 1 :]) / (knots[at + 1 :] - knots[at])
        end = at + 1 + int(slopes.argmax())
        found[at:end] = slopes[end - at - 1].clamp_min(0)
        at = end
    return found
