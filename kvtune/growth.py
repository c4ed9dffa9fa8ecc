"""Growth: how the KL of whole recipes grows with the sum of their prices, found by measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, overload

import numpy as np

from kvtune.space import SIDES, Side

TOLERANCE = 0.1  # relative: what sums miss by less is noise
POWERS = (0.8, 1.6)
FLATTENS = (0.3, 1.0)  # powers of tokens
SLOPES = 6
CROSS = (0.0, 2.0)
TINY = 1e-12  # nats


class Reading(NamedTuple):
    """A probe: the priced sums of keys and of values in nats, and the KL measured."""

    keys: float
    values: float
    measured: float


@dataclass(frozen=True)
class Growth:
    """KL = f_k + f_v + cross * sqrt(f_k * f_v), with f = scale * sum ** power on each side.

    Prices of single layers nearly add up for noise (power 1, cross 0), low by a steady factor.
    Systematic errors compound: their power is above 1. Where keys and values disturb the same
    directions their effects add up before they are squared: cross is above 0.
    """

    keys: tuple[float, float] = (1.0, 1.0)  # scale, power
    values: tuple[float, float] = (1.0, 1.0)
    cross: float = 0.0
    missed: tuple[float, float, float] = (0.0, 0.0, 0.0)
    # by how much plain sums missed, at most, relatively: keys, values, both together
    tokens: tuple[float, float] = (1.0, 1.0)  # of what selections cost at 16 bits

    @classmethod
    def fit(cls, readings: Sequence[Reading]) -> Growth:
        """Fits one-sided and joint readings; terms beyond a scale only where scales alone miss.

        What is detected: probes of one side whose measured KL is not a steady multiple of its
        priced sum, by more than a tenth, get a power; joint probes that differ from the sum of
        both sides by more than a tenth get a cross term.
        """
        sides = {side: _one_sided(readings, side) for side in SIDES}
        fitted = {side: _curve(pairs) for side, pairs in sides.items()}
        missed = [_spread(pairs) for pairs in sides.values()]
        alone = cls(fitted["keys"], fitted["values"])
        joint = [one for one in readings if one.keys > 0 and one.values > 0 and one.measured > 0]
        off = [one.measured / float(alone.kl(one.keys, one.values)) - 1 for one in joint]
        worst = max(map(abs, off), default=0.0)
        cross = alone._cross(joint) if worst > TOLERANCE else 0.0
        return cls(fitted["keys"], fitted["values"], cross, (missed[0], missed[1], worst))

    @classmethod
    def scales(cls, readings: Sequence[Reading], tokens: Sequence[tuple[float, float]]) -> Growth:
        """Where layers have one setting of tokens, keys and values: a factor for each of them, so
        that prices still add up.

        Of tokens, given as priced sums and the KL measured while both sides are dense, also a power
        of at most 1. What a few layers drop costs more than its price,
        which takes positions as independent, where tokens that are gone are gone for all of them;
        and a search picks the layers whose price says least of that.
        """
        sides = {side: _one_sided(readings, side) for side in SIDES}
        keys, values = (_scale(pairs) for pairs in sides.values())
        kept = _curve([pair for pair in tokens if min(pair) > TINY], FLATTENS)
        alone = cls((keys, 1.0), (values, 1.0), tokens=kept)
        joint = [one for one in readings if one.keys > 0 and one.values > 0 and one.measured > 0]
        off = [one.measured / float(alone.kl(one.keys, one.values)) - 1 for one in joint]
        missed = [_spread(pairs) for pairs in sides.values()]
        worst = max(map(abs, off), default=0.0)
        return replace(alone, missed=(missed[0], missed[1], worst))

    @overload
    def kl(self, keys: float, values: float, tokens: float = 0.0) -> float: ...
    @overload
    def kl(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray: ...
    def kl(self, keys: Any, values: Any, tokens: float = 0.0) -> Any:
        """The KL in nats of priced sums."""
        f_k, f_v = (a * x**p for (a, p), x in ((self.keys, keys), (self.values, values)))
        found = f_k + f_v + self.cross * (f_k * f_v) ** 0.5
        return found + self.tokens[0] * tokens ** self.tokens[1] if tokens else found

    def slopes(self, most: float) -> tuple[float, ...]:
        """How fast the KL rises with what tokens are priced at, from a sum that is the most there
        is down to a small part of it; one where it rises evenly."""
        scale, power = self.tokens
        if power == 1 or most <= 0:
            return (scale,)
        return tuple(scale * power * (most / 4**i) ** (power - 1) for i in range(SLOPES))

    @property
    def is_additive(self) -> bool:
        """Whether sums with a scale of each side were enough."""
        return self.keys[1] == self.values[1] == self.tokens[1] == 1 and self.cross == 0

    def table(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of_table(cls, held: Mapping[str, Any]) -> Growth:
        """Reads `table`; KeyError, TypeError or ValueError for anything else."""
        pairs = {side: (float(held[side][0]), float(held[side][1])) for side in SIDES}
        keys, values, both = map(float, held["missed"])
        scale, power = map(float, held.get("tokens", (1.0, 1.0)))
        missed, tokens = (keys, values, both), (scale, power)
        return cls(pairs["keys"], pairs["values"], float(held["cross"]), missed, tokens)

    def _cross(self, joint: Sequence[Reading]) -> float:
        terms = []
        for one in joint:
            f_k, f_v = (float(self.kl(*pair)) for pair in ((one.keys, 0.0), (0.0, one.values)))
            terms.append((one.measured - f_k - f_v) / math.sqrt(f_k * f_v))
        return min(max(sum(terms) / len(terms), CROSS[0]), CROSS[1])


def _one_sided(readings: Sequence[Reading], side: Side) -> list[tuple[float, float]]:
    """Priced sum and measured KL of the probes that change this side alone."""
    pairs = [(one.keys, one.values, one.measured) for one in readings]
    if side == "values":
        pairs = [(v, k, measured) for k, v, measured in pairs]
    return [(own, m) for own, other, m in pairs if own > 0 and not other and m > TINY]


def _spread(pairs: Sequence[tuple[float, float]]) -> float:
    """By how much one scale misses the measured values, at most."""
    if not pairs:
        return 0.0
    scale = _scale(pairs)
    return max(abs(measured / (scale * priced) - 1) for priced, measured in pairs)


def _scale(pairs: Sequence[tuple[float, float]]) -> float:
    if not pairs:
        return 1.0
    factors = [measured / priced for priced, measured in pairs]
    return math.prod(factors) ** (1 / len(factors))


def _curve(
    pairs: Sequence[tuple[float, float]], powers: tuple[float, float] = POWERS
) -> tuple[float, float]:
    if not pairs:  # a context shorter than a block encodes nothing
        return 1.0, 1.0
    if len(pairs) < 2 or _spread(pairs) <= TOLERANCE:
        return _scale(pairs), 1.0
    x, y = (np.log(np.array(column)) for column in zip(*pairs, strict=True))
    power = min(max(float(np.polyfit(x, y, 1)[0]), powers[0]), powers[1])
    return float(np.exp(np.mean(y - power * x))), power
