"""Budgets of the kv heads of a layer by how their attention compares (Ada-KV)."""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.retention import Allocator, Stats
from kvtune.shares import levelled, reached, tokens


class Ada(Allocator):
    """The tokens of all heads of a layer compete in one row of scores, which the budget cuts.

    A head whose attention is spread out so gets more than one that looks at a few tokens, and the
    layer's sum is the same (Ada-KV, arXiv:2407.11550). Each head has `safeguard` of the mean for
    certain. Scores are of a calibration text, so that budgets are known before there is a prompt.
    """

    safeguard: Annotated[float, OneOf((0.0, 0.1, 0.2, 0.5))] = 0.2
    per_head: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"tokens.heads"})

    def allot(self, stats: Stats, mean: int) -> Tensor:
        """Returns tokens, int64 [L, H], by `tokens.heads` [L, H, K]: the scores of the tokens that
        compete, from the best, in even steps, to the worst."""
        scores = stats.tensors["tokens.heads"].double()
        return torch.stack([self._layer(own, stats, mean) for own in scores])

    def _layer(self, scores: Tensor, stats: Stats, mean: int) -> Tensor:
        # the best of all is at 0, so thresholds are from 0 to 1
        falls = (1 - scores / scores.max().clamp_min(1e-300)).contiguous()
        sure = stats.least + int(self.safeguard * (mean - stats.least))
        compete = stats.most - stats.least

        def counts(threshold: float) -> Tensor:
            return stats.least + tokens(reached(falls, threshold), compete)

        return levelled(counts, mean * len(scores), sure, stats.most)
