"""Ladders: each token lives on in some layers, as a step of a stair (LaCache, arXiv:2507.14204)."""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from kvtune.ladders import Ladder as Stairs
from kvtune.ladders import Pattern
from kvtune.marks import Upto
from kvtune.retention import Choice, Selector
from kvtune.view import View


class Ladder(Selector):
    """Tokens stay by their place alone: layer by layer other ones, in all layers as many.

    `span` layers keep a token, `overlap` of them share it with the next step; what a model does not
    have is brought to what it has. A span of 0 is the part of all layers that `share` is, as the
    paper advises, and half of them under a `budget`, as in its runs on endless text.

    The layer's sinks are LaCache's first tokens and its window the end of its tail, both outside of
    the view: the stair begins with the view, and of as many tokens as there are layers, which
    LaCache leaves at the end, the window is a part. Its code lets a cache hold half a block more
    than asked for; here `budget` is never exceeded. By share there is no cache of a set size: every
    block has a stair of its own. Keys are turned by their place in the cache.
    """

    span: Annotated[int, Upto(1024, (0, 8, 9, 14, 16))] = 0
    overlap: Annotated[int, Upto(1023, (0, 3, 7))] = 0
    pattern: Pattern = "repo"
    by_place: ClassVar[bool] = True

    @property
    def in_cache(self) -> bool:
        """Always."""
        return True

    def stairs(self, layers: int) -> Stairs:
        """The ladder of a model with so many layers."""
        part = 0.5 if self.budget else self.share
        return Stairs(layers, self.span or round(part * layers), self.overlap, self.pattern)

    def score(self, view: View) -> Tensor:
        """The later the better [B, H, T]: what is asked of a part; `choose` goes by the stair."""
        count = view.keys.shape[2]
        return torch.arange(count, dtype=torch.float32, device=view.keys.device).expand(
            view.keys.shape[:3]
        )

    def choose(self, view: View, count: int) -> Choice:
        """At most `count` places of the layer's stair; its cursor is remembered."""
        batch, heads, length = view.keys.shape[:3]
        stairs = self.stairs(view.spot.layers)
        window = 0 if view.last is None else view.last.shape[2]
        cursor, spare = view.memory or 0, max(0, stairs.layers - window)
        if not self.budget:
            cursor = spare = 0
        found = stairs.compact(view.spot.layer, length, count, cursor, spare=spare)
        places = found.places.to(view.keys.device).expand(batch, heads, -1)
        return Choice(places, found.cursor)
