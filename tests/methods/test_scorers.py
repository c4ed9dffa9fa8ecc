"""What each scorer prefers, on views that are made for it, beside plain formulas of its paper."""

from __future__ import annotations

import pytest
import torch
from scorer_views import BATCH, DIM, HEADS, Turning, drawn, view_of
from torch import Tensor
from torch.testing import assert_close

from kvtune.methods.critical import Critical
from kvtune.methods.defensive import Defensive
from kvtune.methods.expected import Expected, mean_turn
from kvtune.methods.keydiff import Keydiff
from kvtune.methods.knorm import Knorm
from kvtune.methods.lagkv import Lagkv
from kvtune.methods.snapkv import Snapkv
from kvtune.methods.streaming import Streaming
from kvtune.methods.text_prior import TextPrior
from kvtune.methods.tova import Tova
from kvtune.retention import Selector
from kvtune.rope import Rope
from kvtune.splits import parted
from kvtune.view import Spot, View, looked

SCORERS = [
    Streaming(),
    Knorm(),
    Keydiff(),
    Lagkv(lag=64),
    Snapkv(),
    Snapkv(window=8, kernel=7, pool="max", reduce="max"),
    Expected(),
    Tova(),
    Critical(),
    Defensive(),
    TextPrior(),
]
every_scorer = pytest.mark.parametrize("scorer", SCORERS, ids=str)


def winners(scorer: Selector, view: View, count: int) -> Tensor:
    return scorer.choose(view, count).places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sinks", "window"), [(2, 8), (0, 0), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 4, 150])
@every_scorer
def test_few_tokens_without_sinks_or_window_have_scores_too(
    scorer: Selector, tokens: int, sinks: int, window: int, dtype: torch.dtype
) -> None:
    view = view_of(tokens, sinks, window, dtype=dtype)
    score = scorer.score(view)
    assert score.shape == (BATCH, HEADS, tokens)
    assert score.dtype == torch.float32
    assert score.isfinite().all()
    assert winners(scorer, view, 1).shape == (BATCH, HEADS, 1)
    assert winners(scorer, view, 0).shape == (BATCH, HEADS, 0)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@every_scorer
def test_any_group_of_query_heads_scores_its_kv_head(scorer: Selector, group: int) -> None:
    """One row and head of many is what it would be alone."""
    view = view_of(40, group=group)
    alone = View(
        *(None if x is None else x[1:, 1:] for x in view[:3]),
        view.queries[1:, group:],
        *(None if x is None else x[1:, 1:] for x in view[4:6]),
        view.positions,
        view.seen,
        spot=view.spot._replace(output=view.spot.output[group:]),
    )
    score = scorer.score(view)[1:, 1:]
    if isinstance(scorer, Tova):  # it goes by all heads of the layer
        score = looked(view, 1)[1:, group:].mean((1, 2))[:, None]
    if isinstance(scorer, Critical | Defensive):  # heads share what lifts the first stage
        assert torch.equal(parted(scorer.score(alone), 9)[0], parted(score, 9)[0])
    else:
        assert_close(scorer.score(alone), score)


def test_the_last_tokens_win_by_recency() -> None:
    places = winners(Streaming(), view_of(30), 7)
    assert torch.equal(places, torch.arange(23, 30).expand(BATCH, HEADS, 7))


def test_short_keys_win_by_norm() -> None:
    view = view_of(30)
    view.keys[:, :, [3, 17]] *= 1e-3
    assert torch.equal(winners(Knorm(), view, 2)[0, 0], torch.tensor([3, 17]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_of_16_bits_do_not_tie(dtype: torch.dtype) -> None:
    score = Knorm().score(view_of(2000, dtype=dtype))
    assert score.unique().numel() > 0.99 * score.numel()


def test_keys_that_point_away_from_the_mean_win_whatever_their_length() -> None:
    view = view_of(30)
    view.keys[:, :, :, 0] = 9.0
    view.keys[:, :, 12, 0] = -9.0
    assert (winners(Keydiff(), view, 1) == 12).all()
    longer = view._replace(keys=view.keys * drawn(BATCH, HEADS, 30, 1).exp())
    assert_close(Keydiff().score(longer), Keydiff().score(view))


def by_lag(view: View, lag: int) -> Tensor:
    """Ranks of all but the last partition, partition by partition."""
    found = []
    for start in range(0, view.keys.shape[2] // lag * lag - lag, lag):
        total = torch.zeros(BATCH, HEADS, lag)
        for x in (view.keys, view.values):
            own, after = x[:, :, start : start + lag], x[:, :, start + lag : start + 2 * lag]
            low, high = after.min(2, keepdim=True).values, after.max(2, keepdim=True).values
            total += ((own - low) / (high - low)).std(-1).softmax(-1)
        found.append(total.argsort(-1).argsort(-1) / lag)
    return torch.cat(found, 2)


def test_lag_ranks_a_partition_on_the_scale_of_the_next() -> None:
    view = view_of(64 * 3 + 20)
    score = Lagkv(lag=64).score(view)
    assert_close(score[:, :, :128], by_lag(view, 64))
    assert (score[:, :, 128:] >= 1).all() and (score[:, :, :128] < 1).all()
    assert (score[:, :, 128:].diff() > 0).all(), "the last partition goes by recency"


def test_lag_leaves_channels_out_that_do_not_vary() -> None:
    view = view_of(64 * 2)
    view.keys[:, :, 64:, 5] = 1.25
    other = view._replace(keys=view.keys.clone())
    other.keys[:, :, :64, 5] = 1.25  # z = 0 / 0
    assert Lagkv(lag=64).score(view).isfinite().all()
    assert torch.equal(Lagkv(lag=64).score(view), Lagkv(lag=64).score(other))


def test_fewer_tokens_than_two_partitions_go_by_recency() -> None:
    assert (Lagkv(lag=64).score(view_of(127)).diff() > 0).all()


def by_hand(view: View, scorer: Snapkv) -> Tensor:
    """SnapKV's score, one query head and token at a time."""
    mean = looked(view, scorer.window).mean(2)
    tokens, half = mean.shape[-1], scorer.kernel // 2
    smooth = torch.zeros_like(mean)
    for token in range(tokens):
        near = mean[..., max(0, token - half) : token + half + 1]
        best = near.amax(-1) if scorer.pool == "max" else near.sum(-1) / scorer.kernel
        smooth[..., token] = best
    group = mean.shape[1] // HEADS
    heads = [smooth[:, h * group : (h + 1) * group] for h in range(HEADS)]
    return torch.stack([x.amax(1) if scorer.reduce == "max" else x.mean(1) for x in heads], 1)


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("tokens", [3, 50])
def test_a_window_pools_what_it_looks_at(tokens: int, kernel: int, pool: str, reduce: str) -> None:
    scorer = Snapkv.model_validate({"window": 8, "kernel": kernel, "pool": pool, "reduce": reduce})
    view = view_of(tokens)
    assert_close(scorer.score(view), by_hand(view, scorer))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [DIM, DIM // 2])
def test_the_mean_rotation_is_that_of_turned_channels(width: int, interleaved: bool) -> None:
    rope, ahead = Rope(Turning(width), interleaved=interleaved), torch.arange(100, 140)
    unit = torch.eye(DIM)[None, :, None].expand(1, DIM, 40, DIM)
    assert_close(mean_turn(rope, ahead, DIM), rope.turn(unit, ahead).mean(2)[0].T)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_expected_attention_is_the_mean_over_normal_queries_to_come(
    epsilon: float, scale: float | None
) -> None:
    view = view_of(30, sinks=4)
    view = view._replace(spot=view.spot._replace(scale=scale))
    rope = view.spot.rope
    assert rope is not None and view.queries is not None and view.last is not None
    plain = rope.unturn(view.queries[:, :, 4:], torch.arange(4, 42)).double()
    turn = mean_turn(rope, torch.arange(42, 42 + 128), DIM).double()
    keys, factor = torch.cat([view.keys, view.last], 2).double(), scale or DIM**-0.5
    total = torch.zeros(BATCH, HEADS, 30).double()
    for head in range(HEADS * 3):
        mean, own = plain[:, head].mean(1), keys[:, head // 3]
        spread = torch.stack([x[head].T.cov(correction=0) for x in plain])
        logits = (own @ (turn @ mean[..., None])).squeeze(-1) * factor
        logits += ((own @ turn @ spread @ turn.T) * own).sum(-1) * factor**2 / 2
        total[:, head // 3] += logits.softmax(-1)[:, :30] / 3
    expected = (total + epsilon) * view.values.double().norm(dim=-1)
    found = Expected(future=128, epsilon=epsilon).score(view)
    assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_queries_of_a_later_piece_have_no_outliers_to_leave_out() -> None:
    """Only the first 4 tokens of a text are left out, not those of what the layer remembers."""
    view = view_of(30, sinks=0)
    queries = view.queries
    assert queries is not None
    loud = queries.clone()
    loud[:, :, :4] += 5
    score = Expected().score(view)
    assert torch.equal(Expected().score(view._replace(queries=loud)), score)
    late, loud_late = (view._replace(queries=q, seen=view.seen + 99) for q in (queries, loud))
    assert not torch.allclose(Expected().score(late), Expected().score(loud_late))


def test_the_last_query_decides_for_all_heads() -> None:
    view = view_of(30)
    assert_close(Tova().score(view)[:, 0], looked(view, 1)[:, :, 0].mean(1))
    places = winners(Tova(), view, 5)
    assert torch.equal(places[:, 0], places[:, 1])


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 40])
def test_half_wins_by_attention_and_half_by_what_it_adds(count: int, output: bool) -> None:
    view = view_of(40, output=output)
    places = winners(Critical(window=8), view, count)
    attention = Snapkv(window=8).score(view)
    size = view.values.norm(dim=-1)
    if view.spot.output is not None:
        each = view.values.repeat_interleave(3, 1) @ view.spot.output
        size = each.abs().sum(-1).unflatten(1, (HEADS, 3)).mean(2)
    for row in range(BATCH):
        for head in range(HEADS):
            best = attention[row, head].argsort(descending=True).tolist()
            first = best[: max(1, count // 2)]
            added = ((attention + 1e-4) * size)[row, head].argsort(descending=True).tolist()
            second = [token for token in added if token not in first][: count - len(first)]
            assert places[row, head].tolist() == sorted(first + second)


@pytest.mark.parametrize("settings", [{"share": 0.25}, {"budget": 10}], ids=str)
def test_the_order_of_two_stages_is_their_choice_where_the_count_is_as_told(
    settings: dict[str, float],
) -> None:
    view, scorer = view_of(40), Critical(window=8, **settings)  # type: ignore[arg-type]
    assert torch.equal(parted(scorer.score(view), 10)[0], winners(scorer, view, 10))


def test_the_worst_case_counts_and_not_the_mean() -> None:
    """Token 5 is needed by one query of one head, token 20 a little by all."""
    keys = torch.zeros(1, 1, 40, DIM)
    keys[:, :, 5, 0], keys[:, :, 20, 1] = 8, 8
    query = torch.zeros(1, 3, 40, DIM)
    query[:, 1, 36, 0] = 4
    query[:, :, 32:, 1] = 0.5
    view = View(keys[:, :, :32], torch.ones(1, 1, 32, DIM), queries=query, last=keys[:, :, 32:])
    view = view._replace(seen=40, spot=Spot(scale=1.0))
    worst = Defensive(window=8, kernel=1).score(view)
    mean = Snapkv(window=8, kernel=1).score(view)
    assert mean[0, 0, 20] > mean[0, 0, 5]
    assert parted(worst, 2)[0][0, 0].tolist() == [5, 20]


def test_what_holds_most_attention_is_safe_from_the_size_of_values() -> None:
    keys = drawn(1, 1, 40, DIM) * 0.1
    keys[:, :, [7, 9], 0] = 6.0
    query = torch.ones(1, 2, 40, DIM)
    values = torch.ones(1, 1, 40, DIM)
    values[:, :, [7, 9]] *= 1e-6
    view = View(keys[:, :, :32], values[:, :, :32], queries=query, last=keys[:, :, 32:], seen=40)
    for scorer in (Defensive(window=8, kernel=1), Critical(window=8, kernel=1)):
        assert winners(scorer, view, 4)[0, 0].tolist()[:2] == [7, 9]
