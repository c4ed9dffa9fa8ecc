"""Tokens, bits and rank on one front, beside the front of each alone: met at equal true bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvtune.report.rank import front, within
from kvtune.report.records import Candidate, Summary

OWN = {
    "tokens alone": {"tokens"},
    "bits alone": {"bits"},
    "rank alone": {"rank"},
    "rank and bits": {"rank", "bits"},
}


class Met(NamedTuple):
    """The front of some axes alone, and at the bytes of each of its points the best of all."""

    name: str
    own: tuple[Candidate, ...]
    best: tuple[Candidate, ...]

    @property
    def lower(self) -> int:
        """At how many points all axes together have a lower KL."""
        return sum(best.kl < own.kl for own, best in zip(self.own, self.best, strict=True))

    @property
    def higher(self) -> int:
        """At how many they have a higher one."""
        return sum(best.kl > own.kl for own, best in zip(self.own, self.best, strict=True))

    @property
    def most(self) -> tuple[float, float] | None:
        """The KL of the axes alone in parts of the other's, where that is most, and the bits."""
        pairs = zip(self.own, self.best, strict=True)
        found = [(own.kl / best.kl, own.bits) for own, best in pairs if best.kl > 0]
        return max(found, default=None)


def fronts(summary: Summary) -> dict[str, list[Candidate]]:
    """What nothing beats on held-out text: of all that was measured, and of what saves by some
    axes alone; nothing where tokens were not searched beside other axes."""
    if not any(len(own.axes) > 1 and "tokens" in own.axes for own in summary.held_out):
        return {}
    found = {"tokens, bits and rank": front(summary.held_out)}
    for name, used in OWN.items():
        found[name] = front(_saving_by(summary.held_out, used))
    return {name: own for name, own in found.items() if own}


def _saving_by(held: Iterable[Candidate], used: set[str]) -> list[Candidate]:
    return [own for own in held if own.axes and used.issuperset(own.axes)]


def met(summary: Summary) -> list[Met]:
    """Each front of some axes alone, and the front of all at its bytes."""
    (best, *others) = [*fronts(summary).items()] or [("", [])]
    found = []
    for name, own in others:
        there = [(one, within(best[1], one.bytes)) for one in own]
        # what is measured is on or above the front of all, so there is always one
        pairs = [(one, other) for one, other in there if other is not None]
        found.append(Met(name, *map(tuple, zip(*pairs, strict=True))))
    return found


def verdict(summary: Summary) -> str:
    """Whether any axis alone is better anywhere, in sentences; empty where tokens were not
    searched beside other axes."""
    pairs = met(summary)
    if not pairs:
        return ""
    at = f"bytes counted at {summary.points[0].bytes_context:,} tokens"
    told = "; ".join(_told(own) for own in pairs)
    higher = sum(own.higher for own in pairs)
    points = sum(len(own.own) for own in pairs)
    where = "nowhere" if not higher else f"at {higher} of {points} points"
    both = [own for own in fronts(summary)["tokens, bits and rank"] if "tokens" in own.axes]
    mixed = sum(len(own.axes) > 1 for own in both)
    return (
        f"At equal true bytes one front over tokens, bits and rank has a lower KL than {told}; "
        f"{where} a higher one ({at}). {mixed} of its points drop tokens and save by another "
        "axis as well."
    )


def _told(own: Met) -> str:
    said = f"{own.name} at {own.lower} of {len(own.own)} points"
    if own.lower and own.most:
        times, bits = own.most
        said += f" (at most {times:.3g} times, at {bits:.2f} bits)"
    return said
