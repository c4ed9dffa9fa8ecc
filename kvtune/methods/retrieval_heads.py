"""Retrieval heads: tokens win that those query heads look at which fetch facts (CompressKV)."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvtune.marks import OneOf
from kvtune.pooling import pooled
from kvtune.retention import Selector
from kvtune.view import View, looked

NAME = "retrieval_heads.heads"


class RetrievalHeads(Selector):
    """score = sum over the last `window` queries, pooled over `kernel` tokens, mean over heads.

    CompressKV (arXiv:2508.02401): of each layer only the `first` query heads count whose attention
    goes to the answer where the model tells one, each against its own kv head (`retrieval.scores`
    of a profile). All kv heads keep the same tokens.
    """

    window: Annotated[int, OneOf((4, 8, 16, 32))] = 8
    first: Annotated[int, OneOf((1, 2, 4, 8))] = 4
    kernel: Annotated[int, OneOf((1, 3, 5, 7))] = 5
    alike: Annotated[bool, OneOf((True,))] = True
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    fits: ClassVar[bool] = True

    @property
    def observed(self) -> int:
        """The window."""
        return self.window

    def blanks(self, query_heads: int, kv_heads: int, head_dim: int) -> dict[str, Tensor]:
        """Which query heads count."""
        return {"heads": torch.empty(query_heads, dtype=torch.bool, device="meta")}

    def fit(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The `first` heads of the largest retrieval scores [Hq], all where there are fewer."""
        scores = seen["retrieval.scores"]
        best = scores.argsort(descending=True, stable=True)[: self.first]
        return {"heads": torch.zeros_like(scores, dtype=torch.bool).index_fill(0, best, True)}

    def score(self, view: View) -> Tensor:
        """What the heads that count look at, [B, H, T]."""
        rows = looked(view, self.window).sum(2)  # [B, Hq, T]
        share = view.spot.tensors[NAME].to(rows)
        share = share + (share.sum() == 0)  # of some kv heads alone perhaps none counts: all do
        mean = (rows * (share / share.sum())[:, None]).sum(1, keepdim=True)
        return pooled(mean, self.kernel, "mean").expand(-1, view.keys.shape[1], -1)
