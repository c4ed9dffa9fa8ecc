"""Bootstrap intervals of means of scores, and how many items a conclusion needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

RESAMPLES = 2000
NONE_SEEN = 3.0  # what never happened in n items happens in fewer than 3/n of all, at 95 %


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def resampled(groups: Sequence[Sequence[float]], bounds: tuple[float, float]) -> Interval:
    """The mean of the groups' means, and its percentile bootstrap interval.

    Items are resampled within their group. A group without any spread would promise certainty:
    there the rule of three widens the interval, within `bounds`.
    """
    generator = torch.Generator().manual_seed(0)
    means, middle, slack = torch.zeros(RESAMPLES, dtype=torch.float64), 0.0, 0.0
    for group in groups:
        values = torch.tensor(group, dtype=torch.float64)
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        means += values[drawn].mean(1) / len(groups)
        middle += float(values.mean()) / len(groups)
        if bool((values == values[0]).all()):
            slack += NONE_SEEN / len(values) / len(groups)
    ends = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    low, high = max(bounds[0], ends[0] - slack), min(bounds[1], ends[1] + slack)
    return Interval(middle, low, high)


def items_needed(differences: Sequence[float], tolerance: float) -> int:
    """How many items would show a difference of `tolerance`, from the spread of those at hand."""
    count = len(differences)
    mean = sum(differences) / count
    spread = sum((x - mean) ** 2 for x in differences) / max(1, count - 1)
    if spread == 0:
        return math.ceil(NONE_SEEN / tolerance)
    return max(count + 1, math.ceil(1.96**2 * spread / tolerance**2))
