"""Bonds: what the layers of a group store together, and the part of it that each of them holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kvtune.chains import Chain
from kvtune.lowrank import Latents
from kvtune.pages import Grown, MakeSite, Pages
from kvtune.parts import Code, Sharer, Site, Up
from kvtune.policy import Policy
from kvtune.rope import Rope

T = TypeVar("T")


class Claims(Generic[T]):
    """Things that all members of a group ask for one after the other, made for the first of them.

    A member that asks twice for one key starts a new thing: what the others left is of another
    forward.
    """

    def __init__(self, members: int) -> None:
        self._members = members
        self._made: dict[Hashable, tuple[T, set[int]]] = {}

    def get(self, key: Hashable, member: int, make: Callable[[], T]) -> T:
        """What was made for the key, which is forgotten when the last member has it."""
        found = self._made.get(key)
        if found is None or member in found[1]:
            found = self._made[key] = (make(), set())
        found[1].add(member)
        if len(found[1]) == self._members:
            del self._made[key]
        return found[0]

    def clear(self) -> None:
        """Forgets what not all members have asked for."""
        self._made.clear()


class Store:
    """One side of some batch rows in all layers of a group.

    Tokens wait exactly, layer by layer, until every layer has brought them. What a sharer learns,
    it learns of the tokens that join first; later ones join block by block, so that it does not
    matter how many come at once.
    """

    def __init__(
        self, sharer: Sharer, chain: Chain, makers: tuple[MakeSite, ...], start: int, block: int
    ) -> None:
        self.sharer, self.block = sharer, block
        self.tokens = 0  # that have joined
        self._makers, self._start = makers, start
        self._waiting: list[list[Tensor]] = [[] for _ in makers]
        self._body = Pages(chain, _bare(makers[0]), start)
        self._sides: list[Grown] = []
        self._learned: dict[str, Tensor] = {}
        self._ways: dict[int, tuple[Up | None, Rope | None]] = {}  # back to each layer
        self._twins: Claims[Store] = Claims(len(makers))

    @property
    def members(self) -> int:
        """How many layers share it."""
        return len(self._makers)

    def waiting(self, member: int) -> int:
        """How many tokens of a layer have not joined yet."""
        return sum(x.shape[2] for x in self._waiting[member])

    def bring(self, member: int, x: Tensor) -> None:
        """Takes x [B, H, n, D] of one layer, n a multiple of the block."""
        self._twins.clear()
        self._waiting[member].append(x)
        ready = min(self.waiting(other) for other in range(self.members))
        if ready == 0:
            return
        layers = [torch.cat(own, 2) if len(own) > 1 else own[0] for own in self._waiting]
        self._waiting = [[x[:, :, ready:]] if x.shape[2] > ready else [] for x in layers]
        step = ready if self.tokens == 0 else self.block
        for first in range(0, ready, step):
            self._join(tuple(x[:, :, first : first + step] for x in layers))

    def read(self, member: int, dtype: torch.dtype) -> Tensor | None:
        """All tokens [B, H, T, D] of one layer, those that wait included; None without any."""
        found = list(self._waiting[member])
        if self.tokens:
            body = self._body.read(dtype)
            assert body is not None
            site = self._site(member, self._start, self.tokens, body.device, dtype)
            code = Code(body, tuple(grown.tensor for grown in self._sides))
            found.insert(0, self.sharer.unfold(code, member, site))
        if not found:
            return None
        return torch.cat(found, 2) if len(found) > 1 else found[0]

    def latents(self, member: int, dtype: torch.dtype) -> Latents | None:
        """The common body and the way back to one layer; None where kernels cannot read that."""
        found = self._body.latents(dtype) if self.tokens else None
        if found is None or found.back is not None:
            return None
        if member not in self._ways:
            site = self._site(member, self._start, 0, found.body.device, dtype)
            turns = site.side == "keys" and "rope" in self.sharer.needs
            self._ways[member] = self.sharer.up(member, site), site.rope if turns else None
        back, rope = self._ways[member]
        return None if back is None else Latents(found.body, back, rope)

    def waits(self, member: int) -> Tensor | None:
        """The tokens [B, H, n, D] of one layer that have not joined yet."""
        own = self._waiting[member]
        return torch.cat(own, 2) if own else None

    def twin(self, member: int, rows: Tensor | None = None) -> Store:
        """A copy-on-write twin, of other batch rows where they are given: one for all layers."""
        key = None if rows is None else tuple(rows.tolist())
        return self._twins.get(key, member, lambda: self._twin(rows))

    def nbytes(self, member: int) -> int:
        """Bytes held for one layer: what waits, and its part of what is common, which is whole."""
        own = sum(x.untyped_storage().nbytes() for x in self._waiting[member])
        beside = sum(grown.nbytes for grown in self._sides)
        learned = sum(x.untyped_storage().nbytes() for x in self._learned.values())
        each, more = divmod(self._body.nbytes + beside + learned, self.members)
        return own + each + (member < more)

    def _join(self, layers: tuple[Tensor, ...]) -> None:
        first, x = self._start + self.tokens, layers[0]
        place = (first, x.shape[2], x.device, x.dtype)
        if self.tokens == 0:
            learned = self.sharer.learn(layers, self._sites(*place))
            name = self.sharer.name()
            self._learned = {f"{name}.{key}": y for key, y in learned.items()}
        body, sides = self.sharer.fold(layers, self._sites(*place))
        self._body.append(body)
        if self.tokens == 0:
            self._sides = [Grown(side) for side in sides]
        else:
            for grown, side in zip(self._sides, sides, strict=True):
                grown.append(side)
        self.tokens += x.shape[2]

    def _sites(
        self, first: int, count: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Site, ...]:
        return tuple(
            self._site(member, first, count, device, dtype) for member in range(self.members)
        )

    def _site(
        self, member: int, first: int, count: int, device: torch.device, dtype: torch.dtype
    ) -> Site:
        positions = torch.arange(first, first + count, device=device)
        return replace(self._makers[member](positions, dtype), tensors=self._learned)

    def _twin(self, rows: Tensor | None) -> Store:
        twin = Store(self.sharer, self._body.chain, self._makers, self._start, self.block)
        twin.tokens, twin._learned = self.tokens, self._learned
        twin._waiting = [list(own) for own in self._waiting]
        if rows is None:
            twin._body = self._body.fork()
            twin._sides = [grown.fork() for grown in self._sides]
            return twin
        twin._body = self._body.select(rows)
        twin._sides = [grown.select(rows) for grown in self._sides]
        twin._learned = {name: x.index_select(0, rows) for name, x in self._learned.items()}
        twin._waiting = [[x.index_select(0, rows) for x in own] for own in self._waiting]
        return twin


class Member:
    """One layer's part in a store, as `Rows` holds pages."""

    def __init__(self, store: Store, index: int) -> None:
        self._store, self._index = store, index

    @property
    def tokens(self) -> int:
        """Tokens of this layer that have left its window."""
        return self._store.tokens + self._store.waiting(self._index)

    def append(self, x: Tensor) -> None:
        """Brings x [B, H, n, D], n a multiple of the store's block."""
        if x.shape[2]:
            self._store.bring(self._index, x)

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """Everything of this layer: [B, H, T, D], or None while nothing is stored."""
        return self._store.read(self._index, dtype)

    def latents(self, dtype: torch.dtype) -> Latents | None:
        """What all layers store as it lies, with this layer's way back."""
        return self._store.latents(self._index, dtype)

    def waiting(self) -> Tensor | None:
        """Tokens [B, H, n, D] that have not joined yet."""
        return self._store.waits(self._index)

    def fork(self) -> Member:
        """A copy-on-write twin."""
        return Member(self._store.twin(self._index), self._index)

    def select(self, rows: Tensor) -> Member:
        """The same tokens for other batch rows."""
        return Member(self._store.twin(self._index, rows), self._index)

    @property
    def nbytes(self) -> int:
        """Bytes held for this layer; those of all layers add up to what the store holds."""
        return self._store.nbytes(self._index)


class Bond:
    """The layers of a cache that store together: hands each of them its part in a store."""

    def __init__(self, policy: Policy, sites: tuple[tuple[MakeSite, MakeSite], ...]) -> None:
        assert policy.sharer is not None
        self.policy = policy
        self._keys, self._values = (tuple(pair[side] for pair in sites) for side in (0, 1))
        self._opened: Claims[tuple[Store, Store]] = Claims(len(sites))

    def members(self, index: int, pad: int) -> tuple[Member, Member]:
        """Keys and values of the index-th layer, for the rows with so much padding."""
        keys, values = self._opened.get(pad, index, self._stores)
        return Member(keys, index), Member(values, index)

    def _stores(self) -> tuple[Store, Store]:
        policy = self.policy
        assert policy.sharer is not None
        ends = policy.sinks, policy.block
        return (
            Store(policy.sharer, policy.keys, self._keys, *ends),
            Store(policy.sharer, policy.values, self._values, *ends),
        )


def _bare(make: MakeSite) -> MakeSite:
    """Sites of the common body, which is no layer's: no rope, and no tensors of a layer."""

    def made(positions: Tensor, dtype: torch.dtype) -> Site:
        return replace(make(positions, dtype), rope=None, tensors={})

    return made
