"""Laws of pools of ragged heads: bytes are the sum over heads, and work goes by the sum as well."""

from __future__ import annotations

import math

import pytest
import torch
from kvtune_kernels import PAGE, Format, Packed, implementation
from kvtune_kernels.ragged import Plan, Ragged
from kvtune_kernels.ragged_launch import attend_ragged, decode_ragged, encode_ragged, keep_ragged
from ragged_layers import FOUR, SIDES, TWO_PAGES, UNEVEN, ask, layer
from torch import Tensor

pytest.importorskip("triton")
# the interpreter is numpy, which speaks of what `tl.where` then leaves out
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

FOUR_16 = Format(4, 128, False), Format(4, 16, True)


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
    rows = sorted(plan.items.tolist(), key=lambda row: row[7])
    assert [row[7] for row in rows] == list(range(len(rows)))
    for head, count in enumerate(counts.flatten().tolist()):
        own = [row for row in rows if row[0] == head]
        assert [row[5] for row in own] == list(range(len(own)))
        assert {row[6] for row in own} == {len(own)} and plan.first[head] == own[0][7]
        read = 0
        for _, key_page, value_page, begin, tokens, *_ in own:
            base = key_page - int(keys.offsets.flatten()[head])
            assert base % 2 == 0, "a page that a group of keys begins with"
            assert value_page - int(values.offsets.flatten()[head]) == base
            assert read == (base + begin) * PAGE and begin < 2
            read = base * PAGE + tokens
        assert read == count
    assert plan.first[-1] == len(rows) and plan.most <= 256


@pytest.mark.parametrize("spread", [1, 8, 64])
def test_work_goes_by_the_total_of_pages_not_by_the_longest_head(spread: int) -> None:
    """64 heads of 32,768 tokens together each 512: the longest part is near the mean of parts."""
    weights = torch.linspace(1, spread, 64)
    counts = (weights / weights.sum() * 64 * 8192).long().view(8, 8)
    sides = (Ragged.empty(None, counts, 16, torch.device("cpu")) for _ in range(2))
    plan = Plan.of(*sides, 1, 1056)
    pages = (plan.items[:, 4] + PAGE - 1) // PAGE - plan.items[:, 3]
    assert int(pages[0]) == int(pages.max()), "the longest come first"
    assert int(pages.max()) <= 1.4 * math.ceil(int(pages.sum()) / 1056)


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
