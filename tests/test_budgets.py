"""Laws of budgets: exact over both sides, also where sums grow into more than sums."""

import itertools
import random

import pytest

from kvtune.budgets import Budgets, by_time
from kvtune.chains import Chain
from kvtune.growth import Growth
from kvtune.methods.affine import Affine
from kvtune.space import SIDES
from kvtune.surrogate import Place, Rung, Surrogate, by_bytes

CHAINS = [Chain((Affine(bits=bits),)) for bits in (2, 3, 4, 8)]


def drawn(seed: int, growth: Growth) -> Surrogate:
    """Three layers with random rungs."""
    source = random.Random(seed)

    def rungs() -> tuple[Rung, ...]:
        found = [
            Rung(chain, 64 * source.randint(1, 20), source.random() ** 3, source.random())
            for chain in CHAINS
        ]
        return tuple(sorted(found, key=lambda rung: (rung.bytes, rung.price)))

    return Surrogate({Place(i, side): rungs() for i in range(3) for side in SIDES}, growth)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "growth",
    [Growth(), Growth((2.0, 1.3), (1.0, 0.9), 0.8)],
    ids=["sums", "sums that grow"],
)
@pytest.mark.parametrize("size", [by_bytes, by_time])
def test_nothing_within_a_budget_is_predicted_better(seed, growth, size) -> None:
    surrogate = drawn(seed, growth)
    solver = Budgets(surrogate, size)
    places = list(surrogate.rungs)
    every = []
    for rungs in itertools.product(*surrogate.rungs.values()):
        chosen = {place: rung.chain for place, rung in zip(places, rungs, strict=True)}
        sums = {
            s: sum(r.price for p, r in zip(places, rungs, strict=True) if p.side == s)
            for s in SIDES
        }
        every.append((sum(map(size, rungs)), growth.kl(sums["keys"], sums["values"]), chosen))
    for budget in solver.spread(5):
        chosen = solver.best(budget)
        assert sum(size(surrogate.rung(place, chain)) for place, chain in chosen.items()) <= budget
        best = min(kl for total, kl, _ in every if total <= budget)
        assert surrogate.predict(chosen).kl == pytest.approx(best)


def test_budgets_run_from_the_least_size_to_the_dearest_within_limits() -> None:
    solver = Budgets(drawn(0, Growth()))
    low, high = solver.range
    assert solver.spread(4)[0] == low
    assert solver.spread(4)[-1] == high
    assert solver.spread(4, high=(low + high) / 2)[-1] <= (low + high) / 2 + 1
    assert solver.spread(4, high=low - 1) == []


def test_a_budget_below_the_least_size_is_refused() -> None:
    solver = Budgets(drawn(0, Growth()))
    with pytest.raises(ValueError, match="below the smallest"):
        solver.best(solver.range[0] - 1)
