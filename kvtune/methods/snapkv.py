"""Observation window: tokens win that the last queries look at (SnapKV, arXiv:2404.14469)."""

from typing import Annotated, ClassVar, Literal

from torch import Tensor

from kvtune.marks import OneOf
from kvtune.pooling import watched
from kvtune.retention import Selector
from kvtune.view import View


class Snapkv(Selector):
    """score = mean attention of the last `window` queries, pooled over `kernel` neighbours.

    The query heads of a kv head are reduced to one score, so that a kv head keeps one set of
    tokens: their mean keeps what matters on average, their largest what matters to any.
    """

    window: Annotated[int, OneOf((8, 16, 32, 64))] = 32
    kernel: Annotated[int, OneOf((1, 5, 7))] = 5
    pool: Literal["mean", "max"] = "mean"
    reduce: Literal["mean", "max"] = "mean"
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    @property
    def observed(self) -> int:
        """The window."""
        return self.window

    def score(self, view: View) -> Tensor:
        """Attention from 0 to 1, [B, H, T]."""
        return watched(view, self.window, self.kernel, self.pool, self.reduce)
