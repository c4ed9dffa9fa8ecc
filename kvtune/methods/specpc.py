"""SpecPC: a prompt is cut to the tokens that a small model looks at, before it is read."""

from typing import Annotated

from torch import Tensor

from kvtune.marks import OneOf
from kvtune.shortening import Shortener, chosen


class Specpc(Shortener):
    """A token's score is the most attention that the draft's last `window` queries gave it.

    SpecPC (arXiv:2506.08373): over all heads and all layers but the first `skip`, later queries
    counting more; max-pooled over `kernel`, and with its neighbours. The model reads the `budget`
    best as a prompt of its own, at positions 0, 1, 2, ...
    """

    window: Annotated[int, OneOf((16, 32, 64, 128))] = 64
    skip: Annotated[int, OneOf((0, 2, 4, 8, 12))] = 8
    kernel: Annotated[int, OneOf((16, 32, 64))] = 32

    def keep(self, score: Tensor) -> Tensor:
        """The best of scores [T], in their order."""
        return chosen(score, self.budget, self.window, self.kernel // 2)
