"""A uniform budget: every layer holds as many tokens as the others."""

import torch
from torch import Tensor

from kvtune.retention import Allocator, Stats


class Uniform(Allocator):
    """tokens = the mean, everywhere: what other allocators are measured against."""

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L]."""
        return torch.full((stats.layers,), mean)
