"""Successive halving over several objectives: who goes on from a cheap measure to a dear one."""

from __future__ import annotations

from collections.abc import Sequence

Values = tuple[float, ...]

FEWEST = 8  # measured rivals below which everybody is promoted
SHARE = 0.5  # of all that was measured cheaply, the part that is worth the dear measure


def ranks(points: Sequence[Values]) -> list[int]:
    """Each point's rank: 0 on the front, 1 on the front of the rest, and so on (all minimised)."""
    left, found, rank = set(range(len(points))), [0] * len(points), 0
    while left:
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        for i in front:
            found[i] = rank
        left -= set(front)
        rank += 1
    return found


def promoted(one: Values, others: Sequence[Values]) -> bool:
    """Whether a cheaply measured point is among the better half of all, by rank.

    Asynchronous successive halving (ASHA, arXiv:1810.05934) with non-domination rank in place of
    a single loss: it looks only at what is known now, so no worker ever waits for another.
    """
    if len(others) < FEWEST:
        return True
    own, *rest = ranks([one, *others])
    better = sum(rank < own for rank in rest)
    return better < SHARE * (len(rest) + 1)


def dominates(a: Values, b: Values) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
