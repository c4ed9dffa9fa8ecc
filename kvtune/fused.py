"""FusedRows: batch rows whose pages, window and attention are kernels', as they are on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from kvtune_kernels import (
    PAGE,
    Exact,
    Packed,
    Workspace,
    append,
    attend,
    attend_packed,
    cut,
    decode,
    encode_into,
    runs_triton,
    say_once,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvtune.attention import causal
from kvtune.errors import UnsupportedError
from kvtune.folded import Folded
from kvtune.pages import MakeSite
from kvtune.policy import Policy


def serves(policy: Policy, keys: Tensor) -> bool:
    """Whether kernels can store and read keys [B, H, T, D], and values, under a policy."""
    dim = keys.shape[-1]
    formats = [side.format(dim) for side in (policy.keys, policy.values)]
    known = [format for format in formats if format is not None]
    if len(known) < 2:
        if keys.is_cuda and not policy.low_rank and runs_triton(dim, keys.dtype, keys.device):
            say_once("Kernels read one quantiser on each side; other chains run in plain torch.")
        return False
    return runs_triton(dim, keys.dtype, keys.device, *known)


@dataclass
class Length:
    """What a row holds, in tokens."""

    seen: int
    closed: int = 0  # paged, counted after the sinks


class Turn(NamedTuple):
    """New tokens and what is asked of them."""

    query: Tensor  # [B, Hq, n, D]
    keys: Tensor  # [B, H, n, D]
    values: Tensor
    scale: float | None
    softcap: float | None
    bias: Tensor | None = None  # [B, Hq, n], what is added to scaled logits before a softcap


class FusedRows:
    """The tokens of all batch rows in one layer: sinks and window in a ring, the rest in pages.

    Which tokens a query reads exactly depends on its position alone, as in `Rows`. A decoded token
    costs three launches whatever the rows' lengths: append (which also closes a page that has left
    the window), attention and merge, and two more where chains are folded; the state they share
    lives on the device, so a step can be captured in a CUDA graph once there is room (`reserve`).
    """

    ragged = True

    def __init__(
        self, policy: Policy, pads: list[int], workspace: Workspace,
        sites: tuple[MakeSite, MakeSite] | None = None,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.pads = pads
        self.window = policy.window
        self.lengths = [Length(0) for _ in pads]
        self._workspace, self._sites = workspace, sites
        self._folded = Folded()
        self._packed: tuple[Packed, Packed]
        self._exact: Exact
        self._state: tuple[Tensor, Tensor]  # int32 [3, B] each: before a step, and after

    @property
    def seen(self) -> int:
        """Tokens of the longest row."""
        return max(length.seen for length in self.lengths)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Adds keys and values [B, H, n, D] and answers their queries [B, Hq, n, D].

        The first call takes the whole prompt, paddings included, and reads it exactly.
        """
        turn = Turn(query, keys, values, scale, softcap)
        if self.seen == 0:
            out = self._prompt(turn)
            self.fill(keys, values)
            return out
        bias = None if softcap is None else self._folded.bias(query, scale)
        turn = Turn(*self._folded.enter(query, keys, values), scale, softcap, bias)
        out = self._step(turn) if keys.shape[2] == 1 else self._chunk(turn)
        return self._folded.leave(out)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Takes a prompt [B, H, T, D], paddings included, that was computed densely."""
        batch, heads, count, dim = keys.shape
        self._folded = Folded.of(self.policy, self._sites, keys)
        keys, values = self._folded.store(keys, values)
        self.lengths = [Length(count - pad) for pad in self.pads]
        tokens = max(self.window.due(length.seen) for length in self.lengths)
        self._packed = self._empty(tokens, keys)
        slots = self.window.sinks + self.window.ring
        self._exact = Exact(
            keys.new_zeros(batch, heads, slots, dim), values.new_zeros(batch, heads, slots, dim)
        )
        for rows, pad in _runs(self.pads):
            true = keys[rows, :, pad:], values[rows, :, pad:]
            due = self.window.due(count - pad)
            for packed, x, is_keys in zip(self._packed, true, (True, False), strict=True):
                paged = x[:, :, self.window.sinks : self.window.sinks + due]
                encode_into(packed.of_rows(rows), paged, 0, is_keys)
            self._keep(rows, true, due)
            for length in self.lengths[rows]:
                length.closed = due
        self._tell()

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as the next query reads them; for rows of equal length."""
        length, sinks = self.lengths[0], self.window.sinks
        slots = self._slots(length, self.window.ring)
        sides = []
        held = (self._exact.keys, self._exact.values)
        for packed, exact, is_keys in zip(self._packed, held, (True, False), strict=True):
            pages = decode(cut(packed, length.closed), is_keys, dtype, exact.shape[-1])
            sides.append(torch.cat([exact[:, :, :sinks], pages, exact[:, :, slots]], 2))
        return self._folded.restore(sides[0], sides[1])

    @property
    def exact(self) -> int:
        """How many of the last tokens are exact in every row."""
        return min(self._exact_of(length) for length in self.lengths)

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens; UnsupportedError when they are no longer exact."""
        if count > self.exact:
            raise UnsupportedError(
                f"Cannot crop {count} tokens: only the last {self.exact} are still exact.",
                "Use a recipe with more `recent`.",
            )
        self.lengths = [replace(length, seen=length.seen - count) for length in self.lengths]
        self._tell()

    def select(self, rows: Tensor) -> FusedRows:
        """Other batch rows: beams, samples."""
        twin = self._twin([self.pads[row] for row in rows.tolist()])
        twin.lengths = [replace(self.lengths[row]) for row in rows.tolist()]
        paged = max(length.closed for length in twin.lengths)
        twin._packed = _both(cut(packed, paged) for packed in self._packed)
        twin._packed = _both(packed.of_rows(rows) for packed in twin._packed)
        twin._exact = Exact(self._exact.keys[rows], self._exact.values[rows])
        twin._tell()
        return twin

    def fork(self) -> FusedRows:
        """A copy-on-write twin: it shares the pages and moves out when it closes one of its own."""
        twin = self._twin(self.pads)
        twin.lengths = [replace(length) for length in self.lengths]
        paged = max(length.closed for length in self.lengths)
        twin._packed = _both(cut(packed, paged) for packed in self._packed)
        if any(length.closed < paged for length in self.lengths):
            # a shorter row has room for pages of its own in what would be shared
            twin._packed = _both(packed.clone() for packed in twin._packed)
        twin._exact = Exact(self._exact.keys.clone(), self._exact.values.clone())
        twin._tell()
        return twin

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` tokens a row, so that steps up to there allocate nothing."""
        tokens = -(-tokens // self.window.block) * self.window.block
        room = self._packed[0].codes.shape[2] * PAGE
        if tokens > room:
            more = self._empty(tokens, self._exact.keys)
            for packed, wider in zip(self._packed, more, strict=True):
                for x, y in ((packed.codes, wider.codes), (packed.meta, wider.meta)):
                    y[:, :, : x.shape[2]] = x
            self._packed = more

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held for keys, and for values: metadata, sinks, window and slack included."""
        held = zip(self._packed, (self._exact.keys, self._exact.values), strict=True)
        keys, values = (
            sum(x.untyped_storage().nbytes() for x in (packed.codes, packed.meta, exact))
            for packed, exact in held
        )
        return keys + sum(x.untyped_storage().nbytes() for x in self._state), values

    def _prompt(self, turn: Turn) -> Tensor:
        """A prompt attends to itself exactly (as in KIVI, arXiv:2402.02750)."""
        query, keys, values, scale, softcap, _ = turn
        out = query.new_zeros(query.shape[0], query.shape[2], *query.shape[1::2]).transpose(1, 2)
        for rows, pad in _runs(self.pads):
            q, k, v = (x[rows, :, pad:] for x in (query, keys, values))
            if softcap is None:
                # flash attention, which needs no mask
                out[rows, :, pad:] = scaled_dot_product_attention(
                    q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=True
                )
            else:
                mask = causal(q.shape[2], q.shape[2], q.device)
                out[rows, :, pad:] = attend(q, k, v, mask, scale, softcap)
        return out

    def _step(self, turn: Turn) -> Tensor:
        """One token a row."""
        for length in self.lengths:
            length.closed = max(length.closed, self.window.due(length.seen))
            length.seen += 1
        longest = max(length.closed for length in self.lengths)
        self._ensure(longest)
        before, after = self._state
        append(turn.keys, turn.values, self._exact, *self._packed, before, after, self.window)
        return attend_packed(
            turn.query, *self._packed, self._exact, after, self.window, turn.scale, turn.softcap,
            longest=longest, workspace=self._workspace, advance=before, bias=turn.bias,
        )  # fmt: skip

    def _chunk(self, turn: Turn) -> Tensor:
        """Several tokens a row: a wider ring holds them beside the window until they are paged."""
        query, keys, values, scale, softcap, bias = turn
        count = keys.shape[2]
        starts = [length.closed for length in self.lengths]
        ring = max(self._exact_of(length) for length in self.lengths) + count
        wide = self._widened(keys, values, ring)
        for length in self.lengths:
            length.seen += count
            length.closed = max(length.closed, self.window.due(length.seen))
        self._ensure(max(length.closed for length in self.lengths))
        for row, (length, start) in enumerate(zip(self.lengths, starts, strict=True)):
            slots = (
                self.window.sinks + torch.arange(start, length.closed, device=keys.device) % ring
            )
            for packed, x, is_keys in zip(
                self._packed, (wide.keys, wide.values), (True, False), strict=True
            ):
                encode_into(packed, x[row : row + 1, :, slots], start, is_keys, row)
        closed = [length.closed for length in self.lengths]
        seen = [length.seen for length in self.lengths]
        state = torch.tensor([seen, starts, closed], dtype=torch.int32, device=keys.device)
        out = attend_packed(
            query, *self._packed, wide, state, self.window, scale, softcap,
            longest=max(closed), workspace=self._workspace, bias=bias,
        )  # fmt: skip
        self._carry(wide, self._exact)
        self._tell()
        return out

    def _widened(self, keys: Tensor, values: Tensor, ring: int) -> Exact:
        """The exact tokens and a chunk [B, H, n, D] behind them, in a ring with room for both."""
        sinks, count = self.window.sinks, keys.shape[2]
        batch, heads, _, dim = keys.shape
        wide = Exact(
            keys.new_zeros(batch, heads, sinks + ring, dim),
            values.new_zeros(batch, heads, sinks + ring, dim),
        )
        self._carry(self._exact, wide)
        for row, length in enumerate(self.lengths):
            tokens = torch.arange(length.seen, length.seen + count, device=keys.device)
            places = torch.where(tokens < sinks, tokens, sinks + (tokens - sinks) % ring)
            wide.keys[row, :, places], wide.values[row, :, places] = keys[row], values[row]
        return wide

    def _carry(self, source: Exact, target: Exact) -> None:
        """Copies the sinks, and every row's exact tokens behind them, from ring to ring."""
        sinks = self.window.sinks
        for row, length in enumerate(self.lengths):
            old = self._slots(length, source.keys.shape[2] - sinks)
            new = self._slots(length, target.keys.shape[2] - sinks)
            for held, x in ((target.keys, source.keys), (target.values, source.values)):
                held[row, :, :sinks] = x[row, :, :sinks]
                held[row, :, new] = x[row, :, old]

    def _keep(self, rows: slice, sides: tuple[Tensor, Tensor], due: int) -> None:
        """Puts the sinks and what is not paged of true tokens [b, H, T, D] into the ring."""
        sinks = min(self.window.sinks, sides[0].shape[2])
        live = torch.arange(due, sides[0].shape[2] - sinks, device=sides[0].device)
        for held, x in zip((self._exact.keys, self._exact.values), sides, strict=True):
            held[rows, :, :sinks] = x[:, :, :sinks]
            held[rows, :, self.window.sinks + live % self.window.ring] = x[:, :, sinks + due :]

    def _slots(self, length: Length, ring: int) -> Tensor:
        """Slots of a row's exact tokens behind the sinks, in a ring of a size."""
        sinks, device = self.window.sinks, self._exact.keys.device
        end = max(length.closed, length.seen - sinks)
        return sinks + torch.arange(length.closed, end, device=device) % ring

    def _exact_of(self, length: Length) -> int:
        behind = max(0, length.seen - self.window.sinks - length.closed)
        return behind if length.closed else length.seen

    def _ensure(self, tokens: int) -> None:
        """Makes room for `tokens` paged tokens a row, and 1/32 more when it must be made anew."""
        if tokens > self._packed[0].codes.shape[2] * PAGE:
            self.reserve(tokens + tokens // 32 // self.window.block * self.window.block)

    def _empty(self, tokens: int, like: Tensor) -> tuple[Packed, Packed]:
        batch, heads, _, dim = like.shape
        chains = (self.policy.keys, self.policy.values)
        formats = [chain.format(dim) for chain in chains]
        return _both(
            Packed.empty(format, batch, heads, tokens, dim, like.device, planes)
            for format, planes in zip(formats, self._folded.planes, strict=True)
            if format is not None
        )

    def _tell(self) -> None:
        """Brings the device's state up to what the host knows."""
        table = [[getattr(x, name) for x in self.lengths] for name in ("seen", "closed", "closed")]
        state = torch.tensor(table, dtype=torch.int32, device=self._exact.keys.device)
        self._state = (state, state.clone())

    def _twin(self, pads: list[int]) -> FusedRows:
        twin = FusedRows(self.policy, pads, self._workspace, self._sites)
        twin._folded = self._folded
        return twin


def _runs(pads: list[int]) -> Iterator[tuple[slice, int]]:
    """Neighbouring rows of equal padding."""
    end = 0
    for pad, same in itertools.groupby(pads):
        start, end = end, end + len(list(same))
        yield slice(start, end), pad


def _both(sides: Iterator[Packed]) -> tuple[Packed, Packed]:
    keys, values = sides
    return keys, values
