"""Laws of objectives and limits on the command line: what is asked for is what is proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
from kvtune_kernels import Format

from kvtune.bench import latency

kv = TINY.kv
COST = {2: 2.0, 3: 6.0, 4: 4.0, 8: 8.0}  # three bits are as slow as they are on a GPU


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def words(home: Path) -> list[str]:
    """A tiny model to tune, and what makes its runs short."""
    model, prose = TINY.tiny(home / "model"), TINY.text(home / "prose.txt")
    return ["tune", str(model), "--data", str(prose), *TINY.QUICK]


@pytest.fixture
def table(home: Path) -> Path:
    """The latency table of another machine, for the tiny model's heads."""
    pairs = [(k, 64, v, 64) for k in COST for v in COST] + [(4, g, 4, 64) for g in (32, 128)]
    pairs += [(4, 64, 4, 32)]
    cells = tuple(
        latency.Cell(
            Format(k, g, False), Format(v, h, True), b, n, n / 1024 * (COST[k] + COST[v]), n
        )
        for k, g, v, h in pairs
        for b in (1, 8)
        for n in (512, 32768)
    )
    return latency.Table("another card", 2, 1, 64, {}, cells).save()


def test_a_search_for_latency_without_a_table_names_the_command(kv: Any, words: list[str]) -> None:
    said = kv(*words, "--objective", "latency,accuracy")
    assert said.code == 7
    assert "kvtune bench kernels --table --heads 2/1/64" in said.told


def test_every_proved_point_keeps_to_the_limits_on_all_objectives(
    kv: Any, words: list[str], table: Path, home: Path
) -> None:
    limits = ["--min-ratio", "2", "--max-kl", "0.5", "--max-latency", "23us", "--max-bytes", "1MB"]
    out = home / "run"
    asked = ["--objective", "latency,memory,accuracy", "--latency-table", table, "-o", out]
    found = kv.json(*words, *asked, *limits, "--trials", "30")
    assert found["ok"], found["error"]
    data = found["data"]
    assert data["points"] and data["dense"]["latency"] > 0
    for point in data["points"]:
        assert point["ratio"] >= 2
        assert point["held_out_kl"] <= 0.5
        assert point["latency"] <= 23
        assert point["bytes"] <= 1e6
    assert data["search"]["constraints"].keys() == {
        "max_bytes", "max_kl", "max_latency", "min_ratio",
    }  # fmt: skip
    rows = json.loads((out / "trials.json").read_text())["rows"]
    assert any(row["state"] == "complete" and row["latency"] <= 23 for row in rows)


@pytest.mark.parametrize("alone", ["accuracy", "memory", "latency"])
def test_one_objective_within_a_limit_is_a_search_too(
    alone: str, kv: Any, words: list[str], table: Path, home: Path
) -> None:
    limit = ["--min-ratio", "3"] if alone == "accuracy" else ["--max-kl", "0.5"]
    asked = ["--objective", alone, "--latency-table", table, "-o", home / "run"]
    found = kv.json(*words, *asked, *limit, "--trials", "4")
    assert found["ok"], found["error"]
    assert found["data"]["search"]["objectives"] == [alone]


def test_limits_that_nothing_keeps_to_are_refused_in_words(
    kv: Any, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a run folder without a name goes
    said = kv(*words, "--max-bytes", "1kB")
    assert said.code == 2
    assert "max_bytes" in said.told


@pytest.mark.parametrize(
    "wrong", [("--max-bytes", "many"), ("--max-latency", "soon"), ("--objective", "speed")], ids=str
)
def test_a_malformed_limit_is_a_usage_error(
    wrong: tuple[str, str], kv: Any, words: list[str]
) -> None:
    assert kv(*words, *wrong).code == 2
