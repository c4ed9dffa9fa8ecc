"""The laws of every selector found in kvtune/methods, over the settings that its marks allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_cases import ALL, DTYPES, HEADS, SHARED
from torch import Tensor, nn

from kvtune.retention import Selector
from kvtune.rope import Rope
from kvtune.view import Spot, View, received

# how many tokens win does not matter to a score
SELECTORS = [
    part
    for part in ALL
    if isinstance(part, Selector) and not (part.model_fields_set & SHARED.keys())
]
every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=str)


class Turning(nn.Module):
    """Rotary tables of 64 channels."""

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        speed = 1e4 ** (-torch.arange(0, 64, 2) / 64)
        angles = positions[..., None] * speed
        both = torch.cat([angles, angles], -1)
        return both.cos().to(like), both.sin().to(like)


ROPE = Rope(Turning())
# of what a profile knows of a layer: the second half of its query heads fetch facts
ROWS = {"retrieval.scores": torch.arange(2.0 * HEADS)}
FITS = {
    f"{selector.name()}.{name}": x
    for selector in SELECTORS
    if selector.fits and selector == type(selector)()
    for name, x in selector.fit(ROWS).items()
}


def seen(dtype: torch.dtype = torch.float32) -> View:
    """Returns 40 tokens [2, 4, 40, 64] between 2 sinks and a window of 8, all that a part may need
    of them, and two query heads of each kv head, which look at token 7 of the 40."""
    keys, values = torch.randn(2, 2, HEADS, 50, 64, generator=torch.Generator().manual_seed(0))
    query = torch.randn(2, 2 * HEADS, 50, 64, generator=torch.Generator().manual_seed(1))
    query[..., 0], keys[..., 9, 0] = 9.0, 9.0
    keys, values, query = keys.to(dtype), values.to(dtype), query.to(dtype)
    output = torch.randn(2 * HEADS, 64, 96, generator=torch.Generator().manual_seed(2)).to(dtype)
    return View(
        keys[:, :, 2:42],
        values[:, :, 2:42],
        received(query, keys)[:, :, 2:42],
        query,
        keys[:, :, :2],
        keys[:, :, 42:],
        torch.arange(2, 42),
        50,
        torch.zeros(2, 1, 40, dtype=torch.bool),
        Spot(layer=1, layers=4, tensors=FITS, rope=ROPE, output=output),
    )


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


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a view."""
    if isinstance(value, Tensor):
        return [value]
    return [x for own in value for x in tensors(own)] if isinstance(value, tuple) else []


@every_selector
def test_a_selector_leaves_its_view_as_it_is(selector: Selector) -> None:
    view = seen()
    selector.score(view)
    for one, two in zip(tensors(view), tensors(seen()), strict=True):
        assert torch.equal(one, two)


@every_selector
def test_a_selector_keeps_rows_apart(selector: Selector) -> None:
    view, other = seen(), seen()
    for x in tensors(other[:7]):
        if x.shape[0] == 2:
            x[1] = x[1].flip(-2) + 1
    assert torch.equal(selector.score(view)[0], selector.score(other)[0])


@every_selector
def test_of_as_many_tokens_as_there_are_all_stay(selector: Selector) -> None:
    view = seen()
    places = selector.choose(view, 40).places
    assert torch.equal(places, torch.arange(40).expand(2, HEADS, 40))


@every_selector
def test_heads_that_are_alike_keep_the_same_tokens(selector: Selector) -> None:
    alike = selector.model_copy(update={"alike": True})
    places = alike.choose(seen(), 10).places
    assert torch.equal(places, places[:, :1].expand_as(places))


@pytest.mark.parametrize("selector", [s for s in SELECTORS if "attention" in s.needs], ids=str)
def test_what_gets_most_attention_wins(selector: Selector) -> None:
    assert (selector.score(seen()).argmax(-1) == 7).all()


@pytest.mark.parametrize("selector", [s for s in SELECTORS if s.fits], ids=str)
def test_what_is_fitted_is_what_blanks_foretell(selector: Selector) -> None:
    found, blanks = selector.fit(ROWS), selector.blanks(2 * HEADS, HEADS, 64)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in blanks.items()
    }
