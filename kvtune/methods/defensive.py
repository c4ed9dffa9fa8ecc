"""Worst case: tokens win that any query of the window may need (DefensiveKV, arXiv:2510.13334)."""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.pooling import pooled, raised, weight
from kvtune.retention import Selector
from kvtune.view import View, looked

MASS = 0.9  # of the attention, that the first stage holds


class Defensive(Selector):
    """score = max(worst, mean of worst) * ||W_o v||_1, under the tokens that hold most attention.

    worst is the largest attention of any of the last `window` queries of any query head of a kv
    head, each query's pooled over `kernel` neighbours and brought back to its sum before. The first
    stage takes the tokens of the largest mean attention, until 0.9 of it is reached. Where the
    output projection is not known, ||v||_2 stands for ||W_o v||_1.
    """

    window: Annotated[int, OneOf((8, 16, 32, 64))] = 32
    kernel: Annotated[int, OneOf((1, 5, 7))] = 5
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "output"})

    @property
    def observed(self) -> int:
        """The window."""
        return self.window

    def score(self, view: View) -> Tensor:
        """Both stages' scores, the first's above the second's, [B, H, T]."""
        each = looked(view, self.window)
        smooth = pooled(each, self.kernel, "mean")
        least = torch.finfo(each.dtype).tiny  # a query may look at sinks and window alone
        smooth = smooth * (each.sum(-1, keepdim=True) / smooth.sum(-1, keepdim=True).clamp(least))
        heads = view.keys.shape[1]
        worst = smooth.unflatten(1, (heads, -1)).amax((2, 3))
        floor = worst.mean(-1, keepdim=True)
        mean = each.unflatten(1, (heads, -1)).mean((2, 3))
        return raised(torch.maximum(worst, floor) * weight(view), _holding(mean), mean)


def _holding(mean: Tensor) -> Tensor:
    """Mask [B, H, T] of the largest, before the one that makes their sum 0.9 of the whole."""
    order = mean.shape[-1] - 1 - mean.flip(-1).argsort(dim=-1, descending=True, stable=True)
    reached = mean.gather(-1, order).cumsum(-1)
    inside = reached < MASS * mean.sum(-1, keepdim=True)
    return torch.zeros_like(inside).scatter(-1, order, inside)
