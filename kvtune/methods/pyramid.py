"""A pyramid: budgets fall in a straight line from the first layer to the last (PyramidKV)."""

from typing import Annotated

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.retention import Allocator, Stats
from kvtune.shares import exact


class Pyramid(Allocator):
    """tokens_l = least + top - l (top - end) / (L - 1), end = spare / beta, top + end = 2 spare.

    Early layers look at many tokens, late ones at few (PyramidKV, arXiv:2406.02069). `spare` is
    what the mean leaves beside sinks and window. Where the first layer would hold more tokens than
    there are, it holds all of them, and the last layer gets what that leaves.
    """

    beta: Annotated[int, OneOf((2, 5, 10, 20))] = 20

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L]."""
        spare = mean - stats.least
        top = min(2 * spare - spare / self.beta, stats.most - stats.least)
        fall = torch.linspace(1, -1, stats.layers, dtype=torch.float64)
        if stats.layers == 1:
            fall = torch.zeros(1, dtype=torch.float64)
        wanted = mean + fall * (top - spare)
        return exact(wanted, mean * stats.layers, stats.least, stats.most)
