"""Laws of kvtune bench sharing: equal bytes, what is compared with what, and its verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest

from kvtune import recipe as recipes
from kvtune.bench.sharing import EVEN, even, retentions, told
from kvtune.cache import weigh
from kvtune.errors import UsageError
from kvtune.models import FULL, Facts, LayerFacts

kv = TINY.kv
LAYERS = tuple(LayerFacts(FULL, 3, 9, 64) for _ in range(8))
KNOWN = Facts("Tiny", LAYERS, 8192, 61)


def test_groups_of_all_sizes_take_equal_bytes() -> None:
    cases = even(KNOWN, (2, 4), 2048)
    sizes = [weigh(policies, KNOWN, 2048).bytes for _, policies in cases]
    assert max(sizes) <= (1 + EVEN) * min(sizes)
    assert [name.partition(",")[0] for name, _ in cases] == ["xkv 2", "xkv 4"]
    for _, policies in cases:
        assert all(policy.sharer and policy.sinks == 4 for policy in policies)


def test_sizes_that_cannot_be_equal_are_refused() -> None:
    narrow = Facts("Tiny", (LayerFacts(FULL, 1, 4, 16),) * 2, 8192, 61)
    with pytest.raises(UsageError, match="take equal bytes"):
        even(narrow, (1, 4), 300)


def test_minicache_is_compared_on_the_upper_half_alone() -> None:
    cases = dict(retentions(KNOWN))
    assert len(cases) == 7
    for name, policies in cases.items():
        assert all(policy.is_dense for policy in policies[:4])
        assert all(
            (policy.sharer is not None) == name.startswith("mini") for policy in policies[4:]
        )
    sizes = {name: weigh(policies, KNOWN, 2048).bytes for name, policies in cases.items()}
    right, wrong = (
        f"minicache in 4 bits, the {kind} retained" for kind in ("dissimilar", "similar")
    )
    assert sizes[right] == sizes[wrong] > sizes["minicache in 4 bits, none retained"]
    assert sizes["minicache in 16 bits, none retained"] > sizes["4 bits"]


def test_a_map_is_told_in_words() -> None:
    assert told({4: 1, 2: 0}) == "2 reads 0, 4 reads 1"


@pytest.fixture
def words(tmp_path: Path) -> list[str | Path]:
    """The verb, a tiny model and what makes its runs short."""
    model, prose = TINY.tiny(tmp_path / "model"), TINY.text(tmp_path / "prose.txt")
    sizes = ("--sequences", "1", "--context", "300", "--continuation", "8")
    return ["bench", "sharing", model, "--data", prose, *sizes]


def test_the_verb_tells_its_tables_and_writes_the_map(
    kv: Any, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "map.toml"
    asked = ("--tables", "merged,owners", "--shares", "1", "--threshold", "-1", "--singles", "1")
    found = kv.json(*words, *asked, "-o", file)
    assert found["ok"], found["error"]
    data = found["data"]
    assert len(data["merged"]) == 7
    assert [row["name"].startswith("KVSharer") for row in data["owners"]] == [True, False]
    assert all(row["bytes"] > 0 and row["kl"] >= 0 for row in (*data["merged"], *data["owners"]))
    written = recipes.load(file)
    (borrower,) = [entry for entry in written.layers if entry.share]
    assert borrower.share == {"use": "owner", "layer": data["steps"][0]["pair"]["owner"]}
    assert "groups" not in data


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (("--tables", "group"), "There is no table 'group'. Did you mean 'groups'"),
        (("--groups", "2,3"), "A group has 1, 2, 4 or 8 layers, not '3'"),
    ],
    ids=str,
)
def test_what_the_verb_does_not_know_is_refused(
    kv: Any, words: list[str], asked: tuple[str, ...], why: str
) -> None:
    assert why.partition("Did")[0] in kv(*words, *asked).told
