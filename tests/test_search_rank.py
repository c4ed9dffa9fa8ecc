"""Laws of a search over rank and bits: bits alone have a front too, and both are proved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_fits import seen_by

from kvtune.bank import build
from kvtune.cache import weigh
from kvtune.calibrate import find_ropes, price_cells
from kvtune.fit import Fitter
from kvtune.front import held_out, worth_measuring
from kvtune.goal import Goal
from kvtune.layout import ALONE
from kvtune.measure import Bench
from kvtune.models import facts
from kvtune.prices import pulls, table
from kvtune.profile import Profile
from kvtune.recipe import load, loads
from kvtune.saving import saving
from kvtune.search import Limits, Search
from kvtune.space import opened

BITS = '[{ use = "affine", bits = "search", group = 32, axis = "channel" }]'
RANK = (
    '[{ use = "derope" }, { use = "svd", rank = 0.5, basis = "calibrated" }, '
    '{ use = "affine", bits = "search", group = 32, axis = "channel" }]'
)
MIXED, PLAIN, PROJECTED = f"{BITS}, {RANK}", BITS, RANK
GOAL = Goal(context=4096, budgets=6, rivals=4, clusters=2)


@pytest.fixture
def search(llama: Any, draw: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Search:
    """A search of a template whose keys are any of some lists."""
    text = (
        f'kvtune = 1\n[[layers]]\nspan = "all"\nrecent = 16\n'
        f"kept.keys = [{{ any = [{request.param}] }}]\n"
        'kept.values = [{ use = "affine", bits = "search", group = "head", axis = "token" }]\n'
    )
    windows = opened(loads(text), facts(llama.config))
    fit = Fitter(seen_by(llama)).layer
    bench = Bench(llama, build(llama, draw(2, 145), 128), find_ropes(llama), fit)
    cells = price_cells(windows)
    places = [(cell.layer, policy) for cell, policy in cells]
    priced = table(bench, places, pulls(llama, bench.bank, 0), lambda done, total: None)
    tensors = {"prices": priced[:, 0].float(), "prices_by_head": priced[:, 1:].float()}
    profile = Profile(tuple(cell for cell, _ in cells), tensors)
    return Search(bench, profile, windows, GOAL, Limits(str(tmp_path / "study.db"), 0))


@pytest.mark.parametrize("search", [MIXED], indirect=True)
def test_bits_alone_have_a_front_of_their_own(search: Search) -> None:
    alone = {k: v for k, v in search.layout.bases.items() if k.startswith(ALONE)}
    assert len(alone) >= 2
    for base in alone.values():
        assert not any(policy.projects for policy in search.layout.policies(base))
    rest = [v for k, v in search.layout.bases.items() if k.startswith("knapsack")]
    assert any(policy.projects for base in rest for policy in search.layout.policies(base))


@pytest.mark.parametrize("search", [MIXED], indirect=True)
def test_nothing_without_projections_is_predicted_to_beat_that_front(search: Search) -> None:
    layout = search.layout
    for name, base in layout.bases.items():
        if name.startswith(ALONE):
            said = layout.predict(base)
            for other in layout.rivals.values():
                if not any(policy.projects for policy in layout.policies(other)):
                    rival = layout.predict(other)
                    assert not (rival.bytes <= said.bytes and rival.kl < said.kl * (1 - 1e-9))


@pytest.mark.parametrize("search", [PLAIN, PROJECTED], indirect=True)
def test_there_is_nothing_to_compare_where_one_kind_is_open(search: Search) -> None:
    assert not search.layout.mixed
    assert not [name for name in search.layout.bases if name.startswith(ALONE)]
    row = search.run(0)[0]
    assert "projects" not in row.attrs


@pytest.mark.parametrize("search", [MIXED], indirect=True)
def test_rows_tell_what_projects_and_both_kinds_are_measured_on_held_out_text(
    search: Search,
) -> None:
    rows = search.run(0)
    for row in rows:
        policies = search.layout.policies(search.layout.base(row.choice))
        assert row.attrs["projects"] == any(policy.projects for policy in policies)
    found = worth_measuring(rows, search.layout, 6)
    tables = []
    for origin, base in found:
        one = held_out(search.bench, search.layout, origin, base)
        weight = weigh(one.policies, search.known, GOAL.context)
        tables.append(one.table(weight))
    assert {own["projects"] for own in tables if not own["uniform"]} == {True, False}
    assert len({origin for origin, _ in found}) == len(found)


def test_the_template_opens_both_kinds_on_both_sides(shipped: Any, model_of: Any) -> None:
    known = facts(model_of("llama", num_key_value_heads=3, num_attention_heads=6).config)
    template = load(shipped["search-lowrank.toml"])
    windows, reasons = saving(opened(template, known), known, 2048)
    for own in windows[""].values():
        for chains in (own.keys, own.values):
            assert {chain.projects for chain in chains} == {True, False}
    assert not reasons
    _, reasons = saving(opened(template, known), known, 512)
    assert reasons and all("tokens to save bytes" in why for why in reasons)
