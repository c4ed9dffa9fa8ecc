"""Text wins over all else, and among its like what gets most attention does."""

from __future__ import annotations

import pytest
import torch
from scorer_views import BATCH, HEADS, drawn, view_of
from torch import Tensor

from kvtune.methods.attention import Attention
from kvtune.methods.text_prior import TextPrior
from kvtune.view import View


def with_kinds(attention: Tensor, kinds: Tensor) -> View:
    return view_of(attention.shape[-1])._replace(attention=attention, kinds=kinds)


def sorted_by_hand(attention: Tensor, kinds: Tensor, count: int) -> list[int]:
    """Text first, then attention, then the later."""
    rank = [(bool(kinds[t]), float(attention[t]), t) for t in range(len(kinds))]
    return sorted(t for *_, t in sorted(rank, reverse=True)[:count])


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("count", [1, 10, 20, 39, 40])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e6, 1e20])
def test_text_goes_before_all_others(size: float, count: int, alike: bool) -> None:
    """However large attention is: an offset would swallow what is small beside it."""
    attention = drawn(BATCH, HEADS, 40).square()
    attention[:, :, 20:] *= size
    attention[:, :, 3:6] = 0  # of equal ones the later wins
    kinds = drawn(BATCH, 1, 40, seed=1) > 0
    places = TextPrior(alike=alike).choose(with_kinds(attention, kinds), count).places
    goes_by = attention.mean(1, keepdim=True).expand_as(attention) if alike else attention
    for row in range(BATCH):
        for head in range(HEADS):
            expected = sorted_by_hand(goes_by[row, head], kinds[row, 0], count)
            assert places[row, head].tolist() == expected


@pytest.mark.parametrize("said", [None, False, True])
def test_where_all_are_alike_it_is_accumulated_attention(said: bool | None) -> None:
    view = view_of(40)
    kinds = None if said is None else torch.full((BATCH, 1, 40), said)
    places = TextPrior().choose(view._replace(kinds=kinds), 13).places
    assert torch.equal(places, Attention().choose(view, 13).places)


def test_scores_are_numbers_where_nobody_looks() -> None:
    kinds = torch.arange(40).expand(BATCH, 1, 40) % 2 == 0
    score = TextPrior().score(with_kinds(torch.zeros(BATCH, HEADS, 40), kinds))
    assert score.isfinite().all()
    assert (score[..., ::2] > score[..., 1::2]).all()
