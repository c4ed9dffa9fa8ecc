"""Laws of methods/ladder.py: how LaCache's stair lies in a layer with sinks and a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtune.ladders import Ladder as Stairs
from kvtune.parts import find
from kvtune.view import Spot, View

LAYERS, SINKS, WINDOW = 8, 4, 6


def view(length: int, layer: int = 0, memory: Any = None, window: int = WINDOW) -> View:
    """So many tokens that compete, of two rows and three heads."""
    keys = torch.zeros(2, 3, length, 4)
    first, last = torch.zeros(2, 3, SINKS, 4), torch.zeros(2, 3, window, 4)
    spot = Spot(layer=layer, layers=LAYERS)
    return View(keys, keys, None, None, first, last, spot=spot, memory=memory)


def chosen(selector: Any, length: int, count: int, **more: Any) -> tuple[Tensor, Any]:
    found = selector.choose(view(length, **more), count)
    assert found.places.shape[:2] == (2, 3)
    assert (found.places == found.places[:1, :1]).all(), "rows and heads are alike"
    return found.places[0, 0], found.memory


@pytest.mark.parametrize("window", [0, 3, 6])
@pytest.mark.parametrize("pattern", ["repo", "contiguous"])
def test_a_layer_keeps_what_lacache_keeps_of_all_its_tokens(pattern: Any, window: int) -> None:
    """The sinks are its first tokens, and the window is part of its tail."""
    selector = find("ladder")(budget=64, span=4, overlap=1, pattern=pattern)
    stairs, held, cursor = Stairs(LAYERS, 4, 1, pattern), 44, None
    for step in range(9):
        held += 16 if step else 30
        whole = stairs.compact(3, SINKS + held + window, 64, (cursor or 0) + SINKS, SINKS)
        places, cursor = chosen(
            selector, held, 64 - SINKS - window, layer=3, memory=cursor, window=window
        )
        outer = (torch.arange(SINKS), places + SINKS, SINKS + held + torch.arange(window))
        assert torch.equal(torch.cat(outer), whole.places)
        assert cursor + SINKS == whole.cursor
        held = len(places)


def test_layers_keep_as_many_tokens_and_other_ones() -> None:
    selector = find("ladder")(budget=64, span=2)
    found = [chosen(selector, 60, 45, layer=i)[0] for i in range(LAYERS)]
    assert len({len(places) for places in found}) == 1
    assert {int(place) for places in found for place in places} == set(range(60))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("settings", "span"),
    [
        ({"share": 0.25}, 2),
        ({"share": 0.05}, 0),
        ({"budget": 99}, 4),
        ({"budget": 99, "span": 3}, 3),
        ({"share": 0.5, "span": 999}, 999),
    ],
    ids=str,
)
def test_a_span_of_nothing_is_the_share_or_half_of_the_layers(
    settings: dict[str, Any], span: int
) -> None:
    stairs = find("ladder")(**settings).stairs(LAYERS)
    assert stairs == Stairs(LAYERS, span)
    assert 1 <= stairs.stair.after <= stairs.stair.before <= LAYERS


@pytest.mark.parametrize("layers", [1, 2, 30])
def test_any_span_and_overlap_are_legal_in_any_model(layers: int) -> None:
    for span in (0, 1, 9, 1024):
        for overlap in (0, 7, 1023):
            own = view(90)._replace(spot=Spot(layer=layers - 1, layers=layers))
            selector = find("ladder")(budget=64, span=span, overlap=overlap)
            found = selector.choose(own, 50).places
            assert 0 < found.shape[2] <= 50


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"span": -1}, "not from 0 up to 1024"), ({"overlap": 1024}, "not from 0 up to 1023")],
    ids=str,
)
def test_a_span_out_of_reach_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        find("ladder")(**settings)
