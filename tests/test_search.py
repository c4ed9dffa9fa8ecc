"""Laws of the surrogate and of the search around it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtune.bank import Sizes, build
from kvtune.cache import weigh
from kvtune.calibrate import price_cells
from kvtune.errors import IntegrityError, UsageError
from kvtune.front import Candidate, best_uniform, evenly, worth_proving
from kvtune.layout import START, Goal, Layout, spread, uniforms
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prices import pulls, table
from kvtune.profile import Profile
from kvtune.recipe import Policy, loads
from kvtune.search import SCALES, Limits, Search
from kvtune.space import opened, to_recipe
from kvtune.study import Row, front
from kvtune.surrogate import Rung, Surrogate, undominated

TEMPLATE = """
kvtune = 1
[[layers]]
span = "all"
recent = 16
kept.keys = [{ use = "affine", bits = "search", group = 32, axis = "channel" }]
kept.values = [{ use = "affine", bits = "search", group = "head", axis = "token" }]
"""
GOAL = Goal(context=1024, budgets=6, rivals=4, clusters=2)


@pytest.fixture
def made(llama: Any, draw: Any) -> Callable[[Path], Search]:
    """A search on a tiny Llama."""
    bench = Bench(llama, build(llama, draw(2, 161), 128))
    choices = opened(loads(TEMPLATE), facts(llama.config))
    cells = price_cells(choices)
    places = [(cell.layer, policy) for cell, policy in cells]
    priced = table(bench, places, pulls(llama, bench.bank, 0), lambda done, total: None)
    profile = Profile(tuple(cell for cell, _ in cells), {"prices": priced[:, 0].float()})
    return lambda folder: Search(bench, profile, choices, GOAL, folder)


@pytest.fixture
def search(made: Callable[[Path], Search], tmp_path: Path) -> Search:
    """The same in a folder of its own."""
    return made(tmp_path)


@pytest.fixture
def ready(search: Search) -> Layout:
    """Its layout."""
    return search.layout


def test_the_knapsack_is_exact(ready: Layout) -> None:
    surrogate = ready.surrogate
    places = list(surrogate.ladders)[:3]
    small = Surrogate(
        {place: surrogate.rungs[place] for place in places},
        {place: surrogate.ladders[place] for place in places},
    )
    for budget in small.budgets(7):
        chosen = small.cheapest(budget)
        size, price = small.predict(chosen)
        every = itertools.product(*(small.rungs[place] for place in places))
        best = min(
            sum(rung.price for rung in rungs)
            for rungs in every
            if sum(rung.bytes for rung in rungs) <= budget
        )
        assert size <= budget
        assert price == pytest.approx(best, rel=1e-6)


def test_a_ladder_keeps_what_nothing_beats() -> None:
    chain = opened(loads(TEMPLATE), _facts()).popitem()[1].keys[0]
    rungs = [Rung(chain, size, price) for size, price in ((1, 9.0), (2, 9.5), (3, 4.0), (3, 5.0))]
    assert [(r.bytes, r.price) for r in undominated(rungs)] == [(1, 9.0), (3, 4.0)]


def test_surrogate_bytes_are_the_runtimes(ready: Layout) -> None:
    for name, chosen in ready.bases.items():
        predicted = ready.surrogate.predict(chosen)[0]
        weighed = weigh(ready.policies(chosen), ready.known, GOAL.context).bytes
        assert predicted == pytest.approx(weighed, rel=0.03), name


def test_clusters_cover_each_place_once(ready: Layout) -> None:
    places = [place for cluster in ready.clusters.values() for place in cluster]
    assert sorted(places) == sorted(ready.surrogate.ladders)
    assert len(ready.clusters) <= 2 * GOAL.clusters


def test_starts_are_distinct_and_hold_uniform_and_surrogate_points(ready: Layout) -> None:
    bases = list(ready.bases.values())
    assert all(a != b for a, b in itertools.combinations(bases, 2))
    origins = {name.split()[0] for name in ready.bases}
    assert origins >= {"uniform", "knapsack"}
    assert len(uniforms(ready.choices)) == 16


def test_a_move_changes_its_cluster_only(ready: Layout) -> None:
    start = next(name for name in ready.bases if name.startswith("knapsack 02"))
    still = {START: start, **dict.fromkeys(ready.clusters, "same")}
    moved_name, places = next(iter(ready.clusters.items()))
    before = ready.assignment(still)
    after = ready.assignment({**still, moved_name: "dearer"})
    assert {place for place in before if before[place] != after[place]} <= set(places)
    assert ready.surrogate.predict(after)[1] <= ready.surrogate.predict(before)[1]


def test_a_search_finds_a_front_and_resumes_to_the_same_rows(
    search: Search, tmp_path: Path
) -> None:
    starts = len(search.layout.starts)

    def rows(name: str, more: int) -> list[Row]:
        return search.run(Limits(str(tmp_path / name), starts + more), seed=3)

    whole = rows("a.db", 6)
    rows("b.db", 2)
    resumed = rows("b.db", 6)
    assert [(r.choice, r.values) for r in whole] == [(r.choice, r.values) for r in resumed]
    found = front(whole)
    assert len(found) >= 4
    assert all(row.attrs["bits"] > 0 for row in found)


def test_the_scales_are_kept_for_a_resume(made: Callable[[Path], Search], tmp_path: Path) -> None:
    first = made(tmp_path)
    kept = (tmp_path / SCALES).read_bytes()
    assert made(tmp_path).layout.bases == first.layout.bases
    assert (tmp_path / SCALES).read_bytes() == kept
    (tmp_path / SCALES).write_bytes(kept[:-9])
    with pytest.raises(IntegrityError, match="damaged"):
        made(tmp_path)


def test_a_measured_recipe_is_the_recipe_that_is_written(ready: Layout) -> None:
    policies = ready.policies(ready.bases["knapsack 03"])
    recipe = loads(to_recipe(dict(enumerate(policies)), len(policies)).dumps())
    assert recipe.policies(ready.known) == policies


@pytest.mark.parametrize("wrong", ["memory", "memory,latency", "memory,acuracy", "memory,memory"])
def test_other_objectives_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError):
        Goal.parse(wrong, 1024, 1)


def test_an_even_choice_keeps_both_ends() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]
    assert evenly([1, 2, 3, 9, 27], [1, 2, 3, 9, 27], 4) == [1, 3, 9, 27]


def test_a_template_that_opens_nothing_is_refused(llama: Any) -> None:
    with pytest.raises(UsageError, match="opens nothing"):
        opened(loads("kvtune = 1\n"), facts(llama.config))


def test_settings_that_do_not_fit_the_heads_are_left_out() -> None:
    own = opened(loads(TEMPLATE.replace('"head"', '"search"')), _facts())[0]
    groups = {table["group"] for chain in own.values for table in chain.tables()}
    assert groups == {32, "head"}  # of 64 channels


def test_the_default_sizes_are_the_contracts() -> None:
    assert Sizes() == (8, 512, 128)
    assert Policy().is_dense


def _facts() -> Any:
    from kvtune.models import Facts, LayerFacts

    return Facts("Tiny", (LayerFacts("full_attention", 2, 4, 64),), 4096, 61)


def test_only_points_that_nothing_beats_are_proved() -> None:
    def candidate(size: int, kl: float, origin: str = "knapsack") -> Candidate:
        return Candidate(origin, (), size, kl)

    measured = [
        candidate(9, 1e-7),
        candidate(8, 2e-6),
        candidate(6, 1e-3),
        candidate(6, 2e-3),
        candidate(5, 5e-3, "uniform a"),
        candidate(4, 9e-3),
        candidate(5, 6e-3),
    ]
    kept = worth_proving(measured, 9)
    assert [(c.bytes, c.kl) for c in kept] == [(8, 2e-6), (6, 1e-3), (5, 5e-3), (4, 9e-3)]
    assert best_uniform(measured, 6) == 5e-3
    assert best_uniform(measured, 4) is None
