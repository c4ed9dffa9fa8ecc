"""Budgets by how far a layer's answers move when it is evicted to a few tokens (CompressKV)."""

from typing import Annotated, ClassVar

from torch import Tensor

from kvtune.marks import OneOf
from kvtune.retention import Allocator, Stats
from kvtune.shares import dealt


class ErrorProfile(Allocator):
    """tokens_l = floor + e_l (the sum of budgets - L floor), e_l = a layer's part of all errors.

    No layer gets more than `times` the mean; what rounding and limits leave is given, or taken, one
    token a layer in the order of e (CompressKV, arXiv:2508.02401). Where sinks and window are
    longer than `floor`, they are the floor.
    """

    floor: Annotated[int, OneOf((0, 16, 32, 64))] = 32
    times: Annotated[int, OneOf((2, 3, 4))] = 3
    reads: ClassVar[frozenset[str]] = frozenset({"tokens.errors"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L], by `tokens.errors` [L], of whatever sum."""
        error = stats.tensors["tokens.errors"].double()
        error = error / error.sum().clamp_min(1e-300)
        total, low = mean * stats.layers, min(mean, max(stats.least, self.floor))
        high = min(stats.most, self.times * mean)
        found = low + (error * (total - low * stats.layers)).round().long()
        found = found.clamp(low, high)
        order = error.argsort(stable=True, descending=True)
        missing = total - int(found.sum())
        if missing >= 0:
            return found + dealt(high - found, missing, order)
        return found - dealt(found - low, -missing, order.flip(0))
