"""Laws of a search over tokens, bits and rank: one front, which no axis alone beats anywhere."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_fits import seen_by

from kvtune.bank import build, wanted
from kvtune.budgets import Budgets
from kvtune.cache import fitted_bytes, layer_bytes, weigh
from kvtune.calibrate import find_ropes, missing_cells, price_cells
from kvtune.chains import Chain
from kvtune.errors import IntegrityError, UsageError
from kvtune.fit import Fitter
from kvtune.front import held_out, worth_measuring
from kvtune.goal import Goal
from kvtune.growth import Growth, Reading
from kvtune.halving import dominates
from kvtune.joint import common
from kvtune.measure import Bench
from kvtune.methods.affine import Affine
from kvtune.methods.attention import Attention
from kvtune.models import facts
from kvtune.prices import pulls, table
from kvtune.profile import Cell, Profile
from kvtune.recipe import load, loads
from kvtune.saving import saving
from kvtune.search import Limits, Search
from kvtune.space import Triple, axes, opened
from kvtune.study import front
from kvtune.surrogate import Place, Rung, Surrogate
from kvtune.views import OWN, saving_by

BITS = '[{ use = "affine", bits = "search", group = 32, axis = "channel" }]'
RANK = '[{ use = "derope" }, { use = "svd", rank = 0.5, basis = "calibrated" }]'
BOTH = f'{RANK[:-1]}, {{ use = "affine", bits = 4, group = 32, axis = "channel" }}]'
VALUES = '[{ use = "affine", bits = "search", group = "head", axis = "token" }]'
SHARES = "[1.0, 0.5, 0.25]"
GOAL = Goal(context=1024, budgets=6, rivals=4, clusters=2)


def template(select: str, keys: str = f"{BITS}, {RANK}, {BOTH}", more: str = "") -> str:
    """A template of one entry whose selector is written so."""
    return (
        f'kvtune = 1\n[[layers]]\nspan = "all"\nrecent = 16\n{more}select = {{ {select} }}\n'
        f"kept.keys = [{{ any = [{keys}] }}]\nkept.values = {VALUES}\n"
    )


OPEN = f'use = "attention", share = {SHARES}, alike = true'


@pytest.fixture(scope="module")
def search(model_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search over all three axes of a tiny model."""
    llama = model_of("llama")
    windows = opened(loads(template(OPEN)), facts(llama.config))
    cells = price_cells(windows)
    asked = wanted(policy for _, policy in cells)
    tokens = torch.randint(3, 61, (2, 281), generator=torch.Generator().manual_seed(5))
    bank = build(llama, tokens, 256, **asked)
    bench = Bench(llama, bank, find_ropes(llama), Fitter(seen_by(llama)).layer)
    places = [(cell.layer, policy) for cell, policy in cells]
    priced = table(bench, places, pulls(llama, bench.bank, 0), lambda done, total: None)
    tensors = {"prices": priced[:, 0].float(), "prices_by_head": priced[:, 1:].float()}
    profile = Profile(tuple(cell for cell, _ in cells), tensors)
    storage = str(tmp_path_factory.mktemp("study") / "study.db")
    return Search(bench, profile, windows, GOAL, Limits(storage, 0))


def test_a_layer_has_all_tokens_and_16_bits_among_its_choices(search: Search) -> None:
    for own in search.layout.views[""].choices.values():
        assert [select.share for select in own.selects] == [0.5, 0.25]
        assert not own.keys[0].codecs and not own.values[0].codecs


def test_a_setting_weighs_what_its_whole_layer_weighs(search: Search) -> None:
    view = search.layout.views[""]
    for place, rungs in view.whole.rungs.items():
        own, layer = view.choices[place.layer], search.known.layers[place.layer]
        shape = layer.kv_heads, layer.head_dim
        for rung in rungs[:: max(1, len(rungs) // 25)]:
            assert isinstance(rung.chain, Triple)
            policy = own.policy_of(rung.chain)
            true = sum(layer_bytes(policy, *shape, GOAL.context, layer.query_heads))
            assert rung.bytes == true + sum(fitted_bytes(policy, *shape))


def test_a_triple_costs_its_tokens_and_what_its_chains_cost_beyond_them(search: Search) -> None:
    for rungs in search.layout.views[""].whole.rungs.values():
        found = {rung.chain: rung for rung in rungs}
        for triple, rung in found.items():
            assert isinstance(triple, Triple)
            assert all(part >= 0 for part in rung.parts)
            bare = Triple(triple.select, triple.keys, Chain())
            if bare in found:
                assert found[bare].parts[:2] == rung.parts[:2]
            if triple.select is None:
                assert rung.parts[0] == 0


def test_every_axis_has_a_front_of_its_own_among_the_starts(search: Search) -> None:
    met = {name: axes(search.layout.policies(base)) for name, base in search.layout.bases.items()}
    for kind, used in OWN.items():  # a point that is also a uniform recipe stands under that name
        assert any(found and found <= used for found in met.values()), kind
        assert all(found <= used for name, found in met.items() if name.startswith(kind))
    joint = [v for k, v in search.layout.bases.items() if k.startswith("knapsack")]
    assert any(axes(search.layout.policies(base)) >= {"tokens", "bits"} for base in joint)


def test_the_smallest_recipe_of_rank_alone_projects_every_layer(search: Search) -> None:
    (alone,) = saving_by(search.layout.views, OWN["rank alone"]).values()
    solver = Budgets(alone.whole)
    smallest = solver.best(solver.range[0]).values()
    assert all(isinstance(own, Triple) and own.keys.projects for own in smallest)


def test_nothing_of_fewer_axes_is_predicted_to_beat_the_joint_front(search: Search) -> None:
    layout = search.layout
    whole = Budgets(layout.views[""].whole)
    for name, base in layout.bases.items():
        said = layout.predict(base)
        best = layout.views[""].whole.predict(whole.best(said.bytes))
        assert best.bytes <= said.bytes
        assert best.kl <= said.kl * (1 + 1e-9) + 1e-12, name


def test_the_measured_front_of_all_axes_is_nowhere_beaten_by_one_axis(search: Search) -> None:
    rows = search.run(0)
    best = [row.values for row in front(rows)]
    for used in OWN.values():
        others = [f"uses_{axis}" for axis in {"tokens", "bits", "rank"} - used]
        own = front([row for row in rows if all(row.attrs[other] == 0 for other in others)])
        assert own
        for row in own:
            assert row.values is not None
            values = row.values
            assert any(point and (point == values or dominates(point, values)) for point in best)
    found = worth_measuring(rows, search.layout, 3)
    kinds = set()
    for origin, base in found:
        one = held_out(search.bench, search.layout, origin, base)
        kinds.add(tuple(one.table(weigh(one.policies, search.known, GOAL.context))["axes"]))
    assert {("tokens",), ("bits",), ("rank",)} <= kinds
    assert any(len(kind) > 1 and "tokens" in kind for kind in kinds)


def test_moves_change_whole_layers_and_stay_on_their_ladders(search: Search) -> None:
    layout = search.layout
    start = next(name for name in layout.bases if name.startswith("knapsack"))
    for step in ("cheaper", "dearer"):
        choice = {"start": start, **dict.fromkeys(layout.clusters, step)}
        moved = layout.base(choice)
        sizes = layout.predict(layout.bases[start]).bytes, layout.predict(moved).bytes
        assert sizes[1] <= sizes[0] if step == "cheaper" else sizes[1] >= sizes[0]


def drawn(seed: int, growth: Growth) -> Surrogate:
    """Three layers with random triples."""
    source = random.Random(seed)

    def rungs() -> tuple[Rung, ...]:
        found = []
        for index in range(9):
            parts = [source.random() ** 3 * source.randint(0, 1) for _ in range(3)]
            setting = Triple(None, Chain(), Chain((Affine(bits=(2, 3, 4, 8)[index % 4]),)))
            named = setting._replace(select=Attention(share=(index + 1) / 10))
            size = 64 * source.randint(1, 20)
            found.append(Rung(named, size, sum(parts), parts=(parts[0], parts[1], parts[2])))
        return tuple(sorted(found, key=lambda rung: (rung.bytes, rung.price)))

    return Surrogate({Place(i, "layers"): rungs() for i in range(3)}).grown(growth)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("power", "slack"), [(1.0, 1e-9), (0.6, 0.1)], ids=["sums", "slopes"])
def test_nothing_within_a_budget_is_predicted_better(seed: int, power: float, slack: float) -> None:
    whole = drawn(seed, Growth((1.3, 1.0), (0.8, 1.0), tokens=(2.0, power)))
    solver, every = Budgets(whole), []
    for rungs in itertools.product(*whole.rungs.values()):
        chosen = dict(zip(whole.rungs, (rung.chain for rung in rungs), strict=True))
        every.append(whole.predict(chosen))
    for budget in solver.spread(6):
        said = whole.predict(solver.best(budget))
        assert said.bytes <= budget
        assert said.kl <= min(one.kl for one in every if one.bytes <= budget) * (1 + slack)
    with pytest.raises(ValueError, match="below the smallest"):
        solver.best(solver.range[0] - 1)


def test_each_axis_gets_the_factor_that_was_true() -> None:
    truth = Growth((1.3, 1.0), (0.9, 1.0), tokens=(1.4, 0.7))
    probes = [(p, 0.0) for p in (1e-3, 1e-2)] + [(0.0, p) for p in (1e-3, 1e-2)]
    tokens = [(p, truth.kl(0.0, 0.0, p)) for p in (1e-3, 1e-2, 1e-1)]
    found = Growth.scales([Reading(k, v, truth.kl(k, v)) for k, v in probes], tokens)
    for probe in (*((*pair, 0.0) for pair in probes), *((0.0, 0.0, p) for p, _ in tokens)):
        assert found.kl(*probe) == pytest.approx(truth.kl(*probe), rel=1e-6)
    assert Growth.of_table(found.table()) == found
    assert found.slopes(0.1) == tuple(sorted(found.slopes(0.1)))
    assert Growth.of_table({**Growth().table(), "tokens": (1.0, 1.0)}).slopes(1.0) == (1.0,)


def test_cells_of_selections_are_kept_in_a_profile_and_older_ones_are_read(
    search: Search, tmp_path: Path
) -> None:
    search.profile.save(tmp_path / "new")
    held = Profile.load(tmp_path / "new")
    assert held.cells == search.profile.cells
    assert not missing_cells(held, {"": search.layout.views[""].choices})
    assert Cell(0, "keys", "[]", 0, 16).row == [0, "keys", "[]", 0, 16]
    plain = opened(loads(template("X").replace("select = { X }\n", "")), search.known)
    assert not missing_cells(held, plain)  # all that they have under all tokens is there


@pytest.mark.parametrize(
    ("select", "more", "said"),
    [
        ('use = "attention", share = [1.0]', "", "opens nothing below 1"),
        ('use = "attention", share = [0.5, 0.5]', "", "each once"),
        ('use = "attention", share = [0.5, 1.5]', "", "1.5 is not above 0 and up to 1"),
        ('use = "attention", share = "search", budget = 512', "", "not both"),
        (OPEN, 'heads = "search"\n', "leave rest, merge, allot and heads out"),
        (OPEN, 'rest.keys = [{ use = "affine" }]\n', "leave rest, merge, allot and heads out"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_words(select: str, more: str, said: str) -> None:
    with pytest.raises(IntegrityError, match=said):
        loads(template(select, more=more))


def test_chains_of_heads_together_want_the_same_tokens(search: Search) -> None:
    apart = OPEN.replace("alike = true", "alike = false")
    with pytest.raises(UsageError, match="Add alike = true to select"):
        opened(loads(template(apart)), search.known)
    assert opened(loads(template(apart, keys=BITS)), search.known)


def test_the_shipped_template_opens_all_three_axes(shipped: Any, model_of: Any) -> None:
    known = facts(model_of("llama", num_key_value_heads=3, num_attention_heads=6).config)
    windows, reasons = saving(opened(load(shipped["search-tokens.toml"]), known), known, 2048)
    assert not reasons
    for own in windows[""].values():
        assert own.selects and all(select.alike for select in own.selects)
        for chains in (own.keys, own.values):
            used = {Triple(None, chain, Chain()).axes for chain in chains}
            assert used == {frozenset(), *map(frozenset, (("bits",), ("rank",), ("bits", "rank")))}


def test_uniform_rivals_are_settings_that_every_layer_has(search: Search) -> None:
    alike = common(search.layout.views[""].whole)
    assert {t.select and t.select.share for t in alike} == {None, 0.5, 0.25}
    for base in search.layout.rivals.values():
        assert len(set(base.chosen.values())) == 1


def test_a_selection_that_drops_nothing_where_it_is_measured_is_no_choice(search: Search) -> None:
    view = search.layout.views[""]
    for place, rungs in view.whole.rungs.items():
        for rung in rungs:
            assert isinstance(rung.chain, Triple)
            policy = view.choices[place.layer].policy_of(rung.chain)
            assert policy.select is None or policy.due(256) > 0
    some = opened(loads(template(OPEN.replace("0.25]", "0.15]"))), search.known)
    windows, (reason,) = saving(some, search.known, 80)
    assert reason == "a share of 0.15 drops no token before 81 are there; the context has 80"
    assert [own.share for own in windows[""][0].selects] == [0.5]
    with pytest.raises(UsageError, match="No share of tokens is worth a search"):
        saving(some, search.known, 64)
