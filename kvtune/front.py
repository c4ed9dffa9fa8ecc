"""Front: which measured points are worth a proof, and the recipes that proved points become."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from kvtune.cache import Weight, weigh
from kvtune.halving import dominates
from kvtune.layout import NEGLIGIBLE, Base, Layout
from kvtune.measure import Bench
from kvtune.prove import Proof
from kvtune.recipe import Policy
from kvtune.space import AXES, axes
from kvtune.speed import Speed
from kvtune.study import Row, front
from kvtune.views import OWN

T = TypeVar("T")
SLIGHT, CLEARLY = 1.02, 0.8


@dataclass(frozen=True)
class Candidate:
    """A configuration on held-out text: true bytes, mean KL in nats over all its positions, and
    microseconds of attention per decoded token where a latency table is at hand."""

    origin: str
    policies: tuple[Policy, ...]
    bytes: int
    kl: float
    latency: float | None = None

    @property
    def is_uniform(self) -> bool:
        """True for a recipe that treats all layers alike."""
        return self.origin.startswith("uniform")

    @property
    def values(self) -> tuple[float, ...]:
        """What is compared: all are better when smaller."""
        return (
            (self.bytes, self.kl) if self.latency is None else (self.bytes, self.kl, self.latency)
        )

    def table(self, weight: Weight) -> dict[str, Any]:
        """Plain values; the ratio and bits are those of its bytes."""
        return {
            "origin": self.origin,
            "uniform": self.is_uniform,
            "projects": any(policy.projects for policy in self.policies),
            "axes": sorted(axes(self.policies)),
            "bytes": self.bytes,
            "bits": weight.bits,
            "ratio": weight.ratio,
            "kl": self.kl,
            "latency": self.latency,
        }


@dataclass(frozen=True)
class Point:
    """One proved recipe."""

    file: str
    label: str
    origin: str
    held_out_kl: float  # on all continuation positions of the proof text, from the bank
    best_uniform_kl: float | None  # the least of any measured uniform recipe at no more bytes
    latency: float | None  # microseconds of attention per decoded token, all layers
    proof: Proof

    def table(self) -> dict[str, Any]:
        """One flat row."""
        own = {name: value for name, value in asdict(self).items() if name != "proof"}
        return {**own, **self.proof.table()}


def worth_measuring(rows: list[Row], layout: Layout, most: int) -> list[tuple[str, Base]]:
    """All uniform rivals, and an even choice of the study's front, each with its origin; where
    projections are searched, also of the front of what has none, and where tokens are, of the
    fronts of some axes alone."""
    best = front(rows)
    found = [row for row in best if not row.origin.startswith("uniform")]
    chosen = evenly(found, [row.attrs["bits"] for row in found], most)
    for own in _alone(rows, layout):
        alone = [row for row in front(own) if not row.origin.startswith("uniform")]
        chosen += evenly(alone, [row.attrs["bits"] for row in alone], most)
    for budget in layout.budgets:
        within = [row for row in best if float(row.attrs["bytes"]) <= budget]
        chosen += [max(within, key=lambda row: float(row.attrs["bytes"]))] if within else []
    tuned = {row.number: (row.origin, layout.base(row.choice)) for row in chosen}
    return [*layout.rivals.items(), *tuned.values()]


def _alone(rows: list[Row], layout: Layout) -> list[list[Row]]:
    """The rows whose own fronts are told beside that of all."""
    if layout.mixed:
        return [[row for row in rows if row.attrs.get("projects") == 0]]
    found = []
    for used in OWN.values() if layout.joint else ():
        others = [f"uses_{axis}" for axis in AXES if axis not in used]
        found.append([row for row in rows if all(row.attrs.get(x) == 0 for x in others)])
    return found


def held_out(
    bench: Bench, layout: Layout, origin: str, base: Base, speed: Speed | None = None
) -> Candidate:
    """Measures a configuration on another text."""
    policies = layout.policies(base)
    weight = weigh(policies, layout.known, layout.goal.context, layout.goal.batch)
    latency = speed.recipe(policies) if speed else None
    return Candidate(origin, policies, weight.bytes, bench.measure(policies).means()["kl"], latency)


def worth_proving(
    measured: list[Candidate], most: int, budgets: Sequence[int] = ()
) -> list[Candidate]:
    """The points that no other beats on held-out text, uniform ones included; largest first.

    Where budgets in bytes are given, they are the best within each instead.

    Of those with a negligible KL only the smallest is kept. A point goes, too, where a fiftieth
    more of bytes and time buys another with a fifth less KL: nobody would choose it.
    """
    best = [own for own in measured if not any(dominates(x.values, own.values) for x in measured)]
    best = list({own.values: own for own in reversed(best)}.values())  # equals once, the first
    best.sort(key=lambda candidate: (-candidate.bytes, candidate.kl))
    if budgets:
        # in descending bytes, so the first within a budget is the nearest to the dense model
        within = [next((own for own in best if own.bytes <= budget), None) for budget in budgets]
        return [own for own in best if own in within]
    best = [own for own in best if not any(_bargain(other, own) for other in best)]
    while len(best) > 1 and best[1].kl < NEGLIGIBLE:
        del best[0]
    return evenly(best, [candidate.bytes for candidate in best], most)


def _bargain(other: Candidate, own: Candidate) -> bool:
    """Whether another point costs hardly more and is clearly nearer to the dense model."""
    dearer = other.bytes <= SLIGHT * own.bytes
    slower = (other.latency or 0.0) <= SLIGHT * (own.latency or 0.0)
    return dearer and slower and other.kl <= CLEARLY * own.kl


def best_uniform(measured: list[Candidate], budget: int) -> float | None:
    """The least KL of a uniform recipe at no more bytes."""
    return min((c.kl for c in measured if c.is_uniform and c.bytes <= budget), default=None)


def evenly(items: Sequence[T], sizes: Sequence[float | str], most: int) -> list[T]:
    """At most `most` items in their order, the rest dropped where sizes lie closest in ratio."""
    kept = list(range(len(items)))
    logs = [math.log(float(size)) for size in sizes]
    while len(kept) > most:
        kept.sort(key=lambda i: logs[i])
        gaps = [logs[kept[i + 1]] - logs[kept[i - 1]] for i in range(1, len(kept) - 1)]
        del kept[1 + gaps.index(min(gaps))]
    return [items[i] for i in sorted(kept)]
