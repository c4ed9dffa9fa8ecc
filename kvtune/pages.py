"""Pages: the append-only packed store of one side (keys or
values) of one layer, and its dense neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from kvtune.chains import Chain, Encoded
from kvtune.lowrank import Latents
from kvtune.parts import Site

MakeSite = Callable[[Tensor, torch.dtype], Site]  # positions [T], dtype -> site


def narrowed(make: MakeSite, heads: tuple[int, ...]) -> MakeSite:
    """The sites of some kv heads: fitted tensors have the kv heads along axis 0."""
    own: dict[str, Tensor] = {}

    def made(positions: Tensor, dtype: torch.dtype) -> Site:
        site = make(positions, dtype)
        if site.tensors and not own:  # once, so that what is derived of them is kept too
            own.update({name: x[list(heads)] for name, x in site.tensors.items()})
        return replace(site, tensors=own)

    return made


class Grown:
    """A tensor that grows along axis 2 in place, with at most 1/32 of slack."""

    def __init__(self, first: Tensor) -> None:
        self._held = first.contiguous()
        self._used = first.shape[2]

    @property
    def tensor(self) -> Tensor:
        """The part in use, a view."""
        return self._held[:, :, : self._used]

    @property
    def nbytes(self) -> int:
        """Bytes that the allocator holds for it, slack included."""
        return self._held.untyped_storage().nbytes()

    def append(self, more: Tensor) -> None:
        """Copies more [B, H, n, *] behind the part in use."""
        end = self._used + more.shape[2]
        if end > self._held.shape[2]:
            shape = list(self._held.shape)
            shape[2] = end + self._used // 32
            held = self._held.new_empty(shape)
            held[:, :, : self._used] = self.tensor
            self._held = held
        self._held[:, :, self._used : end] = more
        self._used = end

    def fork(self) -> Grown:
        """A copy-on-write twin: it shares the memory and moves out on its first append."""
        return Grown._of(self.tensor)

    def select(self, rows: Tensor) -> Grown:
        """The same tokens for other batch rows."""
        return Grown._of(self.tensor.index_select(0, rows))

    @classmethod
    def _of(cls, tensor: Tensor) -> Grown:
        grown = cls.__new__(cls)
        grown._held, grown._used = tensor, tensor.shape[2]
        return grown


class Pages:
    """Tokens encoded once, in whole blocks, never decoded and encoded again.

    Tokens stand one after the other, or at positions of their own [B, H or 1, n] each, which are
    kept where a codec reads them.
    """

    def __init__(self, chain: Chain, make_site: MakeSite, start: int) -> None:
        self.chain = chain
        self.tokens = 0
        self._make_site = make_site
        self._start = start  # the true index of the first token
        self._body: Grown | None = None
        self._sides: list[list[Grown]] = []
        self._back: Latents | Literal[False] | None = None  # False where there is none
        self._learned: dict[str, Tensor] = {}  # of each row, whatever its length
        self._positions: Grown | None = None  # int32 [B, H or 1, T]

    def append(self, x: Tensor, positions: Tensor | None = None) -> None:
        """Encodes and stores x [B, H, n, D], n a multiple of the chain's block."""
        if x.shape[2] == 0:
            return
        first = self._start + self.tokens
        site = self._site(first, x.shape[2], x.device, x.dtype)
        if positions is not None and "rope" in self.chain.needs:
            site = replace(site, positions=positions)
            if self._positions is None:
                self._positions = Grown(positions.int())
            else:
                self._positions.append(positions.int())
        if self._body is None:
            code, self._learned = self.chain.begin(x, site)
        else:
            code = self.chain.encode(x, site)
        self.tokens += x.shape[2]
        if self._body is None:
            self._body = Grown(code.body if self.chain.codecs else code.body.clone())
            self._sides = [[Grown(tensor) for tensor in side] for side in code.sides]
            return
        self._body.append(code.body)
        for held, side in zip(self._sides, code.sides, strict=True):
            for grown, tensor in zip(held, side, strict=True):
                grown.append(tensor)

    def keep(self, places: Tensor) -> None:
        """Forgets all blocks but those at places [B, H, n], ascending."""
        assert self._body is not None, "something was stored"
        blocks = self.tokens // self.chain.block
        self._body = _gathered(self._body, places, blocks)
        self._sides = [[_gathered(x, places, blocks) for x in side] for side in self._sides]
        if self._positions is not None:
            self._positions = _gathered(self._positions, places, blocks)
        self.tokens = places.shape[2] * self.chain.block

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """Decodes everything: [B, H, T, D], or None while nothing is stored."""
        if self._body is None:
            return None
        body = self._body.tensor
        sides = tuple(tuple(grown.tensor for grown in side) for side in self._sides)
        return self.chain.decode(
            Encoded(body, sides), self._site(self._start, self.tokens, body.device, dtype)
        )

    def latents(self, dtype: torch.dtype) -> Latents | None:
        """What is stored as it lies, with the way back; None where kernels cannot read that."""
        if self._body is None:
            return None
        body = self._body.tensor
        if self._back is None:  # of a store that only grows it stays the same
            site = self._site(self._start, 0, body.device, dtype)
            self._back = self.chain.latents(body, site) or False
        return self._back._replace(body=body) if self._back else None

    def waiting(self) -> Tensor | None:
        """Tokens that have left the window and are still as they were; pages have none."""
        return None

    def empty(self) -> Pages:
        """Pages of the same chain, without tokens."""
        return Pages(self.chain, self._make_site, self._start)

    def fork(self) -> Pages:
        """A copy-on-write twin."""
        return self._mapped(Grown.fork)

    def select(self, rows: Tensor) -> Pages:
        """The same tokens for other batch rows."""
        twin = self._mapped(lambda grown: grown.select(rows))
        twin._learned = {name: x.index_select(0, rows) for name, x in self._learned.items()}
        return twin

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zeros, slack and what was learned of the rows."""
        flat = [grown for side in self._sides for grown in side]
        learned = sum(x.untyped_storage().nbytes() for x in self._learned.values())
        alone = [x for x in (self._body, self._positions) if x is not None]
        held = sum(grown.nbytes for grown in (*flat, *alone))
        return held + learned

    def _mapped(self, move: Callable[[Grown], Grown]) -> Pages:
        twin = Pages(self.chain, self._make_site, self._start)
        twin.tokens, twin._learned = self.tokens, self._learned
        twin._body = move(self._body) if self._body else None
        twin._positions = move(self._positions) if self._positions else None
        twin._sides = [[move(grown) for grown in side] for side in self._sides]
        return twin

    def _site(self, first: int, count: int, device: torch.device, dtype: torch.dtype) -> Site:
        site = self._make_site(torch.arange(first, first + count, device=device), dtype)
        if self._positions is not None:
            site = replace(site, positions=self._positions.tensor)
        if not self._learned:
            return site
        return replace(site, tensors={**site.tensors, **self._learned})


def _gathered(held: Grown, places: Tensor, blocks: int) -> Grown:
    """The blocks of tokens at places [B, H, n] of a tensor [B, H or 1, T', *]."""
    x = held.tensor
    heads, each = x.shape[1], x.shape[2] // blocks
    apart = x.unflatten(2, (blocks, each))
    own = places if heads == places.shape[1] else places[:, :1].expand(-1, heads, -1)
    index = own.reshape(*own.shape, *[1] * (apart.ndim - 3)).expand(-1, -1, -1, *apart.shape[3:])
    return Grown(apart.gather(2, index).flatten(2, 3))
