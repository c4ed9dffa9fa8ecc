"""Tiers: batch rows of equal true length in a layer that selects tokens, and how they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from kvtune_kernels import attend, say_once
from torch import Tensor

from kvtune.attention import causal
from kvtune.beside import Beside
from kvtune.errors import UnsupportedError
from kvtune.held import Held, Pair, Stored
from kvtune.retention import REMEMBERED
from kvtune.splits import gathered, others, parted
from kvtune.view import Observed, View, received


class Tiers(Held):
    """The tokens of some batch rows in one layer: sinks | kept | rest | recent; outer two exact.

    What leaves the recent window competes, head by head: what wins is kept, the others go to the
    rest tier (MiKV, arXiv:2402.18096), are folded into what won, or are gone (H2O,
    arXiv:2306.14048). The prompt, the first forward of an empty cache, competes as one.

    By share, a part of each block wins that leaves later; blocks are encoded once and never moved.
    Under a budget, what is kept competes again with each block, and codes are gathered, not made
    anew; where codecs see several tokens together, such blocks of tokens stay or go as a whole.
    Keys keep the phases of their true positions, so a tier needs no order; it has one all the same.

    What is read after a prompt does not depend on how it is cut: a chunk is read up to the next
    token at which a block leaves, and so on, as token by token. A prompt in two pieces is another
    prompt. After a crop the sums keep what forgotten queries have looked at.
    """

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
        self._spot = self._spot._replace(scale=scale, softcap=softcap)
        if self.seen == 0:
            self._check_prepared()
            mask = causal(count, count, keys.device) if count > 1 else None
            out = attend(query, keys, values, mask, scale, softcap)
            stay = count - self.ahead
            self.fill(keys[:, :, :stay], values[:, :, :stay], self._seen_of(query, keys))
            return out
        found, start = [], 0
        while start < count:
            end = min(count, start + self._until_due)
            q, k, v = (x[:, :, start:end] for x in (query, keys, values))
            found.append(self._read_on(q, k, v, scale, softcap))
            start = end
        return torch.cat(found, 2) if len(found) > 1 else found[0]

    def fill(self, keys: Tensor, values: Tensor, observed: Observed) -> None:
        """Takes a context [B, H, T, D] that was computed densely, as a prompt's forward would leave
        it, with what its selector needs to know of it."""
        self.seen, sinks = keys.shape[2], self.policy.sinks
        self._spot = self._spot._replace(scale=observed.scale, softcap=observed.softcap)
        if sinks:
            self._sinks = keys[:, :, :sinks].clone(), values[:, :, :sinks].clone()
        self._recent = keys[:, :, sinks:], values[:, :, sinks:]
        got, kinds = observed.attention, observed.kinds
        self._beside = Beside(
            sums=None if got is None else got[:, :, sinks:],
            marks=None if kinds is None else kinds[:, None, sinks:].expand(-1, keys.shape[1], -1),
            queries=observed.queries,
        )
        if not self.waits:
            self._settle_prompt(observed.ahead)
        self._own()  # the prompt's tensors may be views of more

    def decide(self, attention: Tensor | None) -> None:
        """Lets a prompt that has waited compete, where a selector needs a replay by what its tokens
        [B, H, T] got of it."""
        assert self.waits and self.moved == 0, "a prompt waits"
        self.waits = False
        if self._needs("replay"):
            assert attention is not None, "a replay was asked for"
            self._beside = replace(self._beside, sums=attention[:, :, self.policy.sinks :])
        self._settle_prompt(None)
        self._own()

    def _check_prepared(self) -> None:
        """Refuses a prompt that comes without what its selector needs of the model."""
        if (self._needs("replay") and not self.waits) or (self._needs("ahead") and not self.ahead):
            what = "a replay of the prompt" if self._needs("replay") else "what a draft model says"
            raise UnsupportedError(
                f"The selector {self._select.name()} needs {what}, which a plain forward does not "
                "give.",
                "Read the prompt with kvtune.prefill(model, cache, tokens, tokenizer=tokenizer), "
                "and generate behind it.",
            )

    @property
    def _until_due(self) -> int:
        """Tokens that may still come before a block leaves the window; at least one."""
        missing = max(0, self.policy.sinks - self.seen)
        due = missing + self.policy.recent + self.policy.block - self._last
        return max(1, due)

    def _seen_of(self, query: Tensor, keys: Tensor) -> Observed:
        """What a prompt's queries [B, Hq, n, D] tell, those that look ahead included."""
        scale, softcap = self._spot.scale, self._spot.softcap
        stay, found = query.shape[2] - self.ahead, Observed(scale=scale, softcap=softcap)
        if self._needs("attention"):
            got = received(query[:, :, :stay], keys[:, :, :stay], scale, softcap)
            found = found._replace(attention=got)
        if self._needs("queries"):
            most = min(stay, self._select.observed) + self.ahead
            found = found._replace(queries=query[:, :, query.shape[2] - most :])
        ahead = keys[:, :, stay:] if self.ahead else None
        return found._replace(kinds=self.kinds, ahead=ahead)

    def _read_on(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """As `attend`, of tokens among which nothing leaves the window."""
        self._extend(keys, values)
        out, got = self._answered(query, scale, softcap)
        beside = self._beside.asked(query, self._remembers).marked(self._known)
        self._beside = beside if got is None else beside.looked_at(got)
        if self._settle(self.policy.block):
            self._own()
        return out

    def _answered(
        self, query: Tensor, scale: float | None, softcap: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is read for queries [B, Hq, n, D] of the last tokens; and, where it is summed up,
        what those that compete [B, H, m] got of them."""
        every, count = self.read(query.dtype), query.shape[2]
        mask = causal(count, every[0].shape[2], query.device) if count > 1 else None
        out = attend(query, *every, mask, scale, softcap)
        if self._beside.sums is None:
            return out, None
        return out, self._of_known(received(query, every[0], scale, softcap))

    @property
    def _known(self) -> int:
        """Tokens that compete: those of the window, and under a budget those that are kept."""
        return self._last + (self._kept if self.policy.renews else 0)

    @property
    def _remembers(self) -> int:
        # of a query beyond the window the keys may be gone when a block leaves
        return min(self._select.observed, REMEMBERED, max(1, self.policy.recent))

    def _of_known(self, got: Tensor) -> Tensor:
        """Of what all stored tokens [B, H, n] got, the part of those that compete."""
        window = got[:, :, got.shape[2] - self._last :]
        if not self.policy.renews:
            return window
        first = self._sinks[0].shape[2] if self._sinks else 0
        return torch.cat([got[:, :, first : first + self._kept], window], 2)

    def _settle_prompt(self, ahead: Tensor | None) -> None:
        assert self._recent is not None
        if self.seen > 1 and self._last <= self.policy.recent and not self._recent[0].is_meta:
            say_once("A prompt no longer than sinks and window is kept whole: nothing is selected.")
        self._settle(self.policy.unit, ahead)
        if self._beside.queries is not None:
            end = self._beside.queries.shape[2] - (0 if ahead is None else ahead.shape[2])
            self._beside = self._beside.of_prompt(end, self._remembers)

    def _settle(self, step: int, ahead: Tensor | None = None) -> bool:
        """Lets what has left the recent window compete; returns whether anything has."""
        due = (self._last - self.policy.recent) // step * step
        if due <= 0 or (self.moved == 0 and due < self.policy.least):
            return False
        room = self.policy.room(due, self._kept)
        if self.policy.renews and self._kept:
            self._renew(due, room)
        else:
            self._part(due, room, ahead)
        assert self._recent is not None
        self.moved += due
        self._recent = self._recent[0][:, :, due:], self._recent[1][:, :, due:]
        return True

    def _part(self, due: int, room: int, ahead: Tensor | None) -> None:
        """Parts tokens that have left the window and are still exact: `room` of them win."""
        assert self._recent is not None
        view = self._view(due, None, ahead)
        places = self._chosen(view, room)
        lost = others(places, due)
        won = gathered(view.keys, places), gathered(view.values, places)
        if self.policy.merge is not None and lost.shape[2]:
            won = self._merged(view, places, lost)
        self._store(0, won, view, places)
        if self.policy.rest is not None:
            gone = gathered(view.keys, lost), gathered(view.values, lost)
            self._store(1, gone, view, lost)
        self._remember(view, places)

    def _renew(self, due: int, room: int) -> None:
        """Lets what is kept compete with tokens that have left the window."""
        view = self._view(due, self.tiers[0])
        total = view.keys.shape[2]
        if total <= room:  # there is room for all of them
            places = torch.arange(total, device=view.keys.device)
            places = places.expand(*view.keys.shape[:2], total)
        else:
            places = self._chosen(view, room)
        lost, kept = others(places, total), self._kept
        fresh = view._replace(keys=view.keys[:, :, kept:], positions=self._leaving(due))
        every = torch.arange(due, device=places.device).expand(*view.keys.shape[:2], due)
        own = self._positions_of(fresh, every)
        if self.policy.merge is not None and lost.shape[2]:
            # nothing that is kept here was encoded: see `selection`
            merged = self._merged(view, places, lost)
            self.tiers[0] = self.tiers[0][0].empty(), self.tiers[0][1].empty()
            self._store(0, merged, view, places)
        else:
            for pages, x in zip(self.tiers[0], (view.keys, view.values), strict=True):
                pages.append(x[:, :, kept:], own)
                block = pages.chain.block
                if lost.shape[2]:
                    pages.keep(places[:, :, ::block] // block)
        if self.policy.rest is not None and lost.shape[2]:
            gone = gathered(view.keys, lost), gathered(view.values, lost)
            self._store(1, gone, view, lost)
        self._remember(view, places)

    def _chosen(self, view: View, room: int) -> Tensor:
        """Places [B, H, n] of the tokens that win; of what is encoded in blocks, whole blocks."""
        if view.keys.is_meta:  # only shapes are asked for
            shape = (*view.keys.shape[:2], min(room, view.keys.shape[2]))
            return torch.zeros(shape, dtype=torch.long, device="meta")
        unit = self.policy.unit if self.policy.renews and self._kept else 1
        if unit > 1:
            score = self._select.score(view)
            if self._select.alike:
                score = score.mean(1, keepdim=True).expand_as(score)
            blocks = parted(score.unflatten(2, (-1, unit)).mean(-1), room // unit)[0]
            inside = torch.arange(unit, device=score.device)
            return (blocks[..., None] * unit + inside).flatten(2)
        choice = self._select.choose(view, min(room, view.keys.shape[2]))
        self._memory = choice.memory
        return choice.places

    def _view(self, due: int, held: Stored | None, ahead: Tensor | None = None) -> View:
        """What competes: what is held, if given, and the first `due` tokens of the window."""
        assert self._recent is not None
        keys, values = self._recent[0][:, :, :due], self._recent[1][:, :, :due]
        last = self._recent[0][:, :, due:]
        positions: Tensor | None = self._leaving(due)
        beside = self._beside
        if held is not None:
            decoded = [pages.read(keys.dtype) for pages in held]
            assert decoded[0] is not None and decoded[1] is not None
            keys, values = torch.cat([decoded[0], keys], 2), torch.cat([decoded[1], values], 2)
            fresh = self._leaving(due).expand(*keys.shape[:2], due)
            known = beside.places
            positions = None if known is None else torch.cat([known.long(), fresh], 2)
        if ahead is not None:
            last = torch.cat([last, ahead], 2)
        queries = beside.queries
        if queries is not None and self.moved:  # of an old one the keys may be gone
            queries = queries[:, :, -max(1, last.shape[2]) :]
        return View(
            keys,
            values,
            None if beside.sums is None else beside.sums[:, :, : keys.shape[2]],
            queries,
            self._sinks[0] if self._sinks else None,
            last,
            positions,
            self.seen + (0 if ahead is None else ahead.shape[2]),
            None if beside.marks is None else beside.marks[:, :, : keys.shape[2]],
            self._spot,
            self._memory,
            0 if ahead is None else ahead.shape[2],
        )

    def _merged(self, view: View, won: Tensor, lost: Tensor) -> Pair:
        assert self.policy.merge is not None
        sides = (picked_view(view, places, self._folded) for places in (won, lost))
        keys, values, self._folded = self.policy.merge.merge(*sides)
        return keys, values

    def _store(self, tier: int, pair: Pair, view: View, places: Tensor) -> None:
        positions = self._positions_of(view, places)
        for pages, x in zip(self.tiers[tier], pair, strict=True):
            pages.append(x, positions)

    def _positions_of(self, view: View, places: Tensor) -> Tensor | None:
        """True positions [B, H or 1, n] of some tokens, where a codec reads them."""
        if not self._needs("rope"):
            return None
        assert view.positions is not None
        own = view.positions.expand(*view.keys.shape[:2], -1).gather(2, places)
        return own[:, :1] if self._select.alike else own

    def _leaving(self, due: int) -> Tensor:
        """The true positions of the first `due` tokens of the window."""
        assert self._recent is not None
        start = self.policy.sinks + self.moved
        return torch.arange(start, start + due, device=self._recent[0].device)

    def _remember(self, view: View, places: Tensor) -> None:
        """What is known of the tokens that stay, and of the window behind them."""
        again = places if self.policy.renews else None
        beside = self._beside.left(again, view.keys.shape[2])
        if self.policy.renews and (self._needs("positions") or self._needs("rope")):
            assert view.positions is not None
            every = view.positions.expand(*view.keys.shape[:2], -1)
            beside = replace(beside, places=every.gather(2, places).int())
        self._beside = beside


def picked_view(view: View, places: Tensor, memory: Any) -> View:
    """The tokens of a view at places [B, H, n], with a merger's memory."""
    known = view.positions
    if known is not None:
        known = known.expand(*view.keys.shape[:2], -1).gather(2, places)
    return view._replace(
        keys=gathered(view.keys, places),
        values=gathered(view.values, places),
        attention=None if view.attention is None else view.attention.gather(2, places),
        positions=known,
        kinds=None,
        memory=memory,
    )
