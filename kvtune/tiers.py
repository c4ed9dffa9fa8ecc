"""Tiers: batch rows of equal true length in a layer that selects tokens, and how they are read."""

from __future__ import annotations

import torch
from kvtune_kernels import attend
from torch import Tensor
from torch.nn.functional import pad

from kvtune.attention import causal
from kvtune.errors import UnsupportedError
from kvtune.pages import MakeSite, Pages
from kvtune.policy import Policy
from kvtune.splits import gathered, parted
from kvtune.view import View, received

Pair = tuple[Tensor, Tensor]  # keys and values
Stored = tuple[Pages, Pages]


class Tiers:
    """The tokens of some batch rows in one layer: sinks | kept | rest | recent; outer two exact.

    What leaves the recent window is parted between two tiers, head by head, in whole blocks that
    are encoded once and never moved (MiKV, arXiv:2402.18096; without a rest tier the losers are
    gone, as in H2O, arXiv:2306.14048). The prompt, the first forward of an empty cache, is ranked
    as one; later each block is ranked within itself, by the attention that its tokens have got when
    it leaves. Keys keep the phases of their true positions, so a tier needs no order.

    A split depends on the queries of the prompt, so that a prompt in two pieces is another one.
    What follows the prompt does not depend on how it is cut: a chunk is read up to the next token
    at which a block leaves, and so on, as token by token. After a crop the sums keep what forgotten
    queries have looked at.
    """

    ragged = False  # all rows have one length

    def __init__(self, policy: Policy, sites: tuple[MakeSite, MakeSite]) -> None:
        assert policy.select and policy.split
        self.policy = policy
        self.seen = 0  # true tokens, padding not counted
        self.moved = 0  # tokens that have left the window, dropped ones included
        self._select, self._split = policy.select, policy.split
        # no codec of a tier reads positions (`to_policy` refuses these), so pages may count on
        chains = [(policy.keys, policy.values), *([policy.rest] if policy.rest else [])]
        self.tiers: list[Stored] = [
            (Pages(keys, sites[0], policy.sinks), Pages(values, sites[1], policy.sinks))
            for keys, values in chains
        ]
        self._sinks: Pair | None = None
        self._recent: Pair | None = None
        self._sums: Tensor | None = None  # [B, H, recent] of a selector that needs attention

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Adds keys and values [B, H, n, D] and answers their queries [B, Hq, n, D]."""
        count = keys.shape[2]
        if self.seen == 0:
            mask = causal(count, count, keys.device) if count > 1 else None
            out = attend(query, keys, values, mask, scale, softcap)
            self.fill(
                keys, values, received(query, keys, scale, softcap) if self._sums_up else None
            )
            return out
        found, start = [], 0
        while start < count:
            end = min(count, start + self._until_due)
            q, k, v = (x[:, :, start:end] for x in (query, keys, values))
            found.append(self._read_on(q, k, v, scale, softcap))
            start = end
        return torch.cat(found, 2) if len(found) > 1 else found[0]

    def fill(self, keys: Tensor, values: Tensor, attention: Tensor | None) -> None:
        """Takes a context [B, H, T, D] that was computed densely, as a prompt's forward would leave
        it, with the attention [B, H, T] that its tokens got where the selector needs it."""
        assert not self._sums_up or attention is not None, "the selector needs attention"
        self.seen, sinks = keys.shape[2], self.policy.sinks
        if sinks:
            self._sinks = keys[:, :, :sinks].clone(), values[:, :, :sinks].clone()
        self._recent = keys[:, :, sinks:], values[:, :, sinks:]
        if attention is not None:
            self._sums = attention[:, :, sinks:]
        self._settle()
        self._own()  # the prompt's tensors may be views of more

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
        last = max(0, self._last - count)
        self._recent = self._recent[0][:, :, :last].clone(), self._recent[1][:, :, :last].clone()
        if self._sums is not None:
            self._sums = self._sums[:, :, :last].clone()
        if self._sinks is not None:
            first = min(self.policy.sinks, self.seen)
            self._sinks = self._sinks[0][:, :, :first].clone(), self._sinks[1][:, :, :first].clone()

    def select(self, rows: Tensor) -> Tiers:
        """Other batch rows of the same tokens: beams, samples."""
        twin = self.fork()
        twin.tiers = [(keys.select(rows), values.select(rows)) for keys, values in self.tiers]
        twin._sinks, twin._recent = _rows(self._sinks, rows), _rows(self._recent, rows)
        twin._sums = None if self._sums is None else self._sums.index_select(0, rows)
        return twin

    def fork(self) -> Tiers:
        """A copy-on-write twin: what happens to it leaves this one as it is."""
        twin = Tiers.__new__(Tiers)
        twin.__dict__.update(self.__dict__)  # tensors are replaced, never written into
        twin.tiers = [(keys.fork(), values.fork()) for keys, values in self.tiers]
        return twin

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held for keys, and for values: metadata, sinks and window included; the sums of
        attention count as keys'."""
        pairs = [pair for pair in (self._sinks, self._recent) if pair]
        keys, values = (
            sum(x[side].untyped_storage().nbytes() for x in pairs)
            + sum(tier[side].nbytes for tier in self.tiers)
            for side in (0, 1)
        )
        sums = 0 if self._sums is None else self._sums.untyped_storage().nbytes()
        return keys + sums, values

    @property
    def _sums_up(self) -> bool:
        return "attention" in self._select.needs

    @property
    def _last(self) -> int:
        return 0 if self._recent is None else self._recent[0].shape[2]

    @property
    def _until_due(self) -> int:
        """Tokens that may still come before a block leaves the window; at least one."""
        window = self.policy.sinks + self.policy.recent + self._split.block
        return window + self.moved - self.seen

    def _read_on(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """As `attend`, of tokens among which nothing leaves the window."""
        count = keys.shape[2]
        self._extend(keys, values)
        every = self.read(query.dtype)
        mask = causal(count, every[0].shape[2], keys.device) if count > 1 else None
        out = attend(query, *every, mask, scale, softcap)
        if self._sums is not None and self._last:
            got = received(query, every[0], scale, softcap)[:, :, -self._last :]
            self._sums = pad(self._sums, (0, self._last - self._sums.shape[2])) + got
        if self._settle():
            self._own()
        return out

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        self.seen += keys.shape[2]
        missing = self.policy.sinks - (self._sinks[0].shape[2] if self._sinks else 0)
        if missing > 0:
            first = keys[:, :, :missing], values[:, :, :missing]
            self._sinks = _join(self._sinks, first)
            keys, values = keys[:, :, missing:], values[:, :, missing:]
        self._recent = _join(self._recent, (keys, values))

    def _settle(self) -> bool:
        """Parts what has left the recent window; returns whether anything has."""
        assert self._recent is not None
        due = self.policy.due(self.seen) - self.moved
        if due <= 0:  # less than nothing after a crop
            return False
        leaving = self._recent[0][:, :, :due], self._recent[1][:, :, :due]
        sums = None if self._sums is None else self._sums[:, :, :due]
        score = self._select.score(View(*leaving, sums))
        parts = parted(score, due // self._split.block * self._split.kept)
        for tier, places in zip(self.tiers, parts, strict=False):  # without a rest they are dropped
            for pages, x in zip(tier, leaving, strict=True):
                pages.append(gathered(x, places))
        self.moved += due
        self._recent = self._recent[0][:, :, due:], self._recent[1][:, :, due:]
        self._sums = None if self._sums is None else self._sums[:, :, due:]
        return True

    def _own(self) -> None:
        """Clones the exact tokens, so that they own just their bytes."""
        assert self._recent is not None
        self._recent = self._recent[0].clone(), self._recent[1].clone()
        self._sums = None if self._sums is None else self._sums.clone()


def _join(held: Pair | None, more: Pair) -> Pair:
    if held is None:
        return more[0].clone(), more[1].clone()
    return torch.cat([held[0], more[0]], 2), torch.cat([held[1], more[1]], 2)


def _rows(pair: Pair | None, rows: Tensor) -> Pair | None:
    return None if pair is None else (pair[0].index_select(0, rows), pair[1].index_select(0, rows))
