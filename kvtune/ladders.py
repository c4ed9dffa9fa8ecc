"""Ladders: which tokens each layer keeps, so that every token lives on in some layers (LaCache)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pattern = Literal["repo", "contiguous"]


class Compacted(NamedTuple):
    """What stays of N tokens of a layer: their places, ascending, and where the next stair begins.

    All left of the cursor has been compacted already.
    """

    places: Tensor  # int64 [n]
    cursor: int


class Stair(NamedTuple):
    """One block of a ladder: of `before` tokens each layer keeps `after`, `apart` from each other.

    A layer's first one stands at its `offset`.
    """

    before: int
    after: int
    apart: int = 1

    @property
    def removed(self) -> int:
        """Tokens that a block takes from every layer."""
        return self.before - self.after

    @property
    def offsets(self) -> int:
        """How many different offsets fit into a block."""
        return self.before - (self.after - 1) * self.apart


@dataclass(frozen=True)
class Ladder:
    """The ladder of a model with so many layers (LaCache, arXiv:2507.14204, and its code).

    A token is kept in about `span` layers, and neighbouring steps share `overlap` of them. Both are
    brought to what the model has: a span of 1 ... layers, an overlap below the span. Where every
    layer keeps a whole block (`span` = layers, say) a stair takes nothing: then the oldest tokens
    go, as in StreamingLLM.

    "repo" is the pattern of the authors' code, whose offsets repeat every few layers; "contiguous"
    is that of the paper's figure: shallow layers keep the older tokens, deep ones the newer.
    """

    layers: int
    span: int
    overlap: int = 0
    pattern: Pattern = "repo"

    @property
    def stair(self) -> Stair:
        """One block of the ladder."""
        span = min(max(self.span, 1), self.layers)
        step = span - min(max(self.overlap, 0), span - 1)
        before = 1 + math.ceil((self.layers - span) / step)
        return Stair(before, min(math.ceil(span / step), before))

    def wider(self, times: int) -> Stair:
        """A block that takes at least `times` as much: what is kept stands `times` apart.

        Its offsets end where its last token would leave the block. (The authors' code lets it
        leave, and keeps tokens twice, where more than one of a block is kept.)
        """
        before, after, _ = self.stair
        return Stair(1 + times * (before - 1), after, times)

    def capacity(self, mean: int) -> int:
        """The capacity at which a layer holds `mean` tokens on average: it sinks by up to a block
        at each compaction."""
        return mean + self.stair.removed // 2

    def offset(self, layer: int, stair: Stair) -> int:
        """Where a layer's first token of a block stands."""
        if self.pattern == "contiguous":
            return layer * stair.offsets // self.layers
        return layer % stair.offsets

    def slots(self, layer: int, blocks: int, stair: Stair | None = None) -> Tensor:
        """The places [blocks * after] that a layer keeps of so many blocks, from 0."""
        stair = stair or self.stair
        first = self.offset(layer, stair)
        one = torch.arange(stair.after) * stair.apart + first
        return (torch.arange(blocks)[:, None] * stair.before + one).flatten()

    def compact(
        self,
        layer: int,
        length: int,
        capacity: int,
        cursor: int = 0,
        start: int = 0,
        spare: int | None = None,
    ) -> Compacted:
        """What a layer keeps of `length` tokens: at most `capacity`, in every layer as many.

        The stair goes on at the cursor. Where the room behind it is too small, it goes to the end
        of it and starts over, over what it has left before, with a wider one where need be.

        Args:
            cursor: where the last compaction ended; `start` where there was none.
            start: tokens that are always kept, at the beginning (sinks).
            spare: tokens of the capacity that no stair reaches, as many as a block takes at least;
                as many as there are layers when left out.

        Raises:
            ValueError: a capacity that cannot hold what is always kept.
        """
        if capacity < start:
            raise ValueError(f"a capacity of {capacity} cannot hold {start} sinks")
        stair = self.stair
        spare = max(stair.removed, self.layers if spare is None else spare)
        ends = capacity - spare
        places, cursor = torch.arange(length), max(cursor, start)
        need = length - capacity
        if need <= 0:
            return Compacted(places, cursor)
        passes = max(0, ends - start) // stair.after * stair.removed  # what one whole pass takes
        if passes == 0:
            return Compacted(torch.cat([places[:start], places[start + need :]]), start)
        room = max(0, ends - cursor) // stair.after
        if need <= room * stair.removed:
            return self._pass(layer, places, cursor, stair, math.ceil(need / stair.removed))
        places, _ = self._pass(layer, places, cursor, stair, room)
        while (need := len(places) - capacity) > 0:
            reach = len(places) - start - (spare - self.stair.removed) - 1
            widest = (reach - 1) // (self.stair.before - 1)
            stair = self.wider(min(math.ceil(need / passes), widest))
            blocks = min(math.ceil(need / stair.removed), reach // stair.before)
            places, cursor = self._pass(layer, places, start, stair, blocks)
        return Compacted(places, cursor)

    def _pass(
        self, layer: int, places: Tensor, cursor: int, stair: Stair, blocks: int
    ) -> Compacted:
        kept = places[cursor + self.slots(layer, blocks, stair)]
        behind = places[cursor + blocks * stair.before :]
        return Compacted(torch.cat([places[:cursor], kept, behind]), cursor + len(kept))
