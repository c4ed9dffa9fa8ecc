"""Laws of successive halving by rank: the front goes on, whatever is clearly behind does not."""

import random

import pytest

from kvtune.halving import FEWEST, dominates, promoted, ranks

RIVALS = [(float(i), float(20 - i)) for i in range(20)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_are_fronts_peeled_off_one_after_the_other(count: int) -> None:
    source = random.Random(count)
    points = [tuple(source.randint(0, 9) / 1.0 for _ in range(count)) for _ in range(60)]
    found = ranks(points)
    for one, rank in zip(points, found, strict=True):
        above = [r for other, r in zip(points, found, strict=True) if dominates(other, one)]
        assert rank == max(above, default=-1) + 1


def test_a_point_on_the_front_goes_on_and_one_behind_every_other_does_not() -> None:
    assert promoted((5.0, 5.0), RIVALS)
    assert not promoted((21.0, 21.0), RIVALS)


def test_among_few_rivals_everybody_goes_on() -> None:
    assert promoted((21.0, 21.0), RIVALS[: FEWEST - 1])


def test_about_half_of_a_random_crowd_goes_on() -> None:
    source = random.Random(0)
    crowd = [(source.random(), source.random()) for _ in range(60)]
    on = sum(promoted(one, crowd[:i] + crowd[i + 1 :]) for i, one in enumerate(crowd))
    assert 25 <= on <= 45
