"""Rank and bits beside bits alone: both fronts on held-out text, met at equal true bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvtune.report.records import Candidate, Summary


class Pair(NamedTuple):
    """A point of the front of bits alone, and the best with a projection at no more bytes."""

    alone: Candidate
    mixed: Candidate | None

    @property
    def times(self) -> float | None:
        """The KL of bits alone in parts of the other's: above 1 rank and bits are better."""
        if self.mixed is None or self.mixed.kl <= 0:
            return None
        return self.alone.kl / self.mixed.kl

    @property
    def wins(self) -> bool:
        """Whether a projection lowers the KL here."""
        return self.mixed is not None and self.mixed.kl < self.alone.kl


def fronts(summary: Summary) -> tuple[list[Candidate], list[Candidate]]:
    """What nothing of its kind beats on held-out text: bits alone, and with a projection
    somewhere; the fewest bytes first. Uniform recipes count among both."""
    held = [own for own in summary.held_out if "tokens" not in own.axes]  # `axes` tells of those
    return front(own for own in held if not own.projects), front(o for o in held if o.projects)


def pairs(summary: Summary) -> list[Pair]:
    """Both fronts at the bytes of each point of bits alone; nothing where one of them is empty."""
    alone, mixed = fronts(summary)
    if not mixed:
        return []
    return [Pair(own, within(mixed, own.bytes)) for own in alone]


def verdict(summary: Summary) -> str:
    """Who wins where, in a sentence; empty where projections were not searched."""
    met = pairs(summary)
    if not met:
        return ""
    at = f"bytes counted at {summary.points[0].bytes_context:,} tokens, fitted bases included"
    won = [pair for pair in met if pair.wins]
    if not won:
        return f"Bits alone win at every budget: no projection has a lower KL there ({at})."
    best = max(won, key=lambda pair: pair.times or 0.0)
    most = f", at most {best.times:.2f} times at {best.alone.bits:.2f} bits" if best.times else ""
    return (
        f"At equal true bytes rank and bits together have a lower KL than bits alone at {len(won)} "
        f"of {len(met)} points of its front{most} ({at})."
    )


def front(found: Iterable[Candidate]) -> list[Candidate]:
    """What no other beats in bytes and KL, the fewest bytes first."""
    kept: list[Candidate] = []
    for own in sorted(found, key=lambda one: (one.bytes, one.kl)):
        if not kept or own.kl < kept[-1].kl:
            kept.append(own)
    return kept


def within(found: list[Candidate], most: float) -> Candidate | None:
    """The last of a front, given in ascending bytes, that takes no more."""
    return next((own for own in reversed(found) if own.bytes <= most), None)
