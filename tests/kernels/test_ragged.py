"""Laws of ragged heads: bytes are the sum over heads, and each is read as if it were alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    encode_into,
    implementation,
    plane_table,
    ragged_launch,
)
from kvtune_kernels.ragged import Plan, Ragged
from kvtune_kernels.ragged_launch import (
    attend_ragged,
    decode_ragged,
    encode_ragged,
    keep_ragged,
    unsupported_ragged,
)
from torch import Tensor

pytest.importorskip("triton")
# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

GPU = torch.cuda.is_available()
UNEVEN = [[0, 1], [63, 65]]
if GPU:
    UNEVEN = [[0, 1, 63, 64], [65, 8191, 1024, 4097]]
NEAR = 0.01  # of an answer's norm
SIDES: dict[str, tuple[Format | None, Format | None]] = {
    "16 bits": (None, None),
    "2 bits per channel": (Format(2, 32, False), Format(2, 64, True)),
    "4 bits per channel, groups of two pages": (Format(4, 128, False), Format(4, 32, True)),
    "8 bits per token": (Format(8, 64, True), Format(8, 64, True)),
    "3 bits of keys, values per channel": (Format(3, 64, False), Format(4, 64, False)),
    "symmetric": (Format(4, 32, True, 0, True), Format(2, 32, True, 0, True)),
}
TWO_PAGES = "4 bits per channel, groups of two pages"
FOUR = SIDES[TWO_PAGES]


class Layer(NamedTuple):
    """What is stored of a layer, and what it was made of."""

    keys: Ragged
    values: Ragged
    exact: tuple[Tensor, Tensor]
    kept: tuple[Tensor, Tensor]  # [B, H, T, D]
    marks: Tensor  # bool [B, H, T]

    def attend(self, query: Tensor, **more: Any) -> Tensor:
        return attend_ragged(query, self.keys, self.values, *self.exact, **more)


def layer(
    formats: tuple[Format | None, Format | None], device: torch.device,
    lengths: list[list[int]] = UNEVEN, dim: int = 64, exact: int = 21,
    dtype: torch.dtype = torch.bfloat16, planes: Tensor | None = None,
) -> Layer:  # fmt: skip
    """Random tokens, of which every head keeps so many, anywhere; slots behind them are NaN."""
    generator = torch.Generator().manual_seed(dim)
    counts = torch.tensor(lengths)
    size = (*counts.shape, int(counts.max()) + 9, dim)
    rank = torch.rand(size[:3], generator=generator).argsort(-1).argsort(-1)
    marks = (rank < counts[..., None]).to(device)
    kept = torch.randn(2, *size, generator=generator).to(dtype).to(device)
    held = torch.randn(2, *counts.shape, exact, dim, generator=generator).to(dtype).to(device)
    keys = keep_ragged(kept[0], marks, formats[0], True, planes)
    values = keep_ragged(kept[1], marks, formats[1], False)
    return Layer(keys, values, (held[0], held[1]), (kept[0], kept[1]), marks)


def ask(found: Layer, share: int = 2, count: int = 1) -> Tensor:
    """Queries [B, Hq, M, D], turned round as a model's are."""
    batch, heads, _, dim = found.exact[0].shape
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(batch, count, heads * share, dim, generator=generator) * 1.5
    return query.to(found.exact[0]).transpose(1, 2)


def by_the_book(
    found: Layer, query: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """The answers [B, Hq, M, D] token by token, in float64."""
    batch, query_heads, count, dim = query.shape
    share = query_heads // found.marks.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for b in range(batch):
        for q in range(query_heads):
            h = q // share
            sides = (found.keys, True), (found.values, False)
            kept = [
                decode_ragged(x, b, h, is_keys, torch.float64, dim)[0, 0] for x, is_keys in sides
            ]
            for m in range(count):
                seen = found.exact[0].shape[2] - (count - 1 - m)
                k, v = (
                    torch.cat([x, e[b, h, :seen].double()])
                    for x, e in zip(kept, found.exact, strict=True)
                )
                s = k @ query[b, q, m].double() * (dim**-0.5 if scale is None else scale)
                s = s if softcap is None else softcap * torch.tanh(s / softcap)
                out[b, q, m] = s.softmax(0) @ v
    return out


def check(found: Layer, query: Tensor, near: float = NEAR, **more: Any) -> None:
    """Both implementations answer by the book."""
    true = by_the_book(found, query, **more)
    for name in ("reference", "triton"):
        with implementation(name):
            out = found.attend(query, **more)
        assert out.dtype == query.dtype and out.shape == query.shape
        assert float((out - true).norm()) <= near * float(true.norm()), name


@pytest.mark.parametrize(
    ("sides", "dim"), [*((sides, 64) for sides in SIDES), ("16 bits", 128), (TWO_PAGES, 128)]
)
def test_every_head_reads_the_tokens_that_it_keeps(
    sides: str, dim: int, device: torch.device
) -> None:
    found = layer(SIDES[sides], device, dim=dim)
    check(found, ask(found))


@pytest.mark.parametrize("dim", [16, 80, 96, 256])
@pytest.mark.parametrize("sides", ["16 bits", "8 bits per channel"])
def test_head_dims_of_all_sizes(sides: str, dim: int, device: torch.device) -> None:
    formats = (None, None) if sides == "16 bits" else (Format(8, 32, False), Format(8, dim, True))
    found = layer(formats, device, [[70]], dim)
    check(found, ask(found))


@pytest.mark.parametrize(("share", "count"), [(1, 1), (3, 5), (4, 1), (8, 1), (8, 5)])
@pytest.mark.parametrize("sides", ["16 bits", TWO_PAGES])
def test_query_heads_and_queries_share_a_page(
    sides: str, share: int, count: int, device: torch.device
) -> None:
    """Up to 40 columns, which take two programs; queries see one another as they follow."""
    found = layer(SIDES[sides], device, [[0, 65]])
    check(found, ask(found, share, count))


@pytest.mark.parametrize(("scale", "softcap"), [(0.31, None), (None, 30.0), (0.31, 0.5)])
@pytest.mark.parametrize("sides", ["16 bits", "2 bits per channel"])
def test_logits_are_scaled_and_capped(
    sides: str, scale: float | None, softcap: float | None, device: torch.device
) -> None:
    found = layer(SIDES[sides], device, [[66]])
    check(found, ask(found), scale=scale, softcap=softcap)


def test_float16_is_read(device: torch.device) -> None:
    for sides in ((None, None), FOUR):
        found = layer(sides, device, [[64]], dtype=torch.float16)
        check(found, ask(found), 0.003)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("sides", ["16 bits", "2 bits per channel"])
def test_heads_without_tokens_answer_from_exact_ones_or_nothing(
    sides: str, impl: str, device: torch.device
) -> None:
    found = layer(SIDES[sides], device, [[0, 0]], exact=9)
    check(found, ask(found))
    nothing = layer(SIDES[sides], device, [[0, 65], [0, 0]], exact=0)
    with implementation(impl):
        out = nothing.attend(ask(nothing))
    assert out.isfinite().all() and (out[:, :2] == 0).all() and (out[1] == 0).all()
    assert (out[0, 2:] != 0).any()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("sides", ["16 bits", TWO_PAGES])
def test_rows_know_exact_tokens_of_their_own(sides: str, impl: str, device: torch.device) -> None:
    """What lies behind them may be NaN."""
    found, counts = layer(SIDES[sides], device, [[3], [65]]), [20, 4]
    query = ask(found, count=2)
    known = torch.tensor(counts, dtype=torch.int32, device=device)
    for b, count in enumerate(counts):
        for x in found.exact:
            x[b, :, count:] = torch.nan
    with implementation(impl):
        out = found.attend(query, known=known)
    for b, count in enumerate(counts):
        cut = found._replace(exact=tuple(x[:, :, :count] for x in found.exact))
        true = by_the_book(cut, query)[b]
        assert float((out[b] - true).norm()) <= NEAR * float(true.norm())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equal_lengths_are_read_as_packed_pages_are(
    bits: int, impl: str, device: torch.device
) -> None:
    """The same tokens in a rectangle, with the exact ones in a ring behind them."""
    formats, count, exact = (Format(bits, 64, False), Format(bits, 64, True)), 128, 16
    found = layer(formats, device, [[count], [count]], exact=exact)
    packed = []
    for format, x, is_keys in zip(formats, found.kept, (True, False), strict=True):
        side = Packed.empty(format, 2, 1, count, 64, device)
        encode_into(side, x[found.marks].view(2, 1, count, 64), 0, is_keys)
        packed.append(side)
    state = torch.tensor([[count + exact], [count], [count]], dtype=torch.int32, device=device)
    query = ask(found, 4)
    with implementation(impl):
        out = found.attend(query)
        true = attend_packed(
            query, *packed, Exact(*found.exact), state.repeat(1, 2).contiguous(), Window(0, 0, 64)
        )
    assert float((out - true).float().norm()) <= 0.005 * float(true.float().norm())


@pytest.mark.parametrize("sides", SIDES)
def test_bytes_are_the_sum_over_heads(sides: str, device: torch.device) -> None:
    """Whole blocks of every head; beside them, one offset and one length a head."""
    found = layer(SIDES[sides], device, dim=64)
    for side in (found.keys, found.values):
        total = 0
        for tokens in side.lengths.flatten().tolist():
            block = side.format.block if side.format else PAGE
            own = -(-tokens // block) * block
            if side.format is None:
                total += own * 64 * 2
                continue
            alone = Packed.empty(side.format, 1, 1, own, 64, device)
            total += alone.codes.nbytes + alone.meta.nbytes
        assert side.codes.nbytes + side.meta.nbytes == total
        assert side.nbytes == total + 16 * side.lengths.numel()


def test_plans_are_counted(device: torch.device) -> None:
    found = layer(FOUR, device, [[3, 0]])
    before = found.keys.nbytes
    with implementation("triton"):
        found.attend(ask(found))
        held = found.keys.nbytes
        found.attend(ask(found))
    assert found.keys.nbytes == held > before


@pytest.mark.parametrize("lengths", [UNEVEN, [[0]], [[5000, 0, 1], [640, 8, 4096]]], ids=str)
@pytest.mark.parametrize("room", [1, 8, 1056])
def test_a_plan_reads_every_token_once(lengths: list[list[int]], room: int) -> None:
    """Each head's parts follow one another, and lie in pages of its own."""
    counts = torch.tensor(lengths)
    keys, values = (Ragged.empty(f, counts, 16, torch.device("cpu")) for f in FOUR_16)
    plan = Plan.of(keys, values, 1, room)
    rows = sorted(plan.items.tolist(), key=lambda row: row[6])
    assert [row[6] for row in rows] == list(range(len(rows)))
    for head, count in enumerate(counts.flatten().tolist()):
        own = [row for row in rows if row[0] == head]
        assert [row[4] for row in own] == list(range(len(own)))
        assert {row[5] for row in own} == {len(own)} and plan.first[head] == own[0][6]
        read = 0
        for row in own:
            assert read % 128 == 0
            assert row[1] == keys.offsets.flatten()[head] + read // PAGE
            assert row[2] == values.offsets.flatten()[head] + read // PAGE
            read += row[3]
        assert read == count
    assert plan.first[-1] == len(rows) and plan.most <= 256


FOUR_16 = Format(4, 128, False), Format(4, 16, True)


@pytest.mark.parametrize("spread", [1, 8, 64])
def test_work_goes_by_the_total_of_pages_not_by_the_longest_head(spread: int) -> None:
    """64 heads of 32,768 tokens together each 512: the longest part is near the mean of parts."""
    weights = torch.linspace(1, spread, 64)
    counts = (weights / weights.sum() * 64 * 8192).long().view(8, 8)
    sides = (Ragged.empty(None, counts, 16, torch.device("cpu")) for _ in range(2))
    plan = Plan.of(*sides, 1, 1056)
    pages = (plan.items[:, 3] + PAGE - 1) // PAGE
    assert int(pages[0]) == int(pages.max()), "the longest come first"
    assert int(pages.max()) <= 1.4 * math.ceil(int(pages.sum()) / 1056)


@pytest.mark.parametrize("room", [1, 5, 4096])
@pytest.mark.parametrize("sides", ["16 bits", "8 bits per token"])
def test_how_heads_are_split_does_not_matter(
    sides: str, room: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged_launch, "slots", lambda device, dim, columns: room)
    monkeypatch.setattr(ragged_launch, "slots_16", lambda device, wide: room)
    found = layer(SIDES[sides], device, [[130, 0, 3]])
    check(found, ask(found))


@pytest.mark.parametrize("sides", ["16 bits", "8 bits per token"])
def test_a_shared_workspace_changes_no_bit_of_the_answer(sides: str, device: torch.device) -> None:
    found, workspace = layer(SIDES[sides], device), Workspace()
    other = layer(SIDES[sides], device, [[130]])
    with implementation("triton"):
        one = found.attend(ask(found))
        other.attend(ask(other, 4), workspace=workspace)
        assert torch.equal(found.attend(ask(found), workspace=workspace), one)


def tokens_of(side: Ragged, keys: bool) -> list[Tensor]:
    rows, heads = side.lengths.shape
    return [
        decode_ragged(side, b, h, keys, torch.float32, 64)
        for b in range(rows)
        for h in range(heads)
    ]


@pytest.mark.parametrize(
    ("sides", "impl"),
    [*((sides, "reference") for sides in SIDES), ("16 bits", "triton"), (TWO_PAGES, "triton")],
)
def test_tokens_are_written_at_once_by_head_or_for_all_heads(
    sides: str, impl: str, device: torch.device
) -> None:
    """To the last bit, in two pieces as in one."""
    format = SIDES[sides][0]
    with implementation(impl):
        found = layer(SIDES[sides], device, [[136], [136]])
        own = found.kept[0][found.marks].view(2, 1, 136, 64)
        heads = Ragged.empty(format, found.keys.lengths, 64, device)
        every = Ragged.empty(format, found.keys.lengths, 64, device)
        for first, last in ((0, 128), (128, 136)):
            encode_ragged(every, own[:, :, first:last], first, True)
            for b in range(2):
                encode_ragged(heads, own[b : b + 1, :, first:last], first, True, b, 0)
    for one, two, three in zip(
        *(tokens_of(x, True) for x in (found.keys, heads, every)), strict=True
    ):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_sixteen_bits_are_kept_as_they_came_in_their_order(device: torch.device) -> None:
    found = layer((None, None), device)
    for side, x in zip((found.keys, found.values), found.kept, strict=True):
        for i, kept in enumerate(tokens_of(side, True)):
            b, h = divmod(i, side.lengths.shape[1])
            assert torch.equal(kept[0, 0], x[b, h][found.marks[b, h]].float())


@pytest.mark.parametrize("sides", SIDES)
def test_a_pool_grows_and_shrinks_with_its_heads(sides: str, device: torch.device) -> None:
    """What was there stays; a block that left the window is written behind it."""
    found = layer(SIDES[sides], device, [[128, 256], [0, 384]])
    more = torch.tensor([[256, 256], [128, 128]])
    wider = found.keys.resized(more)
    for b, h, first in ((0, 0, 128), (1, 0, 0)):
        encode_ragged(wider, found.kept[0][b : b + 1, h : h + 1, :128], first, True, b, h)
    old, new = tokens_of(found.keys, True), tokens_of(wider, True)
    assert [x.shape[2] for x in new] == more.flatten().tolist()
    for one, two in zip(old, new, strict=True):
        count = min(one.shape[2], two.shape[2])
        assert torch.equal(one[:, :, :count], two[:, :, :count])
    alone = keep_ragged(
        found.kept[0][:1, :1, :128], found.marks[:1, :1, :128] | True, found.keys.format, True
    )
    assert torch.equal(new[0][:, :, 128:], decode_ragged(alone, 0, 0, True, torch.float32, 64))


def test_planes_of_mixed_bits_are_read_of_each_head(device: torch.device) -> None:
    counts = torch.tensor([[2] * 32 + [1] * 32, [1] * 32 + [2] * 32])
    planes = plane_table(counts).to(device)
    formats = Format(2, 32, False, planes.shape[1]), Format(2, 64, True)
    found = layer(formats, device, [[70, 0], [0, 5]], planes=planes)
    check(found, ask(found, 4))


def test_what_no_kernel_reads_is_read_in_plain_torch(device: torch.device) -> None:
    found = layer((None, Format(4, 64, True)), device, [[70, 3]])
    query = ask(found)
    given = (query, found.keys, found.values, found.exact[0])
    assert "16 bits" in str(unsupported_ragged(*given))
    with implementation("reference"):
        out = found.attend(query)
    true = by_the_book(found, query)
    assert float((out - true).norm()) <= NEAR * float(true.norm())
    wide = layer((None, None), device, [[70, 3]], dtype=torch.float32)
    assert "float32" in str(unsupported_ragged(ask(wide), wide.keys, wide.values, wide.exact[0]))
    with implementation("reference"):
        out = wide.attend(ask(wide)).double()
    torch.testing.assert_close(out, by_the_book(wide, ask(wide)), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    found = layer(FOUR, device, [[200, 64]])
    query = ask(found)
    with pytest.raises(ValueError, match="counts"):
        Ragged.empty(None, torch.tensor([[-1]]), 64, device)
    with pytest.raises(ValueError, match="other lengths"):
        attend_ragged(query, found.keys, layer(FOUR, device, [[1, 2]]).values, *found.exact)
    with pytest.raises(ValueError, match="do not fit lengths"):
        found.attend(query[:, :3])
    with pytest.raises(ValueError, match="exact tokens"):
        attend_ragged(query, found.keys, found.values, found.exact[0], found.exact[1][:, :, :2])
    with pytest.raises(ValueError, match="22 queries"):
        found.attend(query.repeat(1, 1, 22, 1))
    x = found.kept[0]
    with pytest.raises(ValueError, match="do not fit whole blocks"):
        encode_ragged(found.keys, x[:, :, :128], 64, True)
    with pytest.raises(ValueError, match="do not fit whole blocks"):
        encode_ragged(found.keys, x[:, :, :128], 0, True)
    with pytest.raises(ValueError, match="end no head"):
        encode_ragged(found.keys, x[:, :, :64], 0, True, 0, 0)
    with pytest.raises(ValueError, match="not packed"):
        _ = layer((None, None), device, [[1]]).keys.pool
