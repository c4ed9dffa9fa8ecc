"""Laws of what budgets go by: who is looked at, and what eviction costs, on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune import occupancy as seen
from kvtune import parts
from kvtune.bank import Bank, build
from kvtune.errors import UsageError
from kvtune.prices import Pull, cost, pulls
from kvtune.retention import Allocator, Stats
from kvtune.view import received

CONTEXT, MORE = 96, 24


@pytest.fixture
def bank(llama: Any, draw: Any) -> Bank:
    """Three sequences of a tiny Llama, with the attention that their tokens got."""
    tokens = draw(3, CONTEXT + MORE + 1)
    return build(llama, tokens, CONTEXT, needs=frozenset({"attention"}))


@pytest.fixture
def found(llama: Any, bank: Bank) -> dict[int, Pull]:
    return pulls(llama, bank, 0)


def test_every_layer_has_what_allocators_read(bank: Bank, found: dict[int, Pull]) -> None:
    made = seen.occupancy(bank, found)
    named = [part for part in map(parts.find, parts.names()) if issubclass(part, Allocator)]
    assert made.keys() == frozenset[str]().union(*(part.reads for part in named))
    heads = bank.facts.layers[0].kv_heads
    for kind in named:
        stats = Stats(len(found), heads, 20, CONTEXT, made)
        budgets: Tensor = kind().allot(stats, 40)
        assert int(budgets.sum()) == 40 * budgets.numel()


def test_a_curve_is_the_share_of_attention_of_the_best_tokens(
    bank: Bank, found: dict[int, Pull]
) -> None:
    curves = seen.occupancy(bank, found)["tokens.curves"]
    assert curves.shape == (len(found), 257)
    assert (curves[:, 0] == 0).all() and (curves[:, -1] == 1).all()
    assert (curves.diff() >= 0).all() and (curves.diff().diff() <= 1e-9).all()
    mass = seen.crowd_of(bank, 1, found[1]).score.sum(1)
    best = mass.sort(-1, descending=True).values[:, : mass.shape[1] // 4].sum(-1) / mass.sum(-1)
    assert float(curves[1, 64]) == pytest.approx(float(best.mean()), rel=1e-5)


def test_even_attention_has_a_straight_curve_and_no_variance() -> None:
    curve = seen.curve(torch.ones(2, 3, 50))
    assert torch.allclose(curve, torch.linspace(0, 1, 257, dtype=torch.float64))
    assert torch.equal(seen.levels(torch.ones(2, 3, 50)), torch.ones(3, 257, dtype=torch.float64))


def test_a_row_is_sampled_straight_between_its_points() -> None:
    x = torch.tensor([[0.0, 2.0, 3.0]])
    assert seen.sampled(x)[0, [0, 64, 128, 192, 256]].tolist() == [0, 1, 2, 2.5, 3]
    assert seen.sampled(x[:, 1:2])[0].unique().tolist() == [2]


def test_scores_of_heads_fall(bank: Bank, found: dict[int, Pull]) -> None:
    scores = seen.occupancy(bank, found)["tokens.heads"]
    assert (scores.diff() <= 0).all() and (scores > 0).all()


def test_keeping_all_costs_nothing(bank: Bank, found: dict[int, Pull]) -> None:
    crowd = seen.crowd_of(bank, 2, found[2])
    answer = seen.answered(crowd, found[2], crowd.score.shape[2])
    assert torch.allclose(answer, found[2].out, atol=1e-5)
    assert float(cost(found[2], answer)[0]) < 1e-9


def test_what_is_evicted_is_what_no_query_sees(bank: Bank, found: dict[int, Pull]) -> None:
    pull = found[0]
    crowd = seen.crowd_of(bank, 0, pull)
    heads, dim = crowd.keys.shape[1], crowd.keys.shape[3]
    keys, values = torch.cat([crowd.keys, pull.keys], 2), torch.cat([crowd.values, pull.values], 2)
    grouped = pull.query.unflatten(1, (heads, -1))
    logits = torch.einsum("nhgmd,nhtd->nhgmt", grouped, keys) * dim**-0.5
    gone = crowd.score.argsort(-1, descending=True)[..., 10:] + crowd.sinks
    lost = torch.zeros(*keys.shape[:3], dtype=torch.bool).scatter(2, gone, True)
    future = torch.ones(MORE, keys.shape[2], dtype=torch.bool).triu(CONTEXT + 1)
    hidden = lost[:, :, None, None] | future
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    masked = torch.einsum("nhgmt,nhtd->nhgmd", weights, values).flatten(1, 2)
    assert torch.allclose(seen.answered(crowd, pull, 10), masked, atol=1e-5)


def test_prices_fall_with_the_share_that_is_kept(bank: Bank, found: dict[int, Pull]) -> None:
    prices = seen.occupancy(bank, found)["tokens.prices"]
    assert prices[:, :, 0].tolist() == [list(seen.SHARES)] * len(found)
    # of the whole model, and from a tenth on: a random layer may do without its few best tokens
    total = prices[:, 2:, 1].sum(0)
    assert (total.diff() < 0).all() and (total > 0).all()


def test_prices_of_heads_add_up_to_those_of_their_layer(bank: Bank, found: dict[int, Pull]) -> None:
    made = seen.occupancy(bank, found)
    whole, heads = made["tokens.prices"], made["tokens.prices_by_head"]
    assert torch.allclose(heads[..., 1].sum(1), whole[..., 1])
    assert torch.equal(heads[:, 0, :, 0], whole[..., 0])


def test_an_error_is_that_of_32_tokens_a_head(bank: Bank, found: dict[int, Pull]) -> None:
    crowd = seen.crowd_of(bank, 1, found[1])
    exact = CONTEXT - crowd.score.shape[2]
    answer = seen.answered(crowd, found[1], 32 - exact)
    assert crowd.kept(32 - exact)[0].shape[2] == 32
    rows = [
        (x - y).norm() / y.norm()
        for one, two in zip(answer, found[1].out, strict=True)
        for x, y in zip(one.transpose(0, 1), two.transpose(0, 1), strict=True)
    ]
    expected = float(torch.stack(rows).mean())
    assert float(seen.error(crowd, found[1])) == pytest.approx(expected, rel=1e-4)


def test_sinks_and_window_do_not_compete(bank: Bank, found: dict[int, Pull]) -> None:
    crowd = seen.crowd_of(bank, 3, found[3])
    window = CONTEXT - crowd.sinks - crowd.score.shape[2]
    assert (crowd.sinks, window) == (4, 16)
    keys, _ = crowd.kept(0)
    assert torch.equal(keys[:, :, :4], bank.keys[3][:, :, :4])
    assert torch.equal(keys[:, :, 4:], bank.keys[3][:, :, -16:])
    got = received(bank.queries[3], bank.keys[3])[:, :, 4:-16]
    assert torch.allclose(crowd.score.mean(), got.mean() / 16 / 2, rtol=0.05)


@pytest.mark.parametrize("context", [3, 8, 17])
def test_short_contexts_have_tokens_that_compete(llama: Any, draw: Any, context: int) -> None:
    short = build(llama, draw(2, context + 5), context, needs=frozenset({"attention"}))
    made = seen.occupancy(short, pulls(llama, short, 0))
    assert all(x.isfinite().all() for x in made.values())


def test_a_bank_without_attention_is_refused(llama: Any, draw: Any) -> None:
    plain = build(llama, draw(1, 40), 30)
    with pytest.raises(UsageError, match="did not sum up"):
        seen.occupancy(plain, pulls(llama, plain, 0))
