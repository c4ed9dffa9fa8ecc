"""Laws of kvtune bench tiers: what is compared at equal bytes, and its verb on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest

from kvtune import recipe as recipes
from kvtune.bench.tiers import EQUAL_BYTES, shared, unselected
from kvtune.errors import UsageError
from kvtune.models import facts

kv = TINY.kv
RECIPE = """kvtune = 1
[[layers]]
span = "first 1"
recent = 16
select = { use = "attention", share = 0.2 }
rest.keys = [{ use = "affine", bits = 2, group = "head" }]
rest.values = [{ use = "affine", bits = 2, group = "head" }]
[[layers]]
span = "rest"
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str | Path]:
    """The verb, a tiny model and what makes its runs short."""
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    sizes = ("--sequences", "2", "--context", "500", "--continuation", "16")
    return ["bench", "tiers", model, "--data", prose, *sizes]


def test_each_share_is_measured_three_ways(kv: Any, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(RECIPE)
    found = kv.json(*words, "--recipe", file, "--shares", "20%,0.5", "-o", tmp_path / "rows.json")
    assert found["ok"], found["error"]
    none, *rows = found["data"]["rows"]
    assert (none["share"], none["rest"]) == (0.0, rows[0]["rest"])
    assert none["bits"] < rows[0]["bits"] < rows[3]["bits"]
    assert [row["share"] for row in rows if row["rest"] != EQUAL_BYTES] == [0.2, 0.2, 0.5, 0.5]
    for stored, dropped, equal in (rows[:3], rows[3:]):
        assert equal["rest"] == EQUAL_BYTES
        assert dropped["bits"] < stored["bits"] <= equal["bits"]
        assert equal["share"] > stored["share"]
        assert min(row["kl"] for row in (stored, dropped, equal)) > 0
    assert (tmp_path / "rows.json").is_file()
    said = kv(*words, "--recipe", file, "--shares", "20%")
    assert said.code == 0
    assert EQUAL_BYTES in said.out


def test_what_selects_nothing_or_takes_no_such_share_is_refused(
    kv: Any, words: list[str], tmp_path: Path
) -> None:
    assert "selects no tokens, or stores no rest" in kv(*words, "--recipe", "k4v2").told
    file = tmp_path / "own.toml"
    file.write_text(RECIPE)
    said = kv(*words, "--recipe", file, "--shares", "0%")
    assert said.code == 2
    assert "is not above 0 and up to 1" in said.told


def test_what_is_fitted_wants_a_profile(kv: Any, words: list[str | Path], tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    fitted = '[{ use = "balance" }, { use = "affine", bits = 2, group = "head" }]'
    plain = '[{ use = "affine", bits = 2, group = "head" }]'
    file.write_text(RECIPE.replace(f"rest.keys = {plain}", f"rest.keys = {fitted}"))
    said = kv(*words, "--recipe", file, "--shares", "20%")
    assert said.code == 2
    assert "balance reads tensors that are fitted to a profile" in said.told
    folder = tmp_path / "run"
    run = kv("calibrate", *words[2:], "-o", folder, "--template", "search-kivi")
    assert run.code == 0, run.err
    found = kv.json(*words, "--recipe", file, "--shares", "20%", "--profile", folder)
    assert found["ok"], found["error"]
    assert "balance() > affine" in found["data"]["rows"][0]["rest"]


def test_without_a_selector_all_tokens_are_stored_as_the_rest_is(llama: Any) -> None:
    policies = recipes.loads(RECIPE).policies(facts(llama.config))
    found = unselected(policies[0])
    assert (found.keys, found.values) == policies[0].rest
    assert (found.select, found.recent) == (None, 16)
    assert unselected(policies[1]) == policies[1]


def test_only_layers_that_select_change(llama: Any) -> None:
    policies = recipes.loads(RECIPE).policies(facts(llama.config))
    other = shared(policies, 0.5, drop=True)
    assert other[1:] == policies[1:]
    assert other[0].select is not None
    assert (other[0].select.share, other[0].rest) == (0.5, None)
    assert shared(policies, 0.2) == policies
    with pytest.raises(UsageError):
        shared(policies, 0.0)
