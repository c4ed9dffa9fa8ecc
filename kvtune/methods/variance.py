"""Budgets by how evenly a layer's attention is spread (D2O)."""

from typing import ClassVar

from torch import Tensor

from kvtune.retention import Allocator, Stats
from kvtune.shares import exact

LEAST = 0.01  # of all tokens: no layer gets fewer


class Variance(Allocator):
    """share_l = clamp(L rho softmax(-v)_l, 0.01, 1) with v_l = the variance of attention mass.

    A layer whose attention spreads over all tokens has a low variance and gets more of them (D2O,
    arXiv:2406.13035). There what the clamps take or add is lost, so that the sum drifts off the
    budget; here all layers are shifted alike until the sum is exact.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"tokens.variances"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L], by `tokens.variances` [L]."""
        part = (-stats.tensors["tokens.variances"].double()).softmax(0)
        share = (part * stats.layers * mean / stats.most).clamp(LEAST, 1)
        return exact(share * stats.most, mean * stats.layers, stats.least, stats.most)
