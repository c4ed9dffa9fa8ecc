"""FusedPages: the store of one side of a tier as kernels read it where it lies."""

from __future__ import annotations

import copy

import torch
from kvtune_kernels import PAGE, Format, Packed, cut, decode, encode_into, turn
from kvtune_kernels.ragged import Ragged
from torch import Tensor

from kvtune.chains import Chain
from kvtune.folded import Folded
from kvtune.pages import MakeSite, Pages
from kvtune.policy import Policy


class FusedPages(Pages):
    """Pages that are a `Ragged` at any time, without a copy: each head has room of its own.

    New tokens are written in place behind the others; there is at most 1/32 of slack. What is
    stored is what `Pages` stores, but for linear codecs before the codes: kernels read what these
    make, and queries and answers are turned instead (see `Folded`).
    """

    def __init__(self, chain: Chain, make_site: MakeSite, start: int, keys: bool) -> None:
        super().__init__(chain, make_site, start)
        self.folded = Folded()
        self._keys = keys
        self._format: Format | None = None
        self._dim = 0
        self._codes: Tensor | None = None  # [B, H, pages, bytes], or of 16 bits [B, H, tokens, D]
        self._meta: Tensor | None = None  # as that of `Packed`; of 16 bits there is none
        self._lent = False  # another store has the same tensors, and they are not written into
        self._ragged: Ragged | None = None

    def append(self, x: Tensor, positions: Tensor | None = None) -> None:
        """Encodes and stores x [B, H, n, D], n a multiple of the chain's block."""
        if x.shape[2] == 0:
            return
        end = self.tokens + x.shape[2]
        self._make_room(x, end)
        if self._format is None:
            assert self._codes is not None
            self._codes[:, :, self.tokens : end] = x
        else:
            (y,) = turn((x, self.folded.maps[0 if self._keys else 1]))
            encode_into(self._packed, y, self.tokens, self._keys)
        self.tokens, self._ragged = end, None

    def keep(self, places: Tensor) -> None:
        """Forgets all blocks but those at places [B, H, n], ascending."""
        assert self._codes is not None, "something was stored"
        held, block = self._used, self.chain.block
        blocks = self.tokens // block
        self.tokens, self._lent = places.shape[2] * block, False
        self._hold(self._codes.shape[:2], self.tokens, self._codes)
        for x, fresh in zip(held, self._used, strict=True):
            fresh.copy_(_picked(x, places, blocks))

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """Decodes everything: [B, H, T, D], or None while nothing is stored."""
        if self.tokens == 0:
            return None
        if self._format is None:
            return self._used[0]
        x = decode(cut(self._packed, self.tokens), self._keys, dtype, self._dim)
        return self.folded.restore(x, x)[0 if self._keys else 1]

    def ragged(self, like: Tensor) -> Ragged:
        """What is stored, as kernels read it; of no tokens too, for heads as `like` [B, H, *, D].

        It stays the same until tokens come or go, and so does the plan that is made for it.
        """
        if self._ragged is None:
            if self._codes is None:
                self._make_room(like, 1)
            assert self._codes is not None
            batch, heads = self._codes.shape[:2]
            if self._format is None:
                codes = self._codes.view(1, 1, -1, PAGE * self._dim)
                meta = codes.new_empty(1, 1, codes.shape[2], 0)
            else:
                codes, meta = (x.view(1, 1, -1, x.shape[3]) for x in self._packed[:2])
            first = torch.arange(batch * heads).view(batch, heads)
            lengths = torch.full_like(first, self.tokens)
            first = first * (codes.shape[2] // (batch * heads))
            planes = self.folded.planes[0 if self._keys else 1]
            self._ragged = Ragged(codes, meta, self._format, first, lengths, planes)
        return self._ragged

    def empty(self) -> FusedPages:
        """Pages of the same chain, without tokens."""
        return FusedPages(self.chain, self._make_site, self._start, self._keys)

    def fork(self) -> FusedPages:
        """A copy-on-write twin: it shares the memory and moves out when it writes."""
        twin = copy.copy(self)
        twin._lent = True
        return twin

    def select(self, rows: Tensor) -> FusedPages:
        """The same tokens for other batch rows."""
        twin = copy.copy(self)
        twin._ragged, twin._lent = None, False
        if self._codes is not None:
            twin._codes = self._codes.index_select(0, rows)
            twin._meta = None if self._meta is None else self._meta.index_select(0, rows)
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zeros, slack, and how kernels share them out."""
        held = [x for x in (self._codes, self._meta) if x is not None]
        if self._ragged is not None:
            held += [x for plan in self._ragged.plans.values() for x in (plan.items, plan.first)]
        return sum(x.untyped_storage().nbytes() for x in held)

    @property
    def _packed(self) -> Packed:
        assert self._codes is not None and self._meta is not None and self._format is not None
        planes = self.folded.planes[0 if self._keys else 1]
        return Packed(self._codes, self._meta, self._format, planes)

    @property
    def _used(self) -> tuple[Tensor, ...]:
        """What holds tokens of codes and metadata, or of 16 bits: views."""
        if self._format is not None:
            return cut(self._packed, self.tokens)[:2]
        assert self._codes is not None
        return (self._codes[:, :, : self.tokens],)

    def _make_room(self, like: Tensor, end: int) -> None:
        """Room for the tokens before `end`, for heads as `like` [B, H, *, D]."""
        if self._codes is None:
            self._dim = like.shape[3]
            self._format = self.chain.format(self._dim)
            own = Policy(keys=self.chain) if self._keys else Policy(values=self.chain)
            self.folded = Folded.of(own, (self._make_site, self._make_site), like)
            self._hold(like.shape[:2], end, like)
            return
        width = self._dim if self._format is None else 1
        room = self._codes.shape[2] * (1 if width > 1 else PAGE)
        if end > room or self._lent:
            held, self._lent = self._used, False
            self._hold(self._codes.shape[:2], end + self.tokens // 32, self._codes)
            for x, fresh in zip(held, self._used, strict=True):
                fresh.copy_(x)

    def _hold(self, shape: torch.Size, tokens: int, like: Tensor) -> None:
        """Room for so many tokens of [B, H], of whole blocks, without them."""
        block = PAGE if self._format is None else self._format.block
        room = -(-tokens // block) * block
        self._ragged = None
        if self._format is None:
            # zeros: what a page holds behind the tokens is multiplied by weights of zero
            self._codes = like.new_zeros(*shape, room, self._dim)
            return
        batch, heads = shape
        made = Packed.empty(self._format, batch, heads, room, self._dim, like.device)
        self._codes, self._meta = made.codes, made.meta


def _picked(x: Tensor, places: Tensor, blocks: int) -> Tensor:
    """The blocks of tokens at places [B, H, n] of a tensor [B, H, T', *]."""
    apart = x.unflatten(2, (blocks, -1))
    index = places[..., None, None].expand(-1, -1, -1, *apart.shape[3:])
    found: Tensor = apart.gather(2, index).flatten(2, 3)
    return found
