"""Laws of the report on tokens, bits and rank: all axes met with each alone, and the maps."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import report_folder
from report_page import Page
from rich.console import Console

from kvtune import report
from kvtune.recipe import loads
from kvtune.report import axes, layers, rank
from kvtune.report.figures import kept_map
from kvtune.report.records import Summary

POINTS = (  # bits, KL, and what is saved by
    (8.0, 0.1, ("tokens",)),
    (4.0, 0.4, ("tokens",)),
    (4.0, 0.02, ("bits",)),
    (2.0, 0.2, ("bits",)),
    (8.0, 0.05, ("rank",)),
    (3.0, 0.03, ("bits", "rank")),
)
JOINT = ((1.9, 0.1, ("bits", "rank", "tokens")), (3.9, 0.01, ("bits", "tokens")))


def summary(more: tuple[tuple[float, float, tuple[str, ...]], ...] = JOINT) -> Summary:
    """A run that measured each axis alone and some recipes of several."""
    held: list[dict[str, Any]] = [
        {"origin": f"knapsack {i}", "uniform": False, "projects": "rank" in used, "axes": used}
        | {"bits": bits, "bytes": bits * 1e6, "ratio": 16 / bits, "kl": kl}
        for i, (bits, kl, used) in enumerate((*POINTS, *more))
    ]
    return Summary.model_validate({**report_folder.summary("x"), "held_out": held})


def test_each_axis_is_met_at_no_more_bytes_and_never_has_the_lower_kl() -> None:
    found = {met.name: met for met in axes.met(summary())}
    assert set(found) == set(axes.OWN)
    for met in found.values():
        assert all(b.bytes <= o.bytes for o, b in zip(met.own, met.best, strict=True))
        assert met.higher == 0
    assert found["tokens alone"].lower == len(found["tokens alone"].own) == 2
    assert found["tokens alone"].most == (pytest.approx(40), 4.0)
    assert found["rank and bits"].lower == 2  # 0.2 at 2 bits, 0.02 at 4; not 0.03 at 3


def test_the_verdict_has_the_numbers() -> None:
    told = axes.verdict(summary())
    assert "tokens alone at 2 of 2 points (at most 40 times, at 4.00 bits)" in told
    assert "nowhere a higher one (bytes counted at 8,192 tokens)" in told
    assert "2 of its points drop tokens" in told


def test_without_a_search_over_tokens_nothing_is_said() -> None:
    assert axes.met(summary(())) == []
    assert axes.verdict(summary(())) == ""


def test_recipes_that_drop_tokens_are_no_part_of_rank_against_bits() -> None:
    for front in rank.fronts(summary()):
        assert front and all("tokens" not in own.axes for own in front)


LAYERS = """
[[layers]]
span = "first 1"
select = { use = "attention", share = 0.25, alike = true }
kept.keys = [{ use = "derope" }, { use = "svd", rank = 0.5, basis = "calibrated" }]
kept.values = [{ use = "affine", bits = 4, group = "head", axis = "token" }]
[[layers]]
span = "rest"
"""


def recipe(text: str = LAYERS) -> str:
    """A recipe of three layers that saves by all axes in the first."""
    return report_folder.recipe(0, "x").partition("[[layers]]")[0] + text


def test_the_map_shows_tokens_rank_and_bits_of_each_layer() -> None:
    found = layers.of_recipe(loads(recipe()), report_folder.LAYERS)
    assert [layer.tokens for layer in found] == [0.25, 1, 1]
    assert [layer.sides["keys"].rank for layer in found] == [0.5, 1, 1]
    assert [layer.sides["values"].bits for layer in found] == [4, 16, 16]
    assert found[0].sides["keys"].bits == 16  # what a projection saves is told as rank
    drawn = kept_map(found)
    assert drawn is not None
    assert drawn["data"][0]["y"] == ["tokens", "rank, keys"]
    assert drawn["data"][0]["z"] == [[0.25, 1, 1], [0.5, 1, 1]]


def test_a_tier_for_the_rest_drops_nothing_and_a_budget_is_a_part_of_the_context() -> None:
    rest = LAYERS.replace("kept.keys", 'rest.keys = [{ use = "affine", bits = 2 }]\nkept.keys', 1)
    rest = rest.replace(
        'kept.keys = [{ use = "derope" }, { use = "svd", rank = 0.5, basis = "calibrated" }]\n', ""
    )
    assert layers.of_recipe(loads(recipe(rest)), report_folder.LAYERS)[0].tokens == 1
    budget = loads(recipe(LAYERS.replace("share = 0.25", "budget = 256")))
    assert layers.of_recipe(budget, report_folder.LAYERS, 1024)[0].tokens == 0.25
    assert layers.of_recipe(budget, report_folder.LAYERS)[0].tokens == 1


def test_a_recipe_that_stores_all_has_no_such_map() -> None:
    plain = layers.of_recipe(loads(report_folder.recipe(1, "x")), report_folder.LAYERS)
    assert kept_map(plain) is None


def test_page_and_terminal_have_the_fronts_and_the_maps(tmp_path: Path) -> None:
    made = report_folder.write(tmp_path / "run")
    (made / "tune.json").write_text(summary().model_dump_json())
    (made / "front" / "01.toml").write_text(recipe())
    page = Page(report.page(report.read(made)))
    assert {"axes", "layers.1", "kept.1"} <= page.figures.keys()
    assert "kept.0" not in page.figures
    assert len(page.figures["axes"]["data"]) == 1 + len(axes.OWN)
    assert any("nowhere a higher one" in text for text in page.texts)
    console = Console(width=120, file=StringIO())
    with console.capture() as shown:
        console.print(*report.view(report.read(made)))
    told = " ".join(shown.get().split())
    assert "nowhere a higher one" in told
    assert "tokens 3++" in told or "tokens 2++" in told
