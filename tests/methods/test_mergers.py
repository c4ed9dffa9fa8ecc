"""The laws of every merger found in kvtune/methods, over the settings that its marks allow."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from method_cases import ALL, DTYPES, HEADS
from torch import Tensor
from torch.testing import assert_close

from kvtune import parts, routing
from kvtune import recipe as recipes
from kvtune.cache import load
from kvtune.retention import Merged, Merger
from kvtune.view import Spot, View

WON, LOST = 6, 30
MERGERS = [part for part in ALL if isinstance(part, Merger)]
every_merger = pytest.mark.parametrize("merger", MERGERS, ids=str)
# what a law asks of one setting, it asks of all
one_of_each = pytest.mark.parametrize(
    "merger", [parts.find(name)() for name in sorted({m.name() for m in MERGERS})], ids=str
)
hulled = pytest.mark.parametrize(
    "merger", [m for m in MERGERS if getattr(m, "rule", "") != "weighted"], ids=str
)
keying = pytest.mark.parametrize("merger", [m for m in MERGERS if m.wants], ids=str)


@pytest.fixture
def spot(rope_of: Any) -> Spot:
    """Where a merger works: a layer of heads of 64 channels."""
    return Spot(rope=rope_of(64))


def pair(spot: Spot, dtype: torch.dtype = torch.float32) -> tuple[View, View]:
    """Returns winners [2, 4, 6, 64] and losers [2, 4, 30, 64] of 36 tokens, apart in each head."""
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, HEADS, WON + LOST, 64, generator=draw).to(dtype)
    order = torch.rand(2, HEADS, WON + LOST, generator=draw).argsort(-1)
    won, lost = order[..., :WON].sort(-1).values, order[..., WON:].sort(-1).values
    return of(keys, values, won, spot), of(keys, values, lost, spot)


def of(keys: Tensor, values: Tensor, places: Tensor, spot: Spot) -> View:
    index = places[..., None].expand(-1, -1, -1, keys.shape[-1])
    own = keys.gather(2, index), values.gather(2, index)
    return View(*own, positions=places + 5, seen=60, spot=spot)


def lone(*vectors: tuple[float, float], values: Tensor | None = None) -> View:
    """Returns a view of one head of one row, whose keys (and values) are these vectors."""
    keys = torch.tensor(vectors)[None, None]
    return View(keys, keys if values is None else values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_merger
def test_a_merger_gives_as_many_finite_tokens_as_won(
    merger: Merger, dtype: torch.dtype, spot: Spot
) -> None:
    won, lost = pair(spot, dtype)
    first, again = (merger.merge(won, lost) for _ in range(2))
    sides = (first.keys, won.keys, again.keys), (first.values, won.values, again.values)
    for found, own, other in sides:
        assert (found.shape, found.dtype) == (own.shape, dtype)
        assert found.isfinite().all()
        assert torch.equal(found, other), "it is repeatable"


@every_merger
def test_where_nothing_lost_the_winners_are_as_they_were(merger: Merger, spot: Spot) -> None:
    won, lost = pair(spot, torch.bfloat16)
    memory = merger.merge(won, lost).memory
    won = won._replace(memory=memory)
    nothing = lost._replace(keys=lost.keys[:, :, :0], values=lost.values[:, :, :0])
    found = merger.merge(won, nothing)
    assert torch.equal(found.keys, won.keys)
    assert torch.equal(found.values, won.values)
    assert found.memory is memory, "nor is anything learnt"


@every_merger
def test_a_winner_to_which_nothing_goes_is_as_it_was(merger: Merger, spot: Spot) -> None:
    won, lost = pair(spot)
    lost = lost._replace(keys=won.keys[:, :, 2:3].expand_as(lost.keys))
    found = merger.merge(won, lost)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found.keys[:, :, others], won.keys[:, :, others])
    assert torch.equal(found.values[:, :, others], won.values[:, :, others])
    assert not torch.equal(found.values[:, :, 2], won.values[:, :, 2])


@every_merger
def test_one_winner_takes_what_is_merged_at_all(merger: Merger, spot: Spot) -> None:
    won, lost = pair(spot)
    first = (x[:, :, :1] for x in (won.keys, won.values, won.positions) if x is not None)
    keys, values, positions = first
    alike = lost._replace(keys=keys + lost.keys / 10)
    found = merger.merge(View(keys, values, positions=positions, spot=spot), alike)
    assert found.values.shape == values.shape
    assert (found.values != values).any(-1).all()


@every_merger
def test_a_merger_leaves_its_views_as_they_are(merger: Merger, spot: Spot) -> None:
    views = pair(spot)
    merger.merge(*views)
    for view, fresh in zip(views, pair(spot), strict=True):
        assert torch.equal(view.keys, fresh.keys)
        assert torch.equal(view.values, fresh.values)


@every_merger
def test_a_merger_keeps_rows_and_heads_apart(merger: Merger, spot: Spot) -> None:
    views = pair(spot)
    other = tuple(
        view._replace(keys=view.keys.clone(), values=view.values.clone()) for view in views
    )
    for view in other:
        for x in view[:2]:
            x[1], x[0, 3] = x[1].flip(-2) + 1, x[0, 3].flip(-2) - 1
    one, two = merger.merge(*views), merger.merge(*other)
    assert torch.equal(one.keys[0, :3], two.keys[0, :3])
    assert torch.equal(one.values[0, :3], two.values[0, :3])
    assert not torch.equal(one.values[0, 3], two.values[0, 3])


@every_merger
def test_zero_vectors_make_no_nan(merger: Merger, spot: Spot) -> None:
    views = pair(spot)
    for zero in (*[(view, side) for view in views for side in (0, 1)], None):
        changed = [
            view._replace(keys=view.keys.clone(), values=view.values.clone()) for view in views
        ]
        for mine, view in zip(changed, views, strict=True):
            for side in (0, 1):
                if zero is None or (view is zero[0] and side == zero[1]):
                    mine[side].zero_()
        found = merger.merge(*changed)
        assert found.keys.isfinite().all()
        assert found.values.isfinite().all()


@every_merger
def test_keys_are_left_unless_merging_them_is_asked_for(merger: Merger, spot: Spot) -> None:
    won, lost = pair(spot)
    asked = getattr(merger, "keys", "left") == "merged"
    # without a rope and positions to turn by, a merger that says it needs neither works too
    if not asked:
        won, lost = (view._replace(positions=None, spot=Spot()) for view in (won, lost))
    found = merger.merge(won, lost)
    assert torch.equal(found.keys, won.keys) != asked
    assert merger.wants == (frozenset({"rope", "positions"}) if asked else frozenset())
    assert merger.wants <= merger.needs


@every_merger
def test_a_token_like_a_winner_merges_with_it(merger: Merger, spot: Spot) -> None:
    """Equal keys have a cosine of one, which passes every threshold; equal values stay."""
    won, _ = pair(spot)
    twin = View(won.keys * 2, won.values, positions=won.positions, spot=spot)
    found = merger.merge(won, twin)
    if getattr(merger, "rule", "") == "weighted":
        assert_close(routing.routed(won.keys, twin.keys).cosine, torch.ones(2, HEADS, WON))
    assert_close(found.values, won.values)
    bent = merger.merge(won, twin._replace(values=-won.values))
    assert (bent.values.norm(dim=-1) < 0.9 * won.values.norm(dim=-1)).all()


@hulled
def test_values_stay_within_the_hull_of_what_they_are_made_of(merger: Merger, spot: Spot) -> None:
    won, lost = pair(spot)
    found = merger.merge(won, lost).values
    every = torch.cat([won.values, lost.values], 2)
    low, high = every.amin(2, keepdim=True), every.amax(2, keepdim=True)
    assert ((low - 1e-5 <= found) & (found <= high + 1e-5)).all()
    # weights sum to one: what all have in common they keep
    common = won._replace(values=won.values + 7), lost._replace(values=lost.values + 7)
    if merger.name() != "values_only":  # whose weights depend on the lengths of values
        assert_close(merger.merge(*common).values, found + 7, rtol=1e-4, atol=1e-4)


@one_of_each
def test_blocks_of_pairs_say_the_same(
    merger: Merger, spot: Spot, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = pair(spot)
    whole = merger.merge(*views)
    for pairs in (1, WON * 7, WON * 3 * HEADS):
        monkeypatch.setattr(routing, "PAIRS", pairs)
        assert_close(merger.merge(*views).values, whole.values)


def test_no_block_holds_more_pairs_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    for pairs in (WON, 50, 1000):
        monkeypatch.setattr(routing, "PAIRS", pairs)
        blocks = list(routing._blocks(8, WON, LOST))
        covered = torch.zeros(8, LOST, dtype=torch.int64)
        for rows, some in blocks:
            covered[rows, some] += 1
            assert covered[rows, some].numel() * WON <= pairs
        assert (covered == 1).all()


@keying
def test_merged_keys_of_one_content_are_that_content_where_the_winner_stands(
    merger: Merger, spot: Spot
) -> None:
    """Turned keys of distant tokens cancel out; these are the same before they are turned."""
    won, lost = pair(spot)
    assert spot.rope is not None
    content = torch.randn(64, generator=torch.Generator().manual_seed(1))

    def at(view: View) -> View:
        keys = content.expand_as(view.keys).reshape(1, 1, -1, 64)
        turned = spot.rope.turn(keys, view.positions.flatten())
        return view._replace(keys=turned.view_as(view.keys))

    won, lost = at(won), at(lost)
    found = merger.merge(won, lost).keys
    if getattr(merger, "rule", "") != "weighted":
        assert_close(found, won.keys, rtol=1e-4, atol=1e-4)
    back = routing.unturned(won._replace(keys=found))
    assert (torch.cosine_similarity(back, content, dim=-1) > 0.9999).all()


@keying
def test_positions_of_all_heads_are_those_of_each(merger: Merger, spot: Spot) -> None:
    won, lost = pair(spot)
    there = torch.arange(WON) * 3, torch.arange(LOST) + 20
    views = won._replace(positions=there[0]), lost._replace(positions=there[1])
    each = tuple(v._replace(positions=v.positions.expand(2, HEADS, -1)) for v in views)
    assert_close(merger.merge(*views).keys, merger.merge(*each).keys)


@pytest.mark.parametrize(
    ("rule", "expected"), [("averaged", (2.0, 4.0)), ("pivotal", (3.0, 2.0)), ("weighted", None)]
)
def test_the_three_rules_of_look_m(rule: str, expected: tuple[float, float] | None) -> None:
    """Two tokens go to (4, 0): (1, 6) with a cosine of 0.6, and (1, 6) with one of 0.8."""
    found = merge_two(parts.find("look_m")(rule=rule))  # type: ignore[call-arg]
    if expected is None:  # ((4, 0) + 1.4 (1, 6)) / 3
        expected = (5.4 / 3, 8.4 / 3)
    assert_close(found.values[0, 0], torch.tensor([expected, (7.0, 7.0)]))


def merge_two(merger: Merger) -> Merged:
    """Merges values (1, 6) at cosines 0.6 and 0.8 with (4, 0); another winner is elsewhere."""
    values = torch.tensor([[[[4.0, 0.0], [7.0, 7.0]]]])
    lost = torch.tensor([[[[1.0, 6.0], [1.0, 6.0]]]])
    return merger.merge(lone((2, 0), (0, -1), values=values), lone((0.6, 0.8), (8, 6), values=lost))


def test_values_only_weighs_by_likeness_and_length() -> None:
    share = math.sqrt(37) / (math.sqrt(37) + 4)
    for threshold, total in ((0.0, 1.4 * share), (0.5, 1.4 * share), (0.7, 0.8 * share)):
        merger = parts.parse({"use": "values_only", "threshold": threshold})
        assert isinstance(merger, Merger)
        found = merge_two(merger).values
        expected = torch.tensor([4 + total, 6 * total]) / (1 + total)
        assert_close(found[0, 0, 0], expected)


def test_what_points_away_is_not_merged_by_values_only() -> None:
    found = parts.find("values_only")().merge(lone((1, 0)), lone((-1, 0), (-1, 1)))
    assert torch.equal(found.values, lone((1, 0)).values)


def test_d2o_merges_what_is_as_like_as_the_mean_and_shares_by_softmax() -> None:
    found = merge_two(parts.find("d2o")())
    assert_close(found.memory, torch.tensor([[0.7]]))
    own, other = math.e, math.exp(0.8)  # 0.6 is below the mean, and dropped
    expected = torch.tensor([4 * own + other, 6 * other]) / (own + other)
    assert_close(found.values[0, 0, 0], expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_threshold_of_d2o_stays_within_the_likeness_that_was_seen(
    alpha: float, spot: Spot
) -> None:
    merger = parts.find("d2o")(alpha=alpha, beta=round(1 - alpha, 1))  # type: ignore[call-arg]
    won, lost = pair(spot)
    low, high, memory = math.inf, -math.inf, None
    for step in range(6):
        keys = lost.keys.roll(step, 1) + step * won.keys[:, :, :1]
        likeness = routing.routed(won.keys, keys).cosine
        low, high = min(low, likeness.min().item()), max(high, likeness.max().item())
        memory = merger.merge(won._replace(memory=memory), lost._replace(keys=keys)).memory
        assert memory.shape == (2, HEADS)
        assert ((low <= memory) & (memory <= high)).all()
    likeness = merger.merge(won, lost).memory
    again = merger.merge(won._replace(memory=memory), lost).memory
    assert_close(again, alpha * memory + (1 - alpha) * likeness)


@keying
def test_merging_keys_is_said_to_be_experimental(merger: Merger, capsys: Any) -> None:
    from kvtune.cli import main

    assert main(["methods", merger.name()]) == 0
    assert "EXPERIMENTAL" in capsys.readouterr().out


@pytest.mark.parametrize("amount", ["share = 0.2", "budget = 64"])
@pytest.mark.parametrize("merger", [m for m in MERGERS if m.wants or m == type(m)()], ids=str)
def test_a_layer_gives_a_merger_what_it_wants(merger: Merger, amount: str, llama: Any) -> None:
    table = ", ".join(f"{k} = {json.dumps(v)}" for k, v in merger.table().items())
    select = f'select = {{ use = "attention", {amount} }}'
    entry = f'[[layers]]\nspan = "all"\nrecent = 8\n{select}\nmerge = {{ {table} }}'
    cache = load(recipes.loads(f"kvtune = 1\n{entry}"), llama)
    tokens = torch.arange(260)[None] % 61
    for some in tokens.split([100, 1, 1, 158], 1):
        logits = llama(some, past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.get_seq_length() == 260
    assert cache.layers[0].groups[0].rows.moved > 100


@one_of_each
def test_double_stays_double(merger: Merger, spot: Spot) -> None:
    won, lost = pair(spot, torch.float64)
    assert merger.merge(won, lost).values.dtype == torch.float64
