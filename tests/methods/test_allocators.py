"""The laws of every allocator found in kvtune/methods, and what their papers say of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from method_cases import ALL
from torch import Tensor

from kvtune import parts
from kvtune.gains import gained
from kvtune.knapsack import Knapsack
from kvtune.retention import Allocator, Stats
from kvtune.shares import dealt, exact

ALLOCATORS = [part for part in ALL if isinstance(part, Allocator)]
every_allocator = pytest.mark.parametrize("allocator", ALLOCATORS, ids=str)
LAYERS, HEADS = 6, 3
STEPS = torch.linspace(0, 1, 257, dtype=torch.float64)


def made(**settings: Any) -> Any:
    return parts.parse(settings)


def measured(seed: int = 0, layers: int = LAYERS) -> dict[str, Tensor]:
    """Returns one tensor of each name that allocators read, every layer with values of its own."""
    draw = torch.Generator().manual_seed(seed)
    steep = torch.rand(layers, 1, generator=draw, dtype=torch.float64) * 30 + 0.5
    heads = torch.rand(layers, HEADS, 1, generator=draw, dtype=torch.float64) * 20 + 0.5
    shares = torch.tensor([0.0, 0.1, 0.3, 0.6], dtype=torch.float64)
    prices = (-steep * shares).exp() * torch.rand(layers, 4, generator=draw, dtype=torch.float64)
    each = torch.rand(layers, HEADS, 4, generator=draw, dtype=torch.float64).sort(2).values.flip(2)
    return {
        "tokens.curves": (1 - (-steep * STEPS).exp()) / (1 - (-steep).exp()),
        "tokens.variances": steep[:, 0] / 30,
        "tokens.errors": steep[:, 0],
        "tokens.heads": (-heads * STEPS).exp() * heads,
        "tokens.prices": torch.stack([shares.expand(layers, -1), prices], -1),
        "tokens.prices_by_head": torch.stack([shares.expand(layers, HEADS, -1), each], -1),
    }


def stats_of(tensors: dict[str, Tensor], least: int = 20, most: int = 512) -> Stats:
    return Stats(len(next(iter(tensors.values()))), HEADS, least, most, tensors)


def alike() -> dict[str, Tensor]:
    """Returns tensors of layers, and heads, that are all equal."""
    one = measured(layers=1)
    for name in ("tokens.heads", "tokens.prices_by_head"):
        one[name] = one[name][:, :1].expand(-1, HEADS, *one[name].shape[2:])
    return {name: x.expand(LAYERS, *x.shape[1:]).clone() for name, x in one.items()}


def test_allocators_are_found() -> None:
    names = {part.name() for part in ALLOCATORS}
    assert {"uniform", "pyramid", "prefix", "variance", "error_profile", "ada", "priced"} <= names
    assert "priced_heads" in names


@pytest.mark.parametrize("mean", [20, 21, 64, 301, 511, 512])
@every_allocator
def test_a_budget_is_met_exactly_within_its_limits(allocator: Allocator, mean: int) -> None:
    for seed in (0, 1):
        stats = stats_of(measured(seed))
        found = allocator.allot(stats, mean)
        assert found.dtype == torch.int64
        assert found.shape == ((LAYERS, HEADS) if allocator.per_head else (LAYERS,))
        assert int(found.sum()) == mean * found.numel()
        assert int(found.min()) >= stats.least and int(found.max()) <= stats.most


@every_allocator
def test_an_allocator_is_a_pure_function(allocator: Allocator) -> None:
    tensors = measured()
    found = allocator.allot(stats_of(tensors), 100)
    assert torch.equal(found, allocator.allot(stats_of(measured()), 100))
    assert all(torch.equal(x, tensors[name]) for name, x in measured().items())


@pytest.mark.parametrize("mean", [20, 77, 300])
@pytest.mark.parametrize("allocator", [a for a in ALLOCATORS if a.reads], ids=str)
def test_equal_layers_get_equal_budgets(allocator: Allocator, mean: int) -> None:
    assert set(allocator.allot(stats_of(alike()), mean).flatten().tolist()) == {mean}


@every_allocator
def test_a_model_of_one_layer_gets_the_mean(allocator: Allocator) -> None:
    found = allocator.allot(stats_of(measured(layers=1)), 90)
    assert int(found.sum()) == 90 * found.numel()


@every_allocator
def test_an_allocator_reads_no_more_than_it_says(allocator: Allocator) -> None:
    only = {name: x for name, x in measured().items() if name in allocator.reads}
    found = allocator.allot(Stats(LAYERS, HEADS, 20, 512, only), 100)
    assert torch.equal(found, allocator.allot(stats_of(measured()), 100))


@pytest.mark.parametrize("name", ["prefix", "priced", "priced_heads", "uniform"])
def test_a_larger_budget_takes_no_token_from_any_layer(name: str) -> None:
    for seed in range(4):
        rows = [
            made(use=name).allot(stats_of(measured(seed), 5, 90), mean) for mean in range(5, 91)
        ]
        assert (torch.stack(rows).diff(dim=0) >= 0).all()


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_prefix_keeps_what_the_ratio_leaves_of_all_tokens(ratio: float) -> None:
    most = 1000
    found = made(use="prefix").allot(stats_of(measured(), 0, most), round((1 - ratio) * most))
    assert int(found.sum()) == round((1 - ratio) * most * LAYERS)


def test_prefix_covers_the_same_share_of_attention_in_every_layer() -> None:
    curves = measured()["tokens.curves"]
    found = made(use="prefix").allot(stats_of({"tokens.curves": curves}, 0, 256), 60)
    covered = curves.gather(1, found[:, None])
    before = curves.gather(1, found[:, None] - 1)
    assert found.unique().numel() > 1
    assert before.max() < covered.min(), "one threshold parts all layers"


def test_a_layer_that_looks_at_one_token_gets_it_besides_its_least_by_prefix() -> None:
    curves = measured()["tokens.curves"]
    curves[2, 1:] = 1
    found = made(use="prefix").allot(stats_of({"tokens.curves": curves}, 20, 276), 80)
    assert found[2] == 21
    assert (found.index_select(0, torch.tensor([0, 1, 3, 4, 5])) > 21).all()


def test_variance_of_no_eviction_evicts_nothing() -> None:
    stats = stats_of(measured())
    assert set(made(use="variance").allot(stats, stats.most).tolist()) == {stats.most}


def test_variance_gives_most_where_attention_is_even() -> None:
    low = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = made(use="variance").allot(Stats(3, 1, 4, 1000, {"tokens.variances": low}), 100)
    softmax = (-low).softmax(0) * 300
    assert found.tolist() == pytest.approx(softmax.tolist(), abs=1)


def test_error_budgets_follow_the_errors_between_floor_and_three_times_the_mean() -> None:
    errors = torch.tensor([0.0, 0.1, 0.2, 0.7])
    stats = Stats(4, 1, 8, 4096, {"tokens.errors": errors})
    found = made(use="error_profile").allot(stats, 256)
    # by the formula 32, 121.6, 211.2 and 659.2; all are below 768
    assert found.tolist() == [32, 122, 211, 659]
    high = made(use="error_profile", times=2).allot(stats, 256)
    # 659 is cut to 512, and 147 tokens are given to the others in turns, larger errors first
    assert high.tolist() == [81, 171, 260, 512]


def test_error_budgets_are_repaired_by_one_token_where_errors_are_largest() -> None:
    errors = torch.tensor([1.0, 1.0, 1.1])
    stats = Stats(3, 1, 0, 4096, {"tokens.errors": errors})
    found = made(use="error_profile", floor=0).allot(stats, 100)
    # 96.77, 96.77 and 106.45 are rounded to 97, 97 and 106, which is the sum
    assert found.tolist() == [97, 97, 106]
    found = made(use="error_profile", floor=0).allot(stats, 101)
    # 97.74, 97.74 and 107.52 are rounded to 98, 98 and 108: one too many, which the least gives
    assert found.tolist() == [98, 97, 108]


def test_a_pyramid_falls_in_a_straight_line() -> None:
    found = made(use="pyramid").allot(Stats(3, 1, 8, 4096), 108)
    # spare 100: the last layer has 100 / 20 of it, the first 200 - 5, and all 8 besides
    assert found.tolist() == [203, 108, 13]
    capped = made(use="pyramid").allot(Stats(3, 1, 8, 158), 108)
    assert capped.tolist() == [158, 108, 58]


def test_ada_gives_heads_that_spread_their_attention_more_than_those_that_do_not() -> None:
    scores = torch.stack([(-30 * STEPS).exp(), torch.full_like(STEPS, 0.2)])[None]
    stats = Stats(1, 2, 16, 272, {"tokens.heads": scores})
    found = made(use="ada").allot(stats, 116)
    # 0.2 is where the first head has fallen after 256 ln(5) / 30 = 13.7 tokens, 20 are safe
    assert found.tolist() == [[36, 196]]


def test_ada_cuts_the_scores_of_all_heads_at_one_value() -> None:
    scores = measured()["tokens.heads"]
    stats = Stats(LAYERS, HEADS, 0, 256, {"tokens.heads": scores})
    found = made(use="ada", safeguard=0.0).allot(stats, 64)
    kept = scores.gather(2, (found - 1).clamp_min(0)[..., None])[..., 0]
    next_best = scores.gather(2, (found + 1)[..., None])[..., 0]
    assert (torch.where(found > 0, kept, torch.inf).amin(1) >= next_best.amax(1)).all()


@pytest.mark.parametrize("mean", [10, 13, 25])
def test_no_knapsack_is_cheaper_than_priced(mean: int) -> None:
    for seed in range(3):
        pairs = measured(seed)["tokens.prices"]
        stats = Stats(LAYERS, 1, 5, 45, {"tokens.prices": pairs})
        knots, gains = gained(pairs[0, :, 0], pairs[..., 1])
        fallen = torch.cat([torch.zeros(LAYERS, 1), (gains * knots.diff()).cumsum(1)], 1)
        every = torch.stack([interpolated(own.flatten(), knots, 41) for own in fallen])
        price = -every  # [L, 41], of so many tokens besides the least
        groups = [[(size, float(x)) for size, x in enumerate(own)] for own in price]
        best = Knapsack(groups, unit=1).prices[(mean - 5) * LAYERS]
        found = made(use="priced").allot(stats, mean) - 5
        assert float(price.gather(1, found[:, None]).sum()) == pytest.approx(float(best), abs=1e-9)


def test_prices_of_heads_are_those_of_layers_of_one_head() -> None:
    pairs = measured()["tokens.prices_by_head"]
    heads = made(use="priced_heads").allot(stats_of({"tokens.prices_by_head": pairs}), 100)
    alone = Stats(LAYERS * HEADS, 1, 20, 512, {"tokens.prices": pairs.flatten(0, 1)})
    assert heads.flatten().tolist() == made(use="priced").allot(alone, 100).tolist()


def interpolated(values: Tensor, knots: Tensor, count: int) -> Tensor:
    x = torch.linspace(0, 1, count, dtype=torch.float64)
    at = torch.searchsorted(knots, x).clamp(1, len(knots) - 1)
    part = (x - knots[at - 1]) / (knots[at] - knots[at - 1])
    return values[at - 1] + part * (values[at] - values[at - 1])


def test_prices_between_shares_are_convex_and_below_what_was_measured() -> None:
    shares, prices = torch.tensor([0.1, 0.4, 0.7]), torch.tensor([[4.0, 3.9, 1.0]])
    knots, gains = gained(shares, prices)
    assert knots.tolist() == pytest.approx([0, 0.1, 0.4, 0.7, 1])
    # from 0.1 to 0.7 straight, since 3.9 is above that line; below 0.1 as from there on
    assert gains[0].tolist() == pytest.approx([5, 5, 5, 10 / 3])


def test_what_is_dealt_out_goes_round_by_round_where_there_is_room() -> None:
    room, order = torch.tensor([5, 0, 1, 2]), torch.tensor([3, 2, 0, 1])
    rows = [dealt(room, count, order).tolist() for count in range(9)]
    assert rows[:4] == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 1]]
    assert rows[5:] == [[2, 0, 1, 2], [3, 0, 1, 2], [4, 0, 1, 2], [5, 0, 1, 2]]
    with pytest.raises(ValueError, match="9 tokens do not fit into room for 8"):
        dealt(room, 9, order)


def test_an_exact_sum_is_the_nearest_of_all() -> None:
    wanted = torch.tensor([0.2, 3.9, 7.4])
    for total in range(3, 16):
        found = exact(wanted, total, 1, 5)
        every = [own for own in itertools.product(range(1, 6), repeat=3) if sum(own) == total]
        off = [float((torch.tensor(own) - wanted).square().sum()) for own in every]
        assert float((found - wanted).square().sum()) == pytest.approx(min(off))
