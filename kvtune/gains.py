"""Gains: what each further token is worth, by prices at a few shares; and the cheapest budgets."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtune.shares import levelled, tokens


def cheapest(shares: Tensor, prices: Tensor, mean: int, least: int, most: int) -> Tensor:
    """The numbers of tokens int64 [n], of that mean and within limits, whose prices [n, S] have the
    least sum; `shares` [S], ascending, are of the tokens between the limits.

    Between the shares, the price is the largest convex function below what was measured, and
    nothing is lost where all is kept. Then the best gains of all are the budget, and no knapsack
    is cheaper. A larger mean takes no token from any.
    """
    knots, gains = gained(shares, prices)
    losses = 1 - gains / gains.max().clamp_min(1e-300)

    def counts(threshold: float) -> Tensor:
        at = torch.searchsorted(losses, torch.full_like(losses[:, :1], threshold))
        return least + tokens(knots[at[:, 0]], most - least)

    return levelled(counts, mean * len(prices), least, most)


def gained(shares: Tensor, prices: Tensor) -> tuple[Tensor, Tensor]:
    """Shares [K + 1] from 0 to 1, and how fast convex prices fall between them [n, K], per share.

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
