"""Held: what batch rows of equal true length hold in a layer that selects tokens."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from kvtune.beside import Beside
from kvtune.errors import UnsupportedError
from kvtune.pages import MakeSite, Pages
from kvtune.policy import Policy
from kvtune.view import Spot

Pair = tuple[Tensor, Tensor]  # keys and values
Stored = tuple[Pages, Pages]


class Held:
    """Sinks | kept | rest | recent: the outer two exact, the others paged; and what is known of
    those that compete."""

    ragged = False  # all rows have one length

    def __init__(
        self, policy: Policy, sites: tuple[MakeSite, MakeSite], spot: Spot | None = None
    ) -> None:
        assert policy.select
        self.policy = policy
        self.seen = 0  # true tokens, padding not counted
        self.moved = 0  # tokens that have left the window, dropped ones included
        self.ahead = 0  # of a prompt's tokens, the last ones that are only looked at
        self.waits = False  # a prompt stays whole until `decide`
        self.kinds: Tensor | None = None  # bool [B, T] of a prompt's tokens
        self._select, self._spot = policy.select, spot or Spot()
        chains = [(policy.keys, policy.values), *([policy.rest] if policy.rest else [])]
        self.tiers: list[Stored] = [
            (Pages(keys, sites[0], policy.sinks), Pages(values, sites[1], policy.sinks))
            for keys, values in chains
        ]
        self._sinks: Pair | None = None
        self._recent: Pair | None = None
        self._beside = Beside()
        self._memory: Any = None  # the selector's
        self._folded: Any = None  # the merger's

    def read(self, dtype: torch.dtype) -> Pair:
        """Keys and values [B, H, n, D] as the next query reads them; what was dropped is gone."""
        sides = []
        for side in (0, 1):
            exact = [pair[side] if pair else None for pair in (self._sinks, self._recent)]
            decoded = [tier[side].read(dtype) for tier in self.tiers]
            found = [x for x in (exact[0], *decoded, exact[1]) if x is not None]
            sides.append(torch.cat(found, 2) if len(found) > 1 else found[0])
        return sides[0], sides[1]

    @property
    def exact(self) -> int:
        """How many of the last tokens are still exact: the window, and all while none has moved."""
        return self._last if self.moved else self.seen

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens; UnsupportedError when they are no longer exact."""
        if count > self.exact:
            raise UnsupportedError(
                f"Cannot crop {count} tokens: only the last {self.exact} are still exact.",
                "Use a recipe with more `recent`.",
            )
        assert self._recent is not None
        self.seen -= count
        self._beside = self._beside.crop(self._last, count)
        last = max(0, self._last - count)
        self._recent = self._recent[0][:, :, :last].clone(), self._recent[1][:, :, :last].clone()
        if self._sinks is not None:
            first = min(self.policy.sinks, self.seen)
            self._sinks = self._sinks[0][:, :, :first].clone(), self._sinks[1][:, :, :first].clone()

    def select(self, rows: Tensor) -> Self:
        """Other batch rows of the same tokens: beams, samples."""
        twin = self.fork()
        twin.tiers = [(keys.select(rows), values.select(rows)) for keys, values in self.tiers]
        twin._sinks, twin._recent = _rows(self._sinks, rows), _rows(self._recent, rows)
        twin._beside = self._beside.select(rows)
        if isinstance(self._folded, Tensor):
            twin._folded = self._folded.index_select(0, rows)
        return twin

    def fork(self) -> Self:
        """A copy-on-write twin: what happens to it leaves this one as it is."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)  # tensors are replaced, never written into
        twin.tiers = [(keys.fork(), values.fork()) for keys, values in self.tiers]
        return twin

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held for keys, and for values: metadata, sinks and window included; what a selector
        wants to know counts as keys'."""
        pairs = [pair for pair in (self._sinks, self._recent) if pair]
        keys, values = (
            sum(x[side].untyped_storage().nbytes() for x in pairs)
            + sum(tier[side].nbytes for tier in self.tiers)
            for side in (0, 1)
        )
        folded = self._folded.nbytes if isinstance(self._folded, Tensor) else 0
        own = self._beside.nbytes + folded
        return keys + own, values

    def _needs(self, what: str) -> bool:
        return what in self.policy.needs

    @property
    def _kept(self) -> int:
        return self.tiers[0][0].tokens

    @property
    def _last(self) -> int:
        return 0 if self._recent is None else self._recent[0].shape[2]

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        self.seen += keys.shape[2]
        missing = self.policy.sinks - (self._sinks[0].shape[2] if self._sinks else 0)
        if missing > 0:
            first = keys[:, :, :missing], values[:, :, :missing]
            self._sinks = _join(self._sinks, first)
            keys, values = keys[:, :, missing:], values[:, :, missing:]
        self._recent = _join(self._recent, (keys, values))

    def _own(self) -> None:
        """Clones what is exact, so that it owns just its bytes."""
        assert self._recent is not None
        self._recent = self._recent[0].clone(), self._recent[1].clone()
        self._beside = self._beside.owned()


def _join(held: Pair | None, more: Pair) -> Pair:
    if held is None:
        return more[0].clone(), more[1].clone()
    return torch.cat([held[0], more[0]], 2), torch.cat([held[1], more[1]], 2)


def _rows(pair: Pair | None, rows: Tensor) -> Pair | None:
    return None if pair is None else (pair[0].index_select(0, rows), pair[1].index_select(0, rows))
