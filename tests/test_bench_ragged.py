"""Laws of the bench of ragged heads: what is drawn, counted, timed and said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import torch

from kvtune.bench import ragged
from kvtune.bench.cases import Shape
from kvtune.bench.kernels import Lab
from kvtune.errors import UsageError

CPU = torch.device("cpu")
SMALL = Shape(2, 320, 4, 2, 16)
LARGE = Shape(8, 32768)
kv = TINY.kv


def lab() -> Lab:
    return Lab(CPU, seconds=1e-4, copied=1 << 16)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_lengths_have_the_mean_that_was_asked_for(share: float, seed: int) -> None:
    """And none is longer than the context; less than all are uneven, and the same each time."""
    case = ragged.Case(LARGE, 4, share, seed=seed)
    lengths = case.lengths()
    assert lengths.shape == (8, 8) and int(lengths.max()) <= LARGE.context
    assert float(lengths.double().mean()) == pytest.approx(share * LARGE.context, rel=1e-3)
    assert torch.equal(lengths, case.lengths())
    if share < 1:
        assert int(lengths.max()) > 1.3 * int(lengths.min())
        even = replace(case, spread=(1.0, 1.0)).lengths()
        assert int(even.max()) == int(even.min())


def test_heads_are_as_uneven_as_the_spread_says() -> None:
    lengths = ragged.Case(LARGE, 4, 0.1).lengths().double()
    assert 5 < float(lengths.max() / lengths.min()) <= 10


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_every_case_is_timed_and_exact_where_its_twin_runs(bits: int) -> None:
    cases = [ragged.Case(SMALL, bits, share) for share in (0.5, 0.25)]
    full, half, quarter = ragged.time(lab(), SMALL, bits, cases)
    assert (full.met, half.met) == (None, None) and isinstance(quarter.met, bool)
    for one in (full, half, quarter):
        assert one.error == 0 and one.full_microseconds == full.microseconds
        assert (one.rectangle_microseconds is None) == (bits == 16)
        # the tables of where each head lies come on top
        assert one.stored == one.head_bytes + 2 * 16 * 2 * 2
        json.dumps(one.table(), allow_nan=False)
    assert full.head_bytes > half.head_bytes > quarter.head_bytes


def test_a_floor_counts_each_byte_that_has_to_move() -> None:
    """64 heads of 32,768 tokens in 16 bits: 1.07 GB; 4 bits are a quarter, and scales and zeros."""
    heads, window = 64, 68 * 4 * 128
    sixteen, four = (ragged.Case(LARGE, bits) for bits in (16, 4))
    assert sixteen.head_bytes() == heads * 32768 * 128 * 4
    assert four.head_bytes() == heads * (32768 * 128 + 2 * 32768 * 4)
    assert four.floor_bytes() == four.head_bytes() + heads * window


def test_a_quarter_is_compared_with_the_faster_of_both_kernels() -> None:
    case = ragged.Case(SMALL, 4, 0.25)
    one = ragged.Timing(case, 10.0, 31.0, 29.0, 90.0, 5.0, 1, 1, 1, 0.0, True)
    assert one.ratio == pytest.approx(2.9) and one.met is False
    assert replace(one, rectangle_microseconds=None).met is True
    assert one.dense_ratio == pytest.approx(9) and one.floor_share == pytest.approx(0.5)


def test_the_bench_of_ragged_heads_is_told_in_a_table_and_json(
    kv: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvtune.bench.kernels.check_device", lambda: CPU)
    monkeypatch.setattr("kvtune.bench.kernels.Lab", lambda device: lab())
    words = ("bench", "ragged", "--batch", "1", "--context", "192", "--heads", "4/2/16")
    words = (*words, "--bits", "16,4", "--keep", "25%")
    found = kv.json(*words, "-o", tmp_path / "found.json")["data"]
    assert [(row["bits"], row["share"]) for row in found["rows"]] == [
        (16, 1.0), (16, 0.25), (4, 1.0), (4, 0.25)
    ]  # fmt: skip
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == found["rows"]
    told = kv(*words).out
    assert "4 bits, all, equal lengths" in told and "of 2" in told
    for odd in (("--bits", "3"), ("--keep", "0"), ("--keep", "x"), ("--spread", "2,1")):
        assert kv(*words, *odd).code == UsageError.exit_code
