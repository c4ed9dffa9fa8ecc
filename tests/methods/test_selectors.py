"""The laws of every selector found in kvtune/methods, over the settings that its marks allow."""

from __future__ import annotations

import pytest
import torch
from method_cases import ALL, DTYPES, HEADS

from kvtune.parts import Selector, View
from kvtune.view import received

SELECTORS = [part for part in ALL if isinstance(part, Selector)]
every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=str)


def seen(dtype: torch.dtype = torch.float32) -> View:
    """Returns 40 tokens [2, 4, 40, 64] and the attention that two query heads of each paid them."""
    keys, values = torch.randn(2, 2, HEADS, 40, 64, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 2 * HEADS, 40, 64, generator=torch.Generator().manual_seed(1))
    query[..., 0], keys[..., 7, 0] = 9.0, 9.0  # all queries look at token 7
    keys, values, query = keys.to(dtype), values.to(dtype), query.to(dtype)
    return View(keys, values, received(query, keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_selector
def test_a_selector_scores_every_token_of_every_head(
    selector: Selector, dtype: torch.dtype
) -> None:
    score = selector.score(seen(dtype))
    assert score.shape == (2, HEADS, 40)
    assert score.dtype == torch.float32
    assert score.isfinite().all()
    assert torch.equal(score, selector.score(seen(dtype))), "it is repeatable"
    assert 0 < selector.share <= 1


@every_selector
def test_a_selector_leaves_its_view_as_it_is(selector: Selector) -> None:
    view = seen()
    selector.score(view)
    for one, two in zip(view, seen(), strict=True):
        assert one is not None and two is not None
        assert torch.equal(one, two)


@every_selector
def test_a_selector_keeps_rows_and_heads_apart(selector: Selector) -> None:
    view = seen()
    other = View(*(None if x is None else x.clone() for x in view))
    for x in other:
        if x is not None:
            x[1, 2] = x[1, 2].flip(0) + 1
    same = (selector.score(view) == selector.score(other)).all(-1)
    same[1, 2] = True
    assert same.all()


@every_selector
def test_scores_without_data_have_the_shape_of_those_with_data(selector: Selector) -> None:
    """Bytes are foretold on tensors without data."""
    bare = selector.score(View(*(None if x is None else x.to("meta") for x in seen())))
    assert bare.is_meta
    assert bare.shape == selector.score(seen()).shape


@pytest.mark.parametrize("selector", [s for s in SELECTORS if "attention" in s.needs], ids=str)
def test_what_gets_most_attention_wins(selector: Selector) -> None:
    assert (selector.score(seen()).argmax(-1) == 7).all()
