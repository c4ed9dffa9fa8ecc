"""Rows: batch rows of equal true length, their sinks, pages
and recent window, and how queries read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from kvtune_kernels import attend, runs_triton, say_once
from torch import Tensor

from kvtune import lowrank
from kvtune.attention import causal
from kvtune.chains import Chain
from kvtune.errors import UnsupportedError
from kvtune.lowrank import Exact, Latents
from kvtune.pages import MakeSite, Pages
from kvtune.policy import Policy


class Side(NamedTuple):
    """The keys, or the values, of a context: pages between exact tokens [B, H, *, D]."""

    pages: Pages
    sinks: Tensor | None
    recent: Tensor

    @classmethod
    def of(cls, x: Tensor, chain: Chain, make_site: MakeSite, sinks: int, due: int) -> Side:
        """Stores x [B, H, T, D], of which nothing is kept alive; `due` tokens are paged."""
        pages = Pages(chain, make_site, sinks)
        pages.append(x[:, :, sinks : sinks + due])
        # clones own just their bytes; a prompt's keys may be views of more
        held = x[:, :, :sinks].clone() if sinks else None
        return cls(pages, held, x[:, :, sinks + due :].clone())

    @property
    def nbytes(self) -> int:
        """Bytes held: metadata, sinks and window included."""
        exact = (self.recent,) if self.sinks is None else (self.sinks, self.recent)
        return self.pages.nbytes + sum(x.untyped_storage().nbytes() for x in exact)


class Taken(NamedTuple):
    """New tokens whose queries are not all answered yet."""

    start: int  # paged tokens before them
    keys: Tensor  # [B, H, n, D]
    values: Tensor
    first: bool  # whether they are the prompt


class Rows:
    """The tokens of some batch rows in one layer: sinks | pages | recent, the outer two exact.

    Which tokens a query sees exactly depends on its position alone: token t is read from its page
    by every query at position p with t < sinks + due(p), and exactly by the others. So chunked
    reading equals reading token by token. Only the prompt, the first forward of an empty cache,
    sees itself exactly (as in KIVI,
    arXiv:2402.02750).
    """

    ragged = False  # all rows have one length

    def __init__(self, policy: Policy, sites: tuple[MakeSite, MakeSite]) -> None:
        self.policy = policy
        self.seen = 0  # true tokens, padding not counted
        self._sites = sites
        self.keys = Pages(policy.keys, sites[0], policy.sinks)
        self.values = Pages(policy.values, sites[1], policy.sinks)
        self._sinks: tuple[Tensor, Tensor] | None = None
        self._recent: tuple[Tensor, Tensor] | None = None
        self._taken: Taken | None = None

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Adds keys and values [B, H, n, D] and answers their
        queries [B, Hq, n, D]; then frees what has left."""
        self.take(keys, values)
        out = self.answer(query, scale, softcap)
        self.settle()
        return out

    def take(self, keys: Tensor, values: Tensor) -> None:
        """Adds keys and values [B, H, n, D], which may be asked for from now on."""
        start = self.keys.tokens
        self._taken = Taken(start, keys, values, self.seen == 0)
        self._extend(keys, values)
        if not self._taken.first:
            self._page(start)

    def answer(self, query: Tensor, scale: float | None, softcap: float | None) -> Tensor:
        """Answers the queries [B, Hq, m, D] of the tokens that were taken last, or of the last of
        them: a model may ask no more of layers that are handed another's cache."""
        assert self._taken is not None, "answer follows take"
        start, keys, values, first = self._taken
        if first:
            count = query.shape[2]
            mask = causal(count, keys.shape[2], keys.device) if count > 1 else None
            return attend(query, keys, values, mask, scale, softcap)
        if softcap is None and (latents := self._latents(query)):
            return lowrank.attend(query, *latents, self._exact_tokens(), self.policy.sinks, scale)
        all_keys, all_values = self.read(query.dtype)
        return attend(query, all_keys, all_values, self._mask(query, start), scale, softcap)

    def settle(self) -> None:
        """Frees what has left the window, when all queries are answered."""
        assert self._taken is not None, "settle follows take"
        start, keys, _, _ = self._taken
        self._taken = None
        self._settle(start, keys.shape[2])

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Takes a context [B, H, T, D] that was computed densely,
        as a prompt's forward would leave it."""
        ends = self.policy.sinks, self.policy.due(keys.shape[2])
        self.hold(
            Side.of(keys, self.policy.keys, self._sites[0], *ends),
            Side.of(values, self.policy.values, self._sites[1], *ends),
            keys.shape[2],
        )

    def hold(self, keys: Side, values: Side, seen: int) -> None:
        """Takes both sides of a context of so many tokens, which may be shared: they are forked."""
        self.seen = seen
        self.keys, self.values = keys.pages.fork(), values.pages.fork()
        self._recent = keys.recent, values.recent
        if keys.sinks is not None and values.sinks is not None:
            self._sinks = keys.sinks, values.sinks

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as the next query reads
        them: sinks, decoded pages, recent window."""
        sides = []
        for side, pages in enumerate((self.keys, self.values)):
            dense = [pair[side] if pair else None for pair in (self._sinks, self._recent)]
            found = [x for x in (dense[0], pages.read(dtype), dense[1]) if x is not None]
            sides.append(torch.cat(found, 2) if len(found) > 1 else found[0])
        return sides[0], sides[1]

    def _latents(self, query: Tensor) -> tuple[Latents, Latents] | None:
        """Both sides as they lie, where kernels read them for query [B, Hq, n, D]."""
        if (
            query.shape[2] > 1
            or not self.policy.low_rank
            or not runs_triton(query.shape[-1], query.dtype, query.device)
        ):
            return None
        keys, values = (pages.latents(query.dtype) for pages in (self.keys, self.values))
        if keys is None or values is None or not lowrank.reads(query, keys, values):
            if self.keys.tokens:
                say_once("Kernels read latents of 16 bits; other low ranks run in plain torch.")
            return None
        return keys, values

    def _exact_tokens(self) -> Exact:
        """Sinks, what has left the window and waits, and the window itself."""
        sides = []
        for side, pages in enumerate((self.keys, self.values)):
            sinks, recent = (pair and pair[side] for pair in (self._sinks, self._recent))
            found = [x for x in (sinks, pages.waiting(), recent) if x is not None]
            sides.append(torch.cat(found, 2))
        return Exact(*sides)

    @property
    def exact(self) -> int:
        """How many of the last tokens are still exact: the window, and all while none is paged."""
        assert self._recent is not None
        return self._recent[0].shape[2] if self.keys.tokens else self.seen

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens; UnsupportedError when they are no longer exact."""
        if count > self.exact:
            raise UnsupportedError(
                f"Cannot crop {count} tokens: only the last {self.exact} are still exact.",
                "Use a recipe with more `recent`.",
            )
        self.seen -= count
        sinks = min(self.policy.sinks, self.seen)
        held = self.seen - sinks - self.keys.tokens
        self._sinks = _map(self._sinks, lambda x: x[:, :, :sinks].clone())
        self._recent = _map(self._recent, lambda x: x[:, :, :held].clone())

    def select(self, rows: Tensor) -> Rows:
        """Other batch rows of the same tokens: beams, samples."""
        twin = self.fork()
        twin.keys, twin.values = self.keys.select(rows), self.values.select(rows)
        twin._sinks = _map(self._sinks, lambda x: x.index_select(0, rows))
        twin._recent = _map(self._recent, lambda x: x.index_select(0, rows))
        return twin

    def fork(self) -> Rows:
        """A copy-on-write twin: what happens to it leaves this one as it is."""
        twin = type(self).__new__(type(self))
        twin.policy, twin.seen, twin._sites = self.policy, self.seen, self._sites
        twin.keys, twin.values = self.keys.fork(), self.values.fork()
        twin._sinks, twin._recent, twin._taken = self._sinks, self._recent, None
        return twin

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held for keys, and for values: metadata, sinks and window included."""
        pairs = [pair for pair in (self._sinks, self._recent) if pair]
        keys, values = (sum(x[side].untyped_storage().nbytes() for x in pairs) for side in (0, 1))
        return self.keys.nbytes + keys, self.values.nbytes + values

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        self.seen += keys.shape[2]
        missing = self.policy.sinks - (self._sinks[0].shape[2] if self._sinks else 0)
        if missing > 0:
            self._sinks = _join(
                self._sinks, (keys[:, :, :missing].clone(), values[:, :, :missing].clone())
            )
            keys, values = keys[:, :, missing:], values[:, :, missing:]
        self._recent = _join(self._recent, (keys, values))

    def _encode(self, start: int, due: int) -> None:
        """Writes the tokens up to `due` into pages; the exact
        tokens begin at `start`, both counted after the sinks."""
        assert self._recent is not None
        for pages, x in zip((self.keys, self.values), self._recent, strict=True):
            pages.append(x[:, :, pages.tokens - start : due - start])

    def _page(self, start: int) -> None:
        """Pages what the last query reads from pages; after a crop they may hold more already."""
        self._encode_on(start, max(start, self.policy.due(self.seen - 1)))

    def _encode_on(self, start: int, due: int) -> None:
        """The same behind the prompt: what is learned of the first tokens is learned of as many as
        token by token, however many come at once."""
        if self.keys.tokens == 0 and due > (first := self.policy.first) > 0:
            self._encode(start, first)
        self._encode(start, due)

    def _settle(self, start: int, incoming: int) -> None:
        """Moves what has left the recent window into pages, and frees it."""
        due = max(start, self.policy.due(self.seen))
        if self.seen == incoming:
            self._encode(start, due)
        else:
            self._encode_on(start, due)
        if (
            due > start or start == 0
        ):  # clones own just their bytes; a prompt's keys may be views of more
            self._recent = _map(self._recent, lambda x: x[:, :, due - start :].clone())

    def _mask(self, query: Tensor, start: int) -> Tensor | None:
        """Mask [n, sinks + pages + recent]: pages closed since
        `start` are read by the later queries only."""
        count, paged, device = query.shape[2], self.keys.tokens, query.device
        if count == 1:
            return None
        sinks = min(self.policy.sinks, self.seen)
        positions = torch.arange(self.seen - count, self.seen, device=device)
        dues = [max(start, self.policy.due(p)) for p in range(self.seen - count, self.seen)]
        due = torch.tensor(dues, device=device)[:, None]
        tokens = torch.arange(
            sinks, self.seen, device=device
        )  # true index of each exact token after the sinks
        exact = tokens[start:]
        sees_sinks = torch.arange(sinks, device=device) <= positions[:, None]
        sees_pages = tokens[:paged] < sinks + due
        sees_exact = (exact >= sinks + due) & (exact <= positions[:, None])
        return torch.cat([sees_sinks, sees_pages, sees_exact], 1)


def _join(held: tuple[Tensor, Tensor] | None, more: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if held is None:
        return more
    return torch.cat([held[0], more[0]], 2), torch.cat([held[1], more[1]], 2)


def _map(
    pair: tuple[Tensor, Tensor] | None, move: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    return None if pair is None else (move(pair[0]), move(pair[1]))
