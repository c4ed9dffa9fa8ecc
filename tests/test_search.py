"""Laws of the search: its layout, its stages from cheap to dear, and its front."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvtune.bank import Sizes, build
from kvtune.cache import weigh
from kvtune.calibrate import price_cells
from kvtune.errors import UsageError
from kvtune.front import Candidate, best_uniform, evenly, worth_proving
from kvtune.goal import Bounds, Goal
from kvtune.layout import START, Layout, bisected, spread, uniforms
from kvtune.measure import Bench
from kvtune.models import Facts, LayerFacts, facts
from kvtune.prices import pulls, table
from kvtune.profile import Profile
from kvtune.recipe import Policy, loads
from kvtune.search import Limits, Search
from kvtune.space import opened, to_recipe
from kvtune.study import Row, front
from kvtune.surrogate import Rung, undominated
from kvtune.table import Infeasible, Stopped

TEMPLATE = """
kvtune = 1
[[layers]]
span = "all"
recent = 16
kept.keys = [{ use = "affine", bits = "search", group = 32, axis = "channel" }]
kept.values = [{ use = "affine", bits = "search", group = "head", axis = "token" }]
"""
WINDOWS = TEMPLATE.replace("recent = 16", "recent = [16, 48]")
HEADS = TEMPLATE.replace("recent = 16", 'recent = 16\nheads = "search"')
GOAL = Goal(context=1024, budgets=6, rivals=4, clusters=2)
Made = Callable[..., Search]


@pytest.fixture
def made(llama: Any, draw: Any, tmp_path: Path) -> Made:
    """Searches on a tiny Llama, each with a study of its own unless it is named."""
    bench = Bench(llama, build(llama, draw(4, 161), 128))
    profiles: dict[str, Profile] = {}

    def make(
        template: str = TEMPLATE, goal: Goal = GOAL, name: str = "study.db", trials: int = 0
    ) -> Search:
        windows = opened(loads(template), facts(llama.config))
        if template not in profiles:
            cells = price_cells(windows)
            places = [(cell.layer, policy) for cell, policy in cells]
            priced = table(bench, places, pulls(llama, bench.bank, 0), lambda done, total: None)
            prices = {"prices": priced[:, 0].float(), "prices_by_head": priced[:, 1:].float()}
            profiles[template] = Profile(tuple(cell for cell, _ in cells), prices)
        limits = Limits(str(tmp_path / name), trials)
        return Search(bench, profiles[template], windows, goal, limits)

    return make


@pytest.fixture
def search(made: Made) -> Search:
    """One of them."""
    return made()


@pytest.fixture
def ready(search: Search) -> Layout:
    """Its layout."""
    return search.layout


def test_a_ladder_keeps_what_nothing_beats() -> None:
    chain = opened(loads(TEMPLATE), _facts())[""][0].keys[0]
    rungs = [Rung(chain, size, price) for size, price in ((1, 9.0), (2, 9.5), (3, 4.0), (3, 5.0))]
    assert [(r.bytes, r.price) for r in undominated(rungs)] == [(1, 9.0), (3, 4.0)]


def test_surrogate_bytes_are_the_runtimes(ready: Layout) -> None:
    for name, base in ready.bases.items():
        weighed = weigh(ready.policies(base), ready.known, GOAL.context).bytes
        assert ready.predict(base).bytes == pytest.approx(weighed, rel=0.03), name


def test_clusters_cover_each_side_of_each_layer_once(ready: Layout) -> None:
    sides = [place for cluster in ready.clusters.values() for place in cluster]
    assert sorted(sides) == sorted(place[:2] for place in ready.views[""].whole.rungs)
    assert len(ready.clusters) <= 2 * GOAL.clusters


def test_starts_are_distinct_and_hold_uniform_and_surrogate_points(ready: Layout) -> None:
    assert all(a != b for a, b in itertools.combinations(ready.bases.values(), 2))
    origins = {name.split()[0] for name in ready.bases}
    assert origins >= {"uniform", "knapsack"}
    assert len(uniforms(ready.views[""].choices)) == 16
    assert ready.essential <= len(ready.starts)


def test_starts_hold_the_best_within_each_number_of_bits(made: Made) -> None:
    layout = made(goal=replace(GOAL, within=(4.0, 6.0))).layout
    named = {name: base for name, base in layout.bases.items() if name.startswith("within")}
    assert set(named) == {"within 4 bits", "within 6 bits"}
    dense = weigh((Policy(),) * len(layout.known.layers), layout.known, GOAL.context).bytes
    assert layout.budgets == (dense // 4, dense * 6 // 16)
    for base, budget in zip(named.values(), layout.budgets, strict=True):
        found = weigh(layout.policies(base), layout.known, GOAL.context).bytes
        assert 0.8 * budget < found <= 1.03 * budget


@pytest.mark.parametrize("count", [1, 2, 3, 9, 64])
def test_a_bisected_order_holds_each_index_once_and_begins_with_the_ends(count: int) -> None:
    order = bisected(count)
    assert sorted(order) == list(range(count))
    assert order[:2] == list(dict.fromkeys([0, count - 1]))


def test_a_move_changes_its_cluster_only(ready: Layout) -> None:
    start = next(name for name in ready.bases if name.startswith("knapsack 02"))
    still = {START: start, **dict.fromkeys(ready.clusters, "same")}
    assert ready.is_start(still)
    moved_name, places = next(iter(ready.clusters.items()))
    before, after = ready.base(still), ready.base({**still, moved_name: "dearer"})
    changed = {place[:2] for place in before.chosen if before.chosen[place] != after.chosen[place]}
    assert changed <= set(places)
    assert ready.predict(after).kl <= ready.predict(before).kl


def test_a_search_finds_a_front_and_resumes_to_the_same_rows(made: Made) -> None:
    starts = len(made().layout.starts)

    def rows(name: str, more: int) -> list[Row]:
        return made(name=name, trials=starts + more).run(seed=3)

    whole = rows("a.db", 12)
    rows("b.db", 4)
    resumed = rows("b.db", 12)
    assert [(r.choice, r.values, r.state) for r in whole] == [
        (r.choice, r.values, r.state) for r in resumed
    ]
    assert len(front(whole)) >= 4
    measured = [row for row in whole if row.state == "complete"]
    assert all({"bits", "kl", "few_kl", "predicted"} <= row.attrs.keys() for row in measured)


def test_all_essential_starts_are_measured_whatever_the_trials(made: Made) -> None:
    search = made(trials=1)
    rows = search.run(seed=0)
    assert [row.origin for row in rows] == list(search.layout.bases)[: search.layout.essential]


def test_how_prices_grow_is_measured_once_and_kept_in_the_study(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made()
    monkeypatch.setattr(Search, "_grown", lambda self, views: pytest.fail("measured again"))
    assert made().growth == first.growth


def test_a_trial_that_breaks_a_limit_on_bytes_never_touches_the_model(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = made()
    small = sorted(free.layout.predict(base).bytes for base in free.layout.bases.values())
    bounds = Bounds(max_bytes=small[len(small) // 2])
    search = made(goal=replace(GOAL, bounds=bounds), name="bounded.db")
    assert len(search.layout.bases) < len(free.layout.bases)
    dearer = {name: "dearer" for name in search.layout.clusters}
    largest = max(search.layout.bases, key=lambda n: search.layout.predict(search.layout.bases[n]))
    monkeypatch.setattr(Bench, "measure", lambda *args, **more: pytest.fail("measured"))
    with pytest.raises(Infeasible) as broken:
        search.evaluate({START: largest, **dearer})
    assert broken.value.excess["bytes"] > 0


def test_a_kl_above_its_limit_is_measured_and_infeasible(made: Made) -> None:
    search = made(goal=replace(GOAL, bounds=Bounds(max_kl=1e-9)))
    with pytest.raises(Infeasible) as broken:
        search.evaluate(search.layout.starts[0].choice)
    assert broken.value.attrs["kl"] > 1e-9
    assert broken.value.excess["kl"] > 0


def test_limits_that_nothing_keeps_to_are_refused(made: Made) -> None:
    with pytest.raises(UsageError, match="max_bytes 10"):
        made(goal=replace(GOAL, bounds=Bounds(max_bytes=10)))


def test_the_worse_half_on_few_sequences_is_stopped_and_starts_never_are(made: Made) -> None:
    search = made()
    start = search.layout.starts[0].choice
    moved = {**start, next(iter(search.layout.clusters)): "dearer"}
    unbeaten = [_row(i, {"bytes": 1.0, "few_kl": 0.0}) for i in range(9)]
    with pytest.raises(Stopped) as stopped:
        search.evaluate(moved, unbeaten)
    assert "few_kl" in stopped.value.attrs and "kl" not in stopped.value.attrs
    assert search.evaluate(start, unbeaten).values


def test_sequences_measured_in_two_parts_are_those_measured_at_once(made: Made) -> None:
    search = made()
    start = search.layout.starts[0].choice
    moved = {**start, next(iter(search.layout.clusters)): "dearer"}
    policies = search.layout.policies(search.layout.base(moved))
    whole = search.bench.measure(policies).means()["kl"]
    assert search.evaluate(moved).attrs["kl"] == pytest.approx(whole, rel=1e-4)


def test_open_windows_are_searched_for_all_layers_at_once(made: Made) -> None:
    layout = made(WINDOWS).layout
    assert set(layout.views) == {"sinks 0, recent 16", "sinks 0, recent 48"}
    for base in layout.bases.values():
        recents = {policy.recent for policy in layout.policies(base)}
        assert recents == {int(base.window.split()[-1])}


def test_heads_may_differ_where_the_template_says_so(made: Made) -> None:
    layout = made(HEADS).layout
    by_head = layout.views[""].by_head
    assert by_head is not None
    heads = {place.head for place in by_head.rungs}
    assert heads == set(range(layout.known.layers[0].kv_heads))
    for name, base in layout.bases.items():
        policies = layout.policies(base)
        recipe = loads(to_recipe(dict(enumerate(policies)), len(policies)).dumps())
        assert recipe.policies(layout.known) == policies, name


def test_prices_of_heads_add_up_to_the_cells(made: Made) -> None:
    profile = made(HEADS).profile
    prices = profile.prices()
    for cell, split in profile.prices_by_head().items():
        assert sum(split) == pytest.approx(prices[cell])


def test_a_measured_recipe_is_the_recipe_that_is_written(ready: Layout) -> None:
    policies = ready.policies(ready.bases["knapsack 03"])
    recipe = loads(to_recipe(dict(enumerate(policies)), len(policies)).dumps())
    assert recipe.policies(ready.known) == policies


def test_an_even_choice_keeps_both_ends() -> None:
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2]
    assert evenly([1, 2, 3, 9, 27], [1, 2, 3, 9, 27], 4) == [1, 3, 9, 27]


def test_a_template_that_opens_nothing_is_refused(llama: Any) -> None:
    with pytest.raises(UsageError, match="opens nothing"):
        opened(loads("kvtune = 1\n"), facts(llama.config))


def test_settings_that_do_not_fit_the_heads_are_left_out() -> None:
    own = opened(loads(TEMPLATE.replace('"head"', '"search"')), _facts())[""][0]
    groups = {table["group"] for chain in own.values for table in chain.tables()}
    assert groups == {32, "head"}  # of 64 channels


def test_the_default_sizes_are_the_contracts() -> None:
    assert Sizes() == (8, 512, 128)
    assert Policy().is_dense


def _facts() -> Facts:
    return Facts("Tiny", (LayerFacts("full_attention", 2, 4, 64),), 4096, 61)


def _row(number: int, attrs: dict[str, Any]) -> Row:
    return Row(number, "", {}, None, "stopped", None, attrs)


def test_a_point_that_a_hair_more_bytes_would_better_is_not_proved() -> None:
    def kept(*points: tuple[int, float, float | None]) -> list[int]:
        measured = [Candidate("knapsack", (), size, kl, time) for size, kl, time in points]
        return [candidate.bytes for candidate in worth_proving(measured, 9)]

    assert kept((1000, 0.04, None), (1010, 0.02, None)) == [1010]
    assert kept((1000, 0.04, None), (1010, 0.039, None)) == [1010, 1000]
    assert kept((1000, 0.04, None), (1100, 0.02, None)) == [1100, 1000]
    assert kept((1000, 0.04, 10.0), (1010, 0.02, 11.0)) == [1010, 1000]
    assert kept((1000, 0.04, 10.0), (1010, 0.02, 10.1)) == [1010]


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
