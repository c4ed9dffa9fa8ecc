"""Laws of the surrogate and of the search around it."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from kvtune.bank import Sizes, build
from kvtune.cache import weigh
from kvtune.calibrate import price_cells
from kvtune.errors import UsageError
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prices import pulls, table
from kvtune.profile import Profile
from kvtune.recipe import Policy, loads
from kvtune.search import START, Goal, Search, spread, uniforms
from kvtune.space import opened, to_recipe
from kvtune.study import front
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
def search(llama: Any, draw: Any) -> Search:
    """A search on a tiny Llama, not yet laid out."""
    bench = Bench(llama, build(llama, draw(2, 161), 128))
    choices = opened(loads(TEMPLATE), facts(llama.config))
    cells = price_cells(choices)
    places = [(cell.layer, policy) for cell, policy in cells]
    priced = table(bench, places, pulls(llama, bench.bank, 0), lambda done, total: None)
    profile = Profile(tuple(cell for cell, _ in cells), {"prices": priced[:, 0].float()})
    return Search(bench, profile, choices, GOAL)


@pytest.fixture
def ready(search: Search, tmp_path: Path) -> Search:
    """The same, laid out."""
    search.prepare(tmp_path)
    return search


def test_the_knapsack_is_exact(ready: Search) -> None:
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


def test_surrogate_bytes_are_the_runtimes(ready: Search) -> None:
    for name, chosen in ready.bases.items():
        predicted = ready.surrogate.predict(chosen)[0]
        weighed = weigh(ready._policies(chosen), ready.known, GOAL.context).bytes
        assert predicted == pytest.approx(weighed, rel=0.03), name


def test_clusters_cover_each_place_once(ready: Search) -> None:
    places = [place for cluster in ready.clusters.values() for place in cluster]
    assert sorted(places) == sorted(ready.surrogate.ladders)
    assert len(ready.clusters) <= 2 * GOAL.clusters


def test_starts_are_distinct_and_hold_uniform_and_surrogate_points(ready: Search) -> None:
    bases = list(ready.bases.values())
    assert all(a != b for a, b in itertools.combinations(bases, 2))
    origins = {name.split()[0] for name in ready.bases}
    assert origins >= {"uniform", "knapsack"}
    assert len(uniforms(ready.choices)) == 16


def test_a_move_changes_its_cluster_only(ready: Search) -> None:
    start = next(name for name in ready.bases if name.startswith("knapsack 02"))
    still = {START: start, **dict.fromkeys(ready.clusters, "same")}
    moved_name, places = next(iter(ready.clusters.items()))
    before = ready.assignment(still)
    after = ready.assignment({**still, moved_name: "dearer"})
    assert {place for place in before if before[place] != after[place]} <= set(places)
    assert ready.surrogate.predict(after)[1] <= ready.surrogate.predict(before)[1]


def test_a_search_finds_a_front_and_resumes_to_the_same_rows(ready: Search, tmp_path: Path) -> None:
    starts = len(ready.starts)
    whole = ready.run(str(tmp_path / "a.db"), starts + 6, seed=3)
    ready.run(str(tmp_path / "b.db"), starts + 2, seed=3)
    resumed = ready.run(str(tmp_path / "b.db"), starts + 6, seed=3, resume=True)
    assert [(r.choice, r.values) for r in whole] == [(r.choice, r.values) for r in resumed]
    found = front(whole)
    assert len(found) >= 4
    assert all(row.attrs["bits"] > 0 for row in found)


def test_layout_is_kept_for_a_resume(search: Search, tmp_path: Path) -> None:
    search.prepare(tmp_path)
    first, kept = list(search.bases), (tmp_path / "surrogate.json").read_bytes()
    search.prepare(tmp_path)
    assert list(search.bases) == first
    assert (tmp_path / "surrogate.json").read_bytes() == kept


def test_a_measured_recipe_is_the_recipe_that_is_written(ready: Search) -> None:
    policies = ready._policies(ready.bases["knapsack 03"])
    recipe = loads(to_recipe(dict(enumerate(policies)), len(policies)).dumps())
    assert recipe.policies(ready.known) == policies


@pytest.mark.parametrize("wrong", ["memory", "memory,latency", "memory,acuracy", "memory,memory"])
def test_other_objectives_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError):
        Goal.parse(wrong, 1024, 1)


def test_an_even_choice_keeps_both_ends() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]


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
