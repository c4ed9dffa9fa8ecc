"""Laws of attention to packed pages: a kernel answers as float32 attention to the same cache."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from kvtune_kernels import (
    PAGE,
    Exact,
    Format,
    Packed,
    Window,
    Workspace,
    attend_packed,
    decode,
    implementation,
    launch,
    reference,
)
from torch import Tensor

pytest.importorskip("triton")
# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

GPU = torch.cuda.is_available()
BITS = (2, 3, 4, 8)
BATCH, HEADS = (3, 2) if GPU else (1, 1)
DIM = 128 if GPU else 64
LONG = 8191 if GPU else 157  # tokens, two pages among them
NEAR = {torch.bfloat16: 0.01, torch.float16: 0.003}


class Cache(NamedTuple):
    """One layer's tokens, as `attend_packed` takes them."""

    keys: Packed
    values: Packed
    exact: Exact
    state: Tensor
    window: Window

    def attend(self, query: Tensor, **more: float | None) -> Tensor:
        return attend_packed(query, *self, **more)

    def error(self, query: Tensor, **more: float | None) -> float:
        """Relative error of the kernel's answer."""
        with implementation("triton"):
            found = self.attend(query, **more)
        assert found.dtype == query.dtype and found.shape == query.shape
        true = reference.attend_packed(query.float(), *self, **more)
        return float((found.float() - true).norm() / true.norm())


def packed(format: Format, heads: int, dim: int, paged: list[int], device: torch.device) -> Packed:
    """Random codes that decode to about N(0, 1). What no row uses is 0xFF and NaN, and there is
    more of it before, behind and beside, since the tensors are views of larger ones."""
    batch = len(paged)
    room = (max(paged) // format.block + 2) * format.block
    generator = torch.Generator().manual_seed(format.bits)
    wide = Packed.empty(format, batch, heads + 2, room + format.block, dim, torch.device("cpu"))
    wide.codes.fill_(255)
    wide.meta.fill_(torch.nan)
    size = PAGE if format.per_token else format.group
    found = Packed(
        wide.codes.to(device)[:, 1:-1, : room // PAGE],
        wide.meta.to(device)[:, 1:-1, : room // size],
        format,
    )
    top = 2**format.bits - 1
    for row, count in enumerate(paged):
        codes, meta = found.codes[row, :, : count // PAGE], found.meta[row, :, : count // size]
        codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8, generator=generator))
        scale = (torch.rand(*meta.shape[:-1], meta.shape[-1] // 2, generator=generator) + 0.5) / top
        zero = torch.randn(scale.shape, generator=generator) * 0.5 - scale * top / 2
        meta.copy_(torch.stack([scale * 3.5, zero], -1).flatten(-2))
    return found


def cache(
    keys: Format,
    values: Format,
    seen: list[int],
    device: torch.device,
    count: int = 1,
    heads: int = HEADS,
    dim: int = DIM,
    sinks: int = 3,
    recent: int = 20,
    shift: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Cache:
    """Rows that know `seen` tokens, the last `count` of which ask; slots without tokens are NaN."""
    window = Window(sinks, recent, max(keys.block, values.block))
    starts, paged = [window.due(n - count) for n in seen], [window.due(n - 1) for n in seen]
    state = torch.tensor([seen, starts, paged], dtype=torch.int32)
    ring = max(n - start for n, start in zip(seen, starts, strict=True)) + 5
    held = torch.full((2, len(seen), heads + 1, sinks + ring, dim), torch.nan)
    generator = torch.Generator().manual_seed(7)
    for row, (n, start) in enumerate(zip(seen, starts, strict=True)):
        known = min(n, sinks)
        places = sinks + (torch.arange(start, n - known) - shift) % ring
        slots = torch.cat([torch.arange(known), places])
        held[:, row, :, slots] = torch.randn(2, heads + 1, len(slots), dim, generator=generator)
    sides = (packed(format, heads, dim, paged, device) for format in (keys, values))
    exact = Exact(*held.to(dtype).to(device)[:, :, 1:].unbind(), shift)
    return Cache(*sides, exact, state.to(device), window)


def ask(
    count: int,
    share: int,
    device: torch.device,
    batch: int = BATCH,
    heads: int = HEADS,
    dim: int = DIM,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Queries [B, Hq, M, D], turned round as a model's are."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, count, heads * share, dim, generator=generator) * 1.5
    return query.to(dtype).to(device).transpose(1, 2)


def formats(dim: int, bits: int) -> list[Format]:
    """All ways to group a head of so many channels."""
    groups = sorted({group for group in (32, 64, dim) if dim % group == 0})
    channel = [Format(bits, group, False) for group in (32, 64, 128)]
    return channel + [Format(bits, group, True) for group in groups]


def named(value: object) -> str:
    """Test ids: bits, group, axis."""
    if isinstance(value, Format):
        return f"{value.bits}b-g{value.group}-{'token' if value.per_token else 'channel'}"
    return str(value).removeprefix("torch.")


K4, V4 = Format(4, 32, False), Format(4, 64, True)


MIXED = [(keys, values, dtype) for keys in BITS for values in BITS for dtype in NEAR]
if not GPU:
    MIXED = [(k, v, dtype) for k, v, dtype in MIXED if dtype == torch.bfloat16 or k == v]


@pytest.mark.parametrize(("keys", "values", "dtype"), MIXED, ids=named)
def test_bits_of_keys_and_values_mix(
    keys: int, values: int, dtype: torch.dtype, device: torch.device
) -> None:
    sides = Format(keys, 32, False), Format(values, 64, True)
    found = cache(*sides, [LONG] * BATCH, device, dtype=dtype)
    assert found.error(ask(1, 4, device, dtype=dtype)) < NEAR[dtype]


@pytest.mark.parametrize("values", formats(DIM, 3), ids=named)
@pytest.mark.parametrize("keys", formats(DIM, 4), ids=named)
def test_axes_and_groups_mix(keys: Format, values: Format, device: torch.device) -> None:
    found = cache(keys, values, [LONG] * BATCH, device)
    assert found.error(ask(1, 4, device)) < 0.01


def shapes() -> list[tuple[int, Format, Format]]:
    """Every head_dim with all groups and axes on both sides, and bits in turn."""
    # a head of 96 channels is cut into slices that a group of 32 does not fit
    found = [(96, Format(bits, 32, True), Format(bits, 96, True)) for bits in BITS]
    for dim in (16, 32, 80, 96, 128, 256):
        bits = [bits for bits in BITS if bits != 3 or dim % 32 == 0]
        ways = [way[1:] for way in (*formats(dim, 4), Format(4, 16, True))]
        for i in range(len(ways)):
            keys = Format(bits[(i + dim // 32) % len(bits)], *ways[i])
            values = Format(bits[(i + dim // 64) % len(bits)], *ways[i - 2])
            found.append((dim, keys, values))
    return found


@pytest.mark.parametrize(("dim", "keys", "values"), shapes(), ids=named)
def test_head_dims_of_all_sizes(
    dim: int, keys: Format, values: Format, device: torch.device
) -> None:
    found = cache(keys, values, [LONG] * BATCH, device, dim=dim)
    assert found.error(ask(1, 2, device, dim=dim)) < 0.01


@pytest.mark.parametrize("count", [1, 2, 5, 20])
@pytest.mark.parametrize("share", [1, 3, 4, 7, 8])
def test_query_heads_and_queries_share_a_page(share: int, count: int, device: torch.device) -> None:
    """Up to 160 columns; the queries lie on both sides of where a page was closed."""
    seen = LONG if GPU else 64 + 3 + 20 + 5
    found = cache(K4, V4, [seen] * BATCH, device, count)
    assert found.error(ask(count, share, device)) < 0.01


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scale", [None, 0.31])
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
def test_logits_are_scaled_and_capped(
    softcap: float | None, scale: float | None, count: int, device: torch.device
) -> None:
    found = cache(K4, V4, [LONG] * BATCH, device, count)
    assert found.error(ask(count, 2, device), softcap=softcap, scale=scale) < 0.01


@pytest.mark.parametrize(
    ("seen", "count", "sinks", "recent"),
    [
        ([1], 1, 0, 0),
        ([1], 1, 3, 20),  # fewer tokens than sinks
        ([3], 1, 3, 20),
        ([3], 3, 3, 20),
        ([4], 4, 3, 20),  # the first token after the sinks, no page
        ([40], 1, 64, 0),
        ([65], 1, 0, 0),  # one page, and the query's own token
        ([68], 1, 3, 0),
        ([129], 1, 0, 0),
        ([130], 2, 0, 0),  # one query reads a page that the other reads exactly
        ([131], 100, 3, 20),  # a chunk that closes pages for itself
        ([151], 5, 3, 20),
        ([1, 67, 200, 151], 1, 3, 20),
        ([20, 87, 212, 151], 20, 3, 20),
    ],
    ids=str,
)
def test_rows_of_any_length(
    seen: list[int], count: int, sinks: int, recent: int, device: torch.device
) -> None:
    """Ragged batches, no pages, no sinks, nothing exact but the query's own token; and a ring that
    does not begin with token 0."""
    found = cache(
        Format(4, 32, False), Format(8, 16, True), seen, device, count, 1, 16, sinks, recent, 1000
    )
    assert found.error(ask(count, 2, device, len(seen), 1, 16)) < 0.01


def test_a_query_may_lie_in_memory_as_it_likes(device: torch.device) -> None:
    found, query = cache(K4, V4, [LONG] * BATCH, device, 2), ask(2, 2, device)
    gaps = torch.stack([query, query], -1)[..., 0]
    stretch = torch.cat([query, query, query], 2)[:, :, 2:4]
    with implementation("triton"):
        one = found.attend(query.contiguous())
        assert not gaps.is_contiguous() and not stretch.is_contiguous()
        for view in (query, gaps, stretch):
            assert torch.equal(found.attend(view), one)


@pytest.mark.parametrize("count", [1, 3])
def test_how_a_context_is_split_does_not_matter(
    count: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stretch, one a page, more than pages; exact tokens shared out or on their own."""
    seen = [LONG, 20]
    found, query = cache(K4, V4, seen, device, count), ask(count, 2, device, 2)
    true = reference.attend_packed(query.float(), *found)
    for splits, room in ((1, 8), (1, 4096), (2, 4096), (5, 8), (16, 8), (16, 4096)):
        monkeypatch.setattr(launch, "split_count", lambda work, tiles, room, n=splits: n)
        monkeypatch.setattr(launch, "slots", lambda device, dim, columns, n=room: n)
        with implementation("triton"):
            answer = found.attend(query)
        assert (answer.float() - true).norm() / true.norm() < 0.006, (splits, room)


def test_longest_and_workspace_change_no_bit_of_the_answer(device: torch.device) -> None:
    found, query = cache(K4, V4, [LONG] * BATCH, device), ask(1, 2, device)
    workspace = Workspace()
    with implementation("triton"):
        longest = int(found.state[2].max())
        one = found.attend(query, longest=longest)
        for _ in range(2):  # what the first run left there must not matter
            assert torch.equal(found.attend(query, longest=longest, workspace=workspace), one)
    assert workspace.nbytes > 0


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_advance_takes_over_the_state(impl: str, device: torch.device) -> None:
    found, query = cache(K4, V4, [70, 200, 151], device), ask(1, 3, device, 3)
    before, state = torch.zeros_like(found.state), found.state.clone()
    with implementation(impl):
        plain = found.attend(query)
        assert torch.equal(found.attend(query, advance=before), plain)
    assert torch.equal(before, state) and torch.equal(found.state, state)


def by_the_book(query: Tensor, found: Cache, row: int, at: int) -> Tensor:
    """The answer to one query of a row, [Hq, D]: token by token, in float64."""
    seen, start, paged = found.state[:, row].tolist()
    window, count = found.window, query.shape[2]
    position = seen - count + at
    due = max(start, min(paged, window.due(position)))
    ring = found.exact.keys.shape[2] - window.sinks
    sides = []
    for side, held, is_keys in (
        (found.keys, found.exact.keys, True),
        (found.values, found.exact.values, False),
    ):
        pages = decode(side, is_keys, torch.float64)[row]
        picked = []
        for token in range(position + 1):
            if token < window.sinks:
                picked.append(held[row, :, token].double())
            elif token - window.sinks < due:
                picked.append(pages[:, token - window.sinks])
            else:
                slot = (token - window.sinks - found.exact.shift) % ring
                picked.append(held[row, :, window.sinks + slot].double())
        x = torch.stack(picked, 1)  # [H, T, D]
        sides.append(x.repeat_interleave(query.shape[1] // x.shape[0], 0))
    asked = query[row, :, at, :, None].double()
    weights = (sides[0] @ asked / math.sqrt(query.shape[3])).softmax(1)
    return (weights * sides[1]).sum(1)


@pytest.mark.parametrize("keys", [K4, Format(2, 128, False), Format(3, 32, True)], ids=named)
@pytest.mark.parametrize("count", [1, 6, 70])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (3, 20)])
def test_a_query_reads_a_token_from_its_page_once_the_token_was_due_then(
    keys: Format, count: int, sinks: int, recent: int, device: torch.device
) -> None:
    """The law of the reference: query p reads token t packed if and only if t < due(p)."""
    seen = [152, 215, max(count, 40)]
    found = cache(keys, V4, seen, device, count, 2, 64, sinks, recent, shift=5)
    query = ask(count, 2, device, 3, 2, 64, torch.float32)
    answer = reference.attend_packed(query, *found)
    for row in range(3):
        for at in {*range(0, count, 3), count - 1}:
            true = by_the_book(query, found, row, at)
            torch.testing.assert_close(answer[row, :, at].double(), true, atol=1e-5, rtol=1e-5)
