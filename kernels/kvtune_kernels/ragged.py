"""Ragged: kept tokens of every row and kv head in one pool of pages, each with a length of its own.

Heads whose budgets differ (Ada-KV, arXiv:2407.11550; KVzip, arXiv:2505.23416) would waste a
rectangle [B, H, pages]. Here a head has the pages that its own tokens fill, so the bytes are the
sum over heads. Lengths change only when a block leaves the window: they are known on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvtune_kernels.formats import PAGE, Format, Packed

FIELDS = 8  # numbers of a work item


@dataclass(frozen=True)
class Ragged:
    """Keys or values of B rows and H kv heads with lengths of their own, in packed codes or, where
    `format` is None, in 16 bits as they came.

    The pool is a `Packed` of one row and head. A head's pages are neighbours from `offsets` on;
    what its last page holds behind its length repeats its last token, and no query sees it.
    """

    codes: Tensor  # uint8 [1, 1, P, bytes of a page], or 16-bit [1, 1, P, PAGE * D]
    meta: Tensor  # float16 [1, 1, lines, *] as of `Packed`; empty of 16 bits
    format: Format | None
    offsets: Tensor  # int64 [B, H] on the host: the first page of each head
    lengths: Tensor  # int64 [B, H] on the host: tokens of each head
    planes: Tensor | None = None  # int32 [H, C] as of `Packed`
    plans: dict[tuple[int, int], Plan] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def empty(
        cls, format: Format | None, lengths: Tensor, dim: int, device: torch.device,
        planes: Tensor | None = None, dtype: torch.dtype = torch.bfloat16,
    ) -> Ragged:  # fmt: skip
        """Room for `lengths` [B, H] tokens, each rounded up to the format's block; `dtype` is that
        of 16 bits.

        Raises:
            ValueError: a length below zero, or lengths of other than rows and heads.
        """
        lengths = lengths.detach().to("cpu", torch.int64)
        if lengths.dim() != 2 or int(lengths.min()) < 0:
            raise ValueError(f"lengths are counts [B, H] of tokens, not {lengths.tolist()}")
        pages = _pages(lengths, format)
        offsets = (pages.flatten().cumsum(0) - pages.flatten()).view_as(pages)
        count = int(pages.sum())
        if format is None:
            codes = torch.empty(1, 1, count, PAGE * dim, dtype=dtype, device=device)
            return cls(codes, codes.new_empty(1, 1, count, 0), None, offsets, lengths)
        pool = Packed.empty(format, 1, 1, count * PAGE, dim, device)
        return cls(pool.codes, pool.meta, format, offsets, lengths, planes)

    @property
    def block(self) -> int:
        """Tokens that are encoded together: whole pages."""
        return PAGE if self.format is None else self.format.block

    @property
    def line(self) -> int:
        """Tokens of a line of metadata."""
        return PAGE if self.format is None or self.format.per_token else self.format.group

    @property
    def pages(self) -> Tensor:
        """Pages [B, H] of each head."""
        return _pages(self.lengths, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes held: pages, metadata, and where each head lies, on the host and the device."""
        held = (self.codes, self.meta, self.offsets, self.lengths)
        plans = (x for plan in self.plans.values() for x in (plan.items, plan.first))
        return sum(x.numel() * x.element_size() for x in (*held, *plans))

    @property
    def pool(self) -> Packed:
        """All pages as those of one head: views. Of packed codes only."""
        if self.format is None:
            raise ValueError("tokens in 16 bits are not packed")
        return Packed(self.codes, self.meta, self.format)

    def head(self, row: int, head: int) -> Packed:
        """The pages of one head, [1, 1, pages, ...]: views. Of packed codes only."""
        pool, planes = self.pool, self.planes
        first, count = int(self.offsets[row, head]), int(self.pages[row, head])
        lines = slice(first * PAGE // self.line, (first + count) * PAGE // self.line)
        return Packed(
            pool.codes[:, :, first : first + count],
            pool.meta[:, :, lines],
            pool.format,
            None if planes is None else planes[head : head + 1],
        )

    def tokens(self, row: int, head: int) -> Tensor:
        """The tokens of one head, [pages * PAGE, D]: a view. Of 16 bits only."""
        first, count = int(self.offsets[row, head]), int(self.pages[row, head])
        return self.codes[0, 0, first : first + count].unflatten(-1, (PAGE, -1)).flatten(0, 1)

    def resized(self, lengths: Tensor) -> Ragged:
        """Another pool for other lengths [B, H], with the pages that fit into it copied.

        A head whose length grows within its last page has yet to be written from that page on.
        """
        lengths = lengths.detach().to("cpu", torch.int64)
        old, new = self.pages, _pages(lengths, self.format)
        both = torch.minimum(old, new).flatten()
        offsets = (new.flatten().cumsum(0) - new.flatten()).view_as(new)
        source, target = spans(self.offsets.flatten(), both), spans(offsets.flatten(), both)
        count, device = int(new.sum()), self.codes.device
        source, target = source.to(device), target.to(device)
        codes = self.codes.new_empty(1, 1, count, self.codes.shape[3])
        meta = self.meta.new_empty(1, 1, count * PAGE // self.line, self.meta.shape[3])
        codes[:, :, target] = self.codes[:, :, source]
        meta[:, :, lines_of(target, self.line)] = self.meta[:, :, lines_of(source, self.line)]
        return replace(self, codes=codes, meta=meta, offsets=offsets, lengths=lengths, plans={})


def _pages(lengths: Tensor, format: Format | None) -> Tensor:
    """Pages of heads that hold so many tokens: whole blocks."""
    block = PAGE if format is None else format.block
    return (lengths + block - 1) // block * (block // PAGE)


def spans(first: Tensor, counts: Tensor) -> Tensor:
    """The numbers first[i], ..., first[i] + counts[i] - 1 of all i, one after the other."""
    ends = counts.cumsum(0)
    return torch.arange(int(counts.sum())) + (first - ends + counts).repeat_interleave(counts)


def lines_of(pages: Tensor, tokens: int) -> Tensor:
    """The lines of metadata, `tokens` of the pool each, that belong to whole blocks of pages."""
    if tokens > PAGE:
        return pages[:: tokens // PAGE] // (tokens // PAGE)
    each = PAGE // tokens
    return (pages[:, None] * each + torch.arange(each, device=pages.device)).flatten()


@dataclass(frozen=True)
class Plan:
    """How the pages of all heads are shared out among programs, for one shape of queries.

    Programs take about equally many pages each, so a long head has many of them and a short one
    few: the time goes by the total of pages, not by the longest head. Longest stretches come first.
    """

    # int32 [I, FIELDS]: head; page of keys and of values that a block begins with; from there, the
    # first page to read, and the tokens up to the last one; part, parts of the head, and place
    items: Tensor
    first: Tensor  # int32 [B * H + 1]: the place of each head's first part, and of one past all
    most: int  # parts of one head
    masked: bool  # whether a page is not full
    values: Tensor  # the offsets of values that the items name

    @classmethod
    def of(cls, keys: Ragged, values: Ragged, blocks: int, room: int) -> Plan:
        """For `blocks` programs for each stretch, of which `room` run at one time."""
        lengths = keys.lengths.flatten()
        tiles = (lengths + PAGE - 1) // PAGE
        parts = _parts(tiles, blocks, room)
        first = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
        head = torch.arange(len(parts)).repeat_interleave(parts)
        part = torch.arange(len(head)) - first[head]
        # a head's stretches differ by one page at most
        begin = part * tiles[head] // parts[head]
        end = (part + 1) * tiles[head] // parts[head]
        # metadata is found from where a block of both sides begins
        step = math.lcm(keys.block, values.block) // PAGE
        base = begin // step * step
        tokens = torch.minimum(end * PAGE, lengths[head]) - base * PAGE
        sides = (side.offsets.flatten()[head] + base for side in (keys, values))
        place = torch.arange(len(head))
        rows = [head, *sides, begin - base, tokens, part, parts[head], place]
        items = torch.stack(rows, 1)[(end - begin).argsort(descending=True, stable=True)]
        device = keys.codes.device
        return cls(
            items.to(device, torch.int32).contiguous(),
            first.to(device, torch.int32),
            int(parts.max()),
            bool((lengths % PAGE).any()),
            values.offsets,
        )


def _parts(tiles: Tensor, blocks: int, room: int) -> Tensor:
    """Into how many stretches each head's pages are cut; as `launch.split_count` counts."""
    longest = max(1, int(tiles.max()))
    splits = torch.arange(1, min(longest, 256) + 1)
    chunks = torch.unique((longest + splits - 1) // splits)  # pages of a stretch, at most
    parts = ((tiles[:, None] + chunks - 1) // chunks).clamp_min(1)
    programs = parts.sum(0) * blocks
    waves = (programs + room - 1) // room
    cost = waves * (chunks + 2) + programs / room / 4 + longest / chunks / 32
    return parts[:, cost.argmin()]
