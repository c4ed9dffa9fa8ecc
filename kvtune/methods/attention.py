"""Accumulated attention: tokens win that got the most of it (H2O, arXiv:2306.14048; MiKV)."""

from typing import ClassVar

from torch import Tensor

from kvtune.retention import Selector
from kvtune.view import View


class Attention(Selector):
    """score = attention mass, summed over all queries so far and the query heads of a kv head.

    MiKV (arXiv:2402.18096) gives the tokens that do not win a low-bit tier instead of dropping
    them. Early tokens are seen by more queries, and are so preferred; the papers leave it at that.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    def score(self, view: View) -> Tensor:
        """What the layer summed up, [B, H, T]."""
        assert view.attention is not None, "the layer gives what a part needs"
        return view.attention
