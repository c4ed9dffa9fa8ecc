"""Two stages: half of the tokens win by attention, half by what they add to the layer's output
(CriticalKV, arXiv:2502.03805)."""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.pooling import raised, watched, weight
from kvtune.retention import Choice, Selector
from kvtune.splits import parted
from kvtune.view import View

EPSILON = 1e-4  # so that a value counts where no query looks


class Critical(Selector):
    """The first half of the winners has the best s, the second the best (s + 1e-4) * ||W_o v||_1.

    s is the attention of the last `window` queries, pooled over `kernel` neighbours, as the mean
    over the query heads of a kv head. Where the output projection is not known, ||v||_2 stands for
    ||W_o v||_1.
    """

    window: Annotated[int, OneOf((8, 16, 32, 64))] = 32
    kernel: Annotated[int, OneOf((1, 5, 7))] = 5
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "output"})

    @property
    def observed(self) -> int:
        """The window."""
        return self.window

    def score(self, view: View) -> Tensor:
        """The second stage's scores, under those of the first, [B, H, T]; how many the first stage
        takes is told by `share` or `budget`, since no count is given."""
        length = view.keys.shape[2]
        count = min(self.budget, length) if self.budget else round(self.share * length)
        first, second = self._stages(view)
        return raised(second, _best(first, count), first)

    def choose(self, view: View, count: int) -> Choice:
        """Which `count` tokens stay, half by each stage; the first takes one at least."""
        first, second = self._stages(view)
        if self.alike:
            first, second = (x.mean(1, keepdim=True).expand_as(x) for x in (first, second))
        score = second.masked_fill(_best(first, count), torch.inf)
        return Choice(parted(score, count)[0])

    def _stages(self, view: View) -> tuple[Tensor, Tensor]:
        attention = watched(view, self.window, self.kernel, "mean", "mean")
        return attention, (attention + EPSILON) * weight(view)


def _best(score: Tensor, count: int) -> Tensor:
    """Mask [B, H, T] of the best half of `count` tokens, one at least."""
    places = parted(score, min(count, max(1, count // 2)))[0]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, places, True)
