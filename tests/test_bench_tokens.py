"""Laws of kvtune bench tokens and bench prefill: what is compared, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest

from kvtune.bench.prefill import DENSE

kv = TINY.kv


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer."""
    return TINY.tiny(tmp_path / "model")


@pytest.fixture
def words(model: Path, tmp_path: Path) -> list[str | Path]:
    """The verb, the model and what makes its runs short."""
    sizes = ("--sequences", "1", "--context", "200", "--continuation", "8", "--recent", "16")
    return ["bench", "tokens", model, "--data", TINY.text(tmp_path / "prose.txt"), *sizes]


def test_selectors_and_allocators_are_compared_at_equal_sizes(
    kv: Any, words: list[str], tmp_path: Path
) -> None:
    named = ("--scorers", "knorm,kvzip,draft", "--allocators", "uniform,pyramid", "--kept", "40%")
    found = kv.json(*words, *named, "-o", tmp_path / "rows.json")
    assert found["ok"], found["error"]
    scorers, allocators = (found["data"][name] for name in ("scorers", "allocators"))
    assert [row["name"] for row in scorers] == ["knorm", "kvzip", "draft"]
    assert {row["tokens"] for row in (*scorers, *allocators)} == {80}
    assert all(row["kl"] > 0 for row in scorers)
    uniform, pyramid = allocators
    assert uniform["bits"] == pytest.approx(pyramid["bits"], rel=0.05)
    assert uniform["kl"] != pyramid["kl"]


WRONG = {
    "no-selector": (("--scorers", "affine"), "affine is a quantizer, not a selector"),
    "no-allocator": (("--allocators", "knorm"), "knorm is a selector, no allocator"),
    "no-table": (("--scorers", "retrieval_heads"), "are fitted to a profile"),
    "no-profile": (("--allocators", "priced"), "by what calibration measured"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_compared_is_refused_in_words(kv: Any, words: list[str], wrong: str) -> None:
    own, told = WRONG[wrong]
    other = "--allocators" if own[0] == "--scorers" else "--scorers"
    said = kv(*words, *own, other, "none")
    assert said.code == 2
    assert told in said.told


def test_a_prompt_in_chunks_is_told_with_its_peak(kv: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'kvtune = 1\n[[layers]]\nspan = "all"\nrecent = 16\n'
        'select = { use = "knorm", share = 0.25 }\n'
    )
    sizes = ("--context", "600", "--chunk", "100", "--recipes", file)
    dense, kept = kv.json("bench", "prefill", model, *sizes)["data"]["rows"]
    assert dense["name"] == DENSE
    assert kept["held"] < dense["held"] / 2
