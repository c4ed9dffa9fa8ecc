"""Laws of goals: objectives and limits that make a search, and those that make none."""

import itertools

import pytest

from kvtune.errors import UsageError
from kvtune.goal import OBJECTIVES, Bounds, Goal

BOUNDED = Bounds(max_bytes=1000, max_kl=0.1)
SUBSETS = [order for count in (1, 2, 3) for order in itertools.permutations(OBJECTIVES, count)]


@pytest.mark.parametrize("wanted", SUBSETS, ids=",".join)
def test_any_objectives_in_any_order_make_a_goal_within_limits(wanted: tuple[str, ...]) -> None:
    goal = Goal.parse(", ".join(wanted), 1024, 2, BOUNDED)
    assert goal.objectives == wanted
    assert goal.timed == ("latency" in wanted)


@pytest.mark.parametrize("wrong", ["memory,acuracy", "memory,memory", "", "memory,,accuracy"])
def test_other_objectives_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError):
        Goal.parse(wrong, 1024, 1)


@pytest.mark.parametrize("wanted", ["accuracy", "memory", "latency,memory"])
def test_a_goal_whose_best_is_known_without_a_search_names_the_limit_it_lacks(wanted: str) -> None:
    with pytest.raises(UsageError, match=r"Add.*--max-"):
        Goal.parse(wanted, 1024, 1)


def test_a_limit_on_latency_needs_times() -> None:
    assert Goal.parse("memory,accuracy", 1024, 1, Bounds(max_latency=5)).timed


def test_only_broken_limits_exceed() -> None:
    bounds = Bounds(max_bytes=100, max_kl=0.1, max_latency=None, min_ratio=4)
    over = bounds.excess({"bytes": 120, "kl": 0.05, "ratio": 3.0, "latency": 9.0})
    assert over == {"bytes": 20, "kl": pytest.approx(-0.05), "ratio": 1.0}
    assert bounds.excess({"bytes": 100}) == {"bytes": 0}
