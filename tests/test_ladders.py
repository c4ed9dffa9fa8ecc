"""Laws of kvtune/ladders.py: worked vectors of LaCache, and what holds for every ladder."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvtune.ladders import Ladder, Stair

EVERY = [
    Ladder(layers, span, overlap, pattern)
    for layers in (1, 4, 7, 30)
    for span in sorted({1, 2, layers // 4, layers // 2, layers - 1, layers, 99} - {0})
    for overlap in (0, 3)
    for pattern in ("repo", "contiguous")
]


@pytest.mark.parametrize(
    ("ladder", "before", "after"),
    [
        (Ladder(32, 9, 3), 5, 2),
        (Ladder(32, 16, 0), 2, 1),
        (Ladder(24, 9, 7), 9, 5),
        (Ladder(28, 14, 0), 2, 1),
    ],
    ids=str,
)
def test_a_ladder_has_the_stair_of_the_paper(ladder: Ladder, before: int, after: int) -> None:
    assert ladder.stair == Stair(before, after)
    assert ladder.stair.removed == before - after


def slots(ladder: Ladder, blocks: int = 1) -> list[list[int]]:
    return [ladder.slots(layer, blocks).tolist() for layer in range(ladder.layers)]


def test_layers_step_through_a_block_and_begin_again() -> None:
    assert slots(Ladder(32, 9, 3)) == [[0, 1], [1, 2], [2, 3], [3, 4]] * 8
    assert slots(Ladder(32, 16, 0), 3) == [[0, 2, 4], [1, 3, 5]] * 16


def test_contiguous_bands_keep_what_is_old_in_shallow_layers() -> None:
    wanted = [[0, 1]] * 8 + [[1, 2]] * 8 + [[2, 3]] * 8 + [[3, 4]] * 8
    assert slots(Ladder(32, 9, 3, "contiguous")) == wanted


def both(ladder: Ladder, stair: Stair) -> set[int]:
    """The places of one block that any layer keeps."""
    return {
        place for layer in range(ladder.layers) for place in ladder.slots(layer, 1, stair).tolist()
    }


def test_some_layer_keeps_every_token_of_a_block() -> None:
    for ladder in EVERY:
        assert both(ladder, ladder.stair) == set(range(ladder.stair.before)), ladder
        for stair in (ladder.wider(2), ladder.wider(3)):
            kept = both(ladder, stair)
            assert kept <= set(range(stair.before)), "no layer steps out of a block"
            if ladder.stair.removed and stair.offsets <= ladder.layers:
                assert kept == set(range(stair.before))


def test_a_wider_stair_takes_at_least_so_many_times_as_much() -> None:
    for ladder, times in itertools.product(EVERY, (1, 2, 5)):
        assert ladder.wider(times).removed >= times * ladder.stair.removed
        assert ladder.wider(1) == ladder.stair


def kept(ladder: Ladder, length: int, capacity: int, **more: int) -> tuple[Tensor, int]:
    """What all layers keep [layers, n], and the cursor."""
    found = [ladder.compact(i, length, capacity, **more) for i in range(ladder.layers)]
    assert len({own.cursor for own in found}) == 1
    assert len({len(own.places) for own in found}) == 1, "every layer keeps as many"
    return torch.stack([own.places for own in found]), found[0].cursor


SIZES = [(9, 8), (33, 32), (61, 60), (100, 64), (300, 256), (256, 100), (2000, 100), (9000, 80)]


@pytest.mark.parametrize("start", [0, 4])
def test_a_compaction_keeps_no_more_than_its_capacity_in_order_and_never_loses_sinks(
    start: int,
) -> None:
    for ladder, (length, capacity) in itertools.product(EVERY, SIZES):
        found, cursor = kept(ladder, length, capacity, start=start, cursor=start)
        assert 0 < found.shape[1] <= capacity
        assert (found.diff() > 0).all()
        assert torch.equal(found[:, :start], torch.arange(start).expand(ladder.layers, -1))
        assert (found[:, -1] == length - 1).all(), "the newest token stays"
        assert start <= cursor <= found.shape[1]


def test_what_fits_stays_as_it_is() -> None:
    for ladder in EVERY:
        found, cursor = kept(ladder, 50, 50, start=4, cursor=20)
        assert torch.equal(found[0], torch.arange(50))
        assert cursor == 20


@pytest.mark.parametrize("every", [1, 16, 64, 500])
def test_a_stream_never_holds_more_than_its_capacity(every: int) -> None:
    for ladder in EVERY[::3]:
        held, cursor, last = torch.arange(4).expand(ladder.layers, -1), 4, 4
        for _ in range(12):
            more = torch.arange(last, last + every).expand(ladder.layers, -1)
            last += every
            held = torch.cat([held, more], 1)
            places, cursor = kept(ladder, held.shape[1], 90, cursor=cursor, start=4)
            held = held.gather(1, places)
            assert held.shape[1] <= 90
            assert torch.equal(held[:, :4], torch.arange(4).expand(ladder.layers, -1))
            assert (held[:, -1] == last - 1).all()


def test_a_stair_goes_on_where_the_last_one_ended() -> None:
    ladder = Ladder(32, 9, 3)
    found, cursor = kept(ladder, 106, 100, start=4, cursor=4)  # two blocks take three each
    assert cursor == 4 + 2 * 2
    assert found[1].tolist() == [0, 1, 2, 3, 5, 6, 10, 11, *range(14, 106)]
    again, cursor = kept(ladder, 101, 100, start=4, cursor=cursor)
    assert cursor == 4 + 3 * 2
    assert again[1].tolist() == [*range(8), 9, 10, *range(13, 101)], "left of the cursor all stays"


def test_a_full_room_is_finished_and_the_stair_starts_over() -> None:
    """The room is (100 - 4 - 32) // 2 = 32 blocks, which take 96; the other 4 take two blocks more,
    which the first places that were compacted before give."""
    ladder = Ladder(32, 9, 3)
    found, cursor = kept(ladder, 200, 100, start=4, cursor=4)
    assert cursor == 4 + 2 * 2
    once = [0, 1, 2, 3, *(4 + 5 * j + slot for j in range(32) for slot in (0, 1))]
    once += range(164, 200)
    twice = [*once[:4], *once[4:6], *once[9:11], *once[14:]]
    assert found[0].tolist() == twice
    assert len(twice) == 98


def test_more_than_a_pass_takes_a_wider_stair() -> None:
    """A pass takes 64 // 1 = 64; 300 more need 5 times as much: blocks of 6, of which one stays."""
    ladder = Ladder(32, 16, 0)
    found, cursor = kept(ladder, 100 + 64 + 300, 100, start=4, cursor=4)
    assert cursor == 4 + 60
    once = [0, 1, 2, 3, *range(5, 132, 2), *range(132, 464)]  # of an odd layer
    twice = [*once[:4], *once[4 + 1 : 4 + 360 : 6], *once[364:]]
    assert found[1].tolist() == twice
    assert len(twice) == 100


def test_where_no_stair_takes_anything_the_oldest_go() -> None:
    for ladder in (Ladder(32, 32), Ladder(4, 3, 2), Ladder(1, 1), Ladder(32, 9, 3)):
        capacity = 20 if ladder.stair.removed else 100  # no room for as many tokens as layers
        found, cursor = kept(ladder, 150, capacity, start=4, cursor=4)
        assert found[0].tolist() == [0, 1, 2, 3, *range(150 - capacity + 4, 150)]
        assert cursor == 4


def test_a_layer_holds_the_mean_on_average() -> None:
    """From the capacity it sinks by a block, and grows back token by token."""
    for ladder in (Ladder(32, 9, 3), Ladder(32, 2, 0), Ladder(24, 9, 7)):
        top, held, cursor, sizes = ladder.capacity(200), 200, 4, []
        for _ in range(400):
            held += 1
            found = ladder.compact(0, held, top, cursor, 4)
            held, cursor = len(found.places), found.cursor
            sizes.append(held)
        assert max(sizes) == top
        assert abs(sum(sizes[100:]) / len(sizes[100:]) - 200) <= 1


def test_sinks_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="a capacity of 3 cannot hold 4 sinks"):
        Ladder(4, 2).compact(0, 9, 3, start=4)
