"""Clusters: layers that react alike to the same settings (KVTuner, arXiv:2502.04420)."""

from __future__ import annotations

import math

import numpy as np

from kvtune.space import SIDES
from kvtune.surrogate import Place, Surrogate


def clusters(surrogate: Surrogate, per_side: int) -> dict[str, tuple[tuple[int, str], ...]]:
    """Sides of layers in groups, named `keys 0`, `keys 1`, ... from the least sensitive on; where
    whole layers have one setting, as many groups of these as of both sides."""
    found: dict[str, tuple[tuple[int, str], ...]] = {}
    if surrogate.joint:
        per_side *= len(SIDES)
    for side in dict.fromkeys(place.side for place in surrogate.rungs):
        own = [place for place in surrogate.rungs if place.side == side]
        groups = _grouped(own, surrogate, per_side)
        groups.sort(key=lambda group: float(np.mean([_cheapest(surrogate, p) for p in group])))
        for index, group in enumerate(groups):
            found[f"{side} {index}"] = tuple((place.layer, place.side) for place in group)
    return found


def _cheapest(surrogate: Surrogate, place: Place) -> float:
    return surrogate.rungs[place][0].price


def _grouped(own: list[Place], surrogate: Surrogate, count: int) -> list[list[Place]]:
    """Average linkage over the mean distance of log prices plus
    the Jaccard distance of surviving settings."""
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(own) <= count:
        return [[place] for place in own]
    distances = [_distance(a, b, surrogate) for i, a in enumerate(own) for b in own[i + 1 :]]
    labels = fcluster(linkage(np.array(distances), "average"), count, "maxclust")
    return [
        [place for place, label in zip(own, labels, strict=True) if label == wanted]
        for wanted in sorted(set(labels))
    ]


def _distance(a: Place, b: Place, surrogate: Surrogate) -> float:
    left, right = (
        {r.chain: math.log(r.price + 1e-12) for r in surrogate.rungs[place]} for place in (a, b)
    )
    shared = [chain for chain in left if chain in right]
    apart = sum(abs(left[chain] - right[chain]) for chain in shared) / max(1, len(shared))
    alive_a, alive_b = ({r.chain for r in surrogate.ladders[place]} for place in (a, b))
    return apart + 1 - len(alive_a & alive_b) / len(alive_a | alive_b)
