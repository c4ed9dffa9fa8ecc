"""FusedTiers: tiers whose kept tokens kernels read where they lie, as they are on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from kvtune_kernels import Workspace, runs_triton, say_once, turn
from kvtune_kernels.ragged_launch import attend_ragged
from torch import Tensor

from kvtune.chains import Chain
from kvtune.fused_pages import FusedPages
from kvtune.held import Pair
from kvtune.in_cache import InCache
from kvtune.pages import MakeSite
from kvtune.policy import Policy
from kvtune.tiers import Tiers
from kvtune.view import Spot

Side = tuple[FusedPages, FusedPages]


def make_tiers(
    policy: Policy, sites: tuple[MakeSite, MakeSite], spot: Spot, workspace: Workspace, keys: Tensor
) -> Tiers:
    """Empty tiers for keys [B, H, T, D] of a layer that selects tokens."""
    assert policy.select
    if policy.select.in_cache:
        if keys.is_cuda:
            say_once("Kernels read no keys that are turned in the cache; they run in plain torch.")
        return InCache(policy, sites, spot)
    if serves_tiers(policy, keys):
        return FusedTiers(policy, sites, spot, workspace)
    return Tiers(policy, sites, spot)


def serves_tiers(policy: Policy, keys: Tensor) -> bool:
    """Whether kernels can read what a layer keeps of keys [B, H, T, D], and values."""
    dim = keys.shape[-1]
    formats = [[chain.format(dim) for chain in pair] for pair in policy.tiers]
    known = [
        all(formats[i]) or not any(chain.codecs for chain in pair)
        for i, pair in enumerate(policy.tiers)
    ]
    if not all(known) or any(codec.learns for chain in policy.chains for codec in chain.codecs):
        if keys.is_cuda and runs_triton(dim, keys.dtype, keys.device):
            say_once(
                "Kernels read selected tokens in 16 bits, or in one quantiser on each side of a "
                "tier; other tiers run in plain torch."
            )
        return False
    return all(runs_triton(dim, keys.dtype, keys.device, *pair) for pair in formats)


class Part(NamedTuple):
    """What attention says of some of the tokens."""

    out: Tensor  # [B, Hq, n, D]
    lse: Tensor  # float32 [B, Hq, n], log-sum-exp of the logits


class FusedTiers(Tiers):
    """`Tiers` that choose the same tokens and are read by kernels: nothing is decoded for a query.

    Sinks and window stand one behind the other in one buffer with room for a block, into which a
    decoded token is written; what is kept lies in `FusedPages`. A token costs two launches of
    attention, two that write it, and where the selector sums attention up a product with what
    competes. A tier of its own format is read alone, and the answers are merged by their
    log-sum-exps. The work of programs is shared out anew when a block leaves, not before.
    """

    def __init__(
        self, policy: Policy, sites: tuple[MakeSite, MakeSite], spot: Spot | None = None,
        workspace: Workspace | None = None,
    ) -> None:  # fmt: skip
        super().__init__(policy, sites, spot)
        self._workspace = workspace or Workspace()
        chains = [(policy.keys, policy.values), *([policy.rest] if policy.rest else [])]
        self.tiers = [_side(pair, sites, policy.sinks) for pair in chains]
        self._bare = _side((Chain(), Chain()), sites, policy.sinks)  # never holds a token
        self._buffer: Pair | None = None  # [B, H, room, D], of which sinks and window are views
        self._none: Tensor | None = None  # int32 [B], zeros

    def select(self, rows: Tensor) -> Self:
        """Other batch rows of the same tokens: beams, samples."""
        twin = super().select(rows)
        twin._bare = self._bare[0].empty(), self._bare[1].empty()
        twin._none = None
        twin._buffered(0)
        return twin

    def fork(self) -> Self:
        """A twin: what happens to it leaves this one as it is. It shares what is kept until it
        writes, and has a buffer of its own."""
        twin = super().fork()
        twin._buffered(0)
        return twin

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens; UnsupportedError when they are no longer exact."""
        super().crop(count)
        self._buffered(0)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held for keys, and for values, as those of `Tiers`, and room for a block."""
        keys, values = super().nbytes
        twice = self._buffer if self._buffer and self._sinks else ()  # two views of one buffer
        held = [x.untyped_storage().nbytes() for x in twice] or [0, 0]
        spare = 0 if self._none is None else self._none.nbytes
        bare = [side.nbytes for side in self._bare]
        return keys - held[0] + bare[0] + spare, values - held[1] + bare[1]

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        held, count = self._exact_tokens, keys.shape[2]
        self._buffered(held + count)
        assert self._buffer is not None
        for buffer, x in zip(self._buffer, (keys, values), strict=True):
            buffer[:, :, held : held + count] = x
        self.seen += count
        self._see(held + count)

    def _own(self) -> None:
        """Moves what is exact to the beginning of a buffer of its own."""
        self._buffered(0)
        self._beside = self._beside.owned()

    @property
    def _exact_tokens(self) -> int:
        return (self._sinks[0].shape[2] if self._sinks else 0) + self._last

    def _buffered(self, end: int) -> None:
        """Room for the exact tokens before `end`; a new buffer when there is too little, or
        whatever is there where `end` is 0."""
        if self._recent is None or (self._buffer and 0 < end <= self._buffer[0].shape[2]):
            return
        policy, held = self.policy, self._exact_tokens
        least = policy.sinks + policy.recent + policy.block
        most = max(end, held)
        room = least if most <= least else most + policy.block
        made = []
        for side in (0, 1):
            exact = [pair[side] for pair in (self._sinks, self._recent) if pair]
            batch, heads, _, dim = exact[0].shape
            fresh = exact[0].new_empty(batch, heads, room, dim)
            torch.cat(exact, 2, out=fresh[:, :, :held]) if held else None
            made.append(fresh)
        self._buffer = made[0], made[1]
        self._see(held)

    def _see(self, end: int) -> None:
        """Sinks and window are what the buffer holds before `end`."""
        assert self._buffer is not None
        keys, values = self._buffer
        first = min(self.policy.sinks, end)
        if first:
            self._sinks = keys[:, :, :first], values[:, :, :first]
        self._recent = keys[:, :, first:end], values[:, :, first:end]

    def _answered(
        self, query: Tensor, scale: float | None, softcap: float | None
    ) -> tuple[Tensor, Tensor | None]:
        if softcap is not None and any(keys.folded.shifted for keys, _ in self._sides):
            return super()._answered(query, scale, softcap)  # a cap sees what softmax does not
        asked = Asked(query, scale, softcap, self._workspace)
        assert self._buffer is not None
        exact = tuple(x[:, :, : self._exact_tokens] for x in self._buffer)
        alone = [side for side in self._sides if side[0].tokens]
        with_exact = self._bare
        if alone and alone[0][0] is self.tiers[0][0] and _plain(alone[0]):
            with_exact = alone.pop(0)
        whole = not alone and self._beside.sums is None
        parts = [asked.of(with_exact, (exact[0], exact[1]), told=not whole)]
        parts += [asked.alone(side, (exact[0], exact[1]), self._zeros(query)) for side in alone]
        if whole:
            return parts[0].out, None
        out, lse = merged(parts)
        if self._beside.sums is None:
            return out, None
        return out, self._got(asked, lse)

    def _got(self, asked: Asked, lse: Tensor) -> Tensor:
        """What the tokens that compete got of queries whose logits have these log-sum-exps."""
        assert self._recent is not None
        got = asked.mass(self._recent[0], lse, behind=True)
        if self.policy.renews and (kept := self.tiers[0][0].read(asked.query.dtype)) is not None:
            got = torch.cat([asked.mass(kept, lse), got], 2)
        return got

    @property
    def _sides(self) -> list[Side]:
        found = []
        for keys, values in self.tiers:
            assert isinstance(keys, FusedPages) and isinstance(values, FusedPages)
            found.append((keys, values))
        return found

    def _zeros(self, query: Tensor) -> Tensor:
        if self._none is None:
            self._none = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
        return self._none


class Asked(NamedTuple):
    """Queries of the last tokens, and how they are read."""

    query: Tensor  # [B, Hq, n, D]
    scale: float | None
    softcap: float | None
    workspace: Workspace

    def of(self, side: Side, exact: Pair, told: bool) -> Part:
        """Over what is kept and exact tokens [B, H, R, D], which end with the queries' own."""
        query = self.query
        lse = query.new_empty(query.shape[:3], dtype=torch.float32) if told else None
        keys, values = (pages.ragged(exact[0]) for pages in side)
        out = attend_ragged(
            query, keys, values, *exact, self.scale, self.softcap, self.workspace, told=lse
        )
        return Part(out, out if lse is None else lse)

    def alone(self, side: Side, exact: Pair, none: Tensor) -> Part:
        """Over what is kept alone, of which every query sees all; `none` says of exact tokens that
        there are none."""
        batch, heads, count, dim = self.query.shape
        # queries as so many heads of one query
        query = self.query.reshape(batch, heads * count, 1, dim)
        maps, folded = side[0].folded.maps, side[1].folded
        bias = side[0].folded.bias(query, self.scale)
        (query,) = turn((query, maps[2]))
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        keys, values = (pages.ragged(exact[0]) for pages in side)
        out = attend_ragged(
            query, keys, values, exact[0][:, :, :1], exact[1][:, :, :1], self.scale, self.softcap,
            self.workspace, none, lse,
        )  # fmt: skip
        out = folded.leave(out)
        lse = lse if bias is None else lse + bias
        return Part(out.reshape(batch, heads, count, dim), lse.view(batch, heads, count))

    def mass(self, keys: Tensor, lse: Tensor, behind: bool = False) -> Tensor:
        """Attention [B, H, T] that keys [B, H, T, D] get, summed over queries and the query heads
        of a kv head; `behind`: the last keys are the queries' own."""
        count, length = self.query.shape[2], keys.shape[2]
        wide = self.query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3).float()
        scale = self.query.shape[3] ** -0.5 if self.scale is None else self.scale
        logits = wide @ keys.float().transpose(-1, -2) * scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        weights = (logits - lse.reshape(*wide.shape[:3], 1)).exp()
        if behind and count > 1:
            ones = torch.ones(count, length, dtype=torch.bool, device=keys.device)
            seen = ones.tril(length - count).repeat(wide.shape[2] // count, 1)
            weights = weights.masked_fill(~seen, 0.0)
        got: Tensor = weights.sum(2)
        return got


def merged(parts: Sequence[Part]) -> Part:
    """What attention says of the tokens of all parts together."""
    if len(parts) == 1:
        return parts[0]
    each = torch.stack([part.lse for part in parts])
    lse = each.logsumexp(0)
    weights = (each - lse).exp()[..., None]
    out = sum(part.out * weight for part, weight in zip(parts, weights, strict=True))
    return Part(out.to(parts[0].out.dtype), lse)


def _plain(side: Side) -> bool:
    """Whether exact tokens can be read beside what is kept: nothing is folded."""
    return side[0].folded.keys is None and side[1].folded.values is None


def _side(pair: tuple[Chain, Chain], sites: tuple[MakeSite, MakeSite], start: int) -> Side:
    keys, values = pair
    return FusedPages(keys, sites[0], start, True), FusedPages(values, sites[1], start, False)
