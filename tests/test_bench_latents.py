"""Laws of the benches of low rank: what is read and counted, what is said, when bits are faster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli_tiny as TINY
import pytest
import torch
from kvtune_kernels import Format

from kvtune.bench import basis, latency, latents, ranks
from kvtune.bench.cases import Shape
from kvtune.bench.kernels import Lab
from kvtune.errors import MissingInputError, UsageError

CPU = torch.device("cpu")
TINY_SHAPE = Shape(3, 64, 4, 2, 16)
kv = TINY.kv


def lab() -> Lab:
    return Lab(CPU, seconds=1e-4, copied=1 << 16)


@pytest.mark.parametrize("values", ["16 bits", "8 bits", "none", "latents"])
@pytest.mark.parametrize("reads", ["own", "shared", "all"])
def test_every_case_is_timed_and_exact_where_its_twin_runs(
    reads: latents.Reads, values: latents.Values
) -> None:
    case = latents.Case(TINY_SHAPE, 16, reads, 0 if reads == "all" else 24, values)
    timing = latents.time(lab(), case)
    assert timing.microseconds > 0 and timing.floor_microseconds > 0
    assert timing.error == 0
    json.dumps(timing.table(), allow_nan=False)


def test_heads_select_whole_chunks_of_their_own_or_alike() -> None:
    own = latents.arguments(latents.Case(TINY_SHAPE, 16, "own", 24), CPU)["index"]
    assert own.shape == (3, 2, 24)
    chunks = own.unflatten(-1, (-1, latents.CHUNK))
    assert (chunks.diff(dim=-1) == 1).all() and (chunks[..., 0] % latents.CHUNK == 0).all()
    assert not torch.equal(own[:, 0], own[:, 1])
    alike = latents.arguments(latents.Case(TINY_SHAPE, 16, "shared", 24), CPU)["index"]
    assert torch.equal(alike[:, 0], alike[:, 1])


def test_a_floor_counts_each_byte_that_has_to_move() -> None:
    """24 rows of 2,048 tokens a head at rank 160: 126 MB of latents, 101 MB of values."""
    own, eight, shared, alone, every = latents.selected(32768)
    keys, values = 24 * 8 * 2048 * 160 * 2, 24 * 8 * 2048 * 128 * 2
    assert own.floor_bytes() == keys + values and alone.floor_bytes() == keys
    assert shared.floor_bytes() == every.floor_bytes() == keys // 8 + values
    assert eight.floor_bytes() == keys + values // 2 + 24 * 8 * 2048 * 2
    absorbed = replace(every, values="latents")
    assert absorbed.floor_bytes() == 2 * (keys // 8)


def table(*cells: tuple[int, int, int, float]) -> latency.Table:
    """Keys and values of b bits take 10 b us, 16 bits 160 us, at any length."""
    bits = tuple(
        latency.Cell(Format(b, 64, False), Format(b, 128, True), batch, context, 10.0 * b, 160.0)
        for b in (2, 3, 4, 8)
        for batch in (1, 8)
        for context in (4096, 32768)
    )
    known = tuple(latency.RankCell(*cell) for cell in cells)
    return latency.Table("H100", 32, 8, 128, {}, bits, ranks=known)


@pytest.mark.parametrize(
    ("took", "said"),
    [
        (17.9, ["faster"] * 5),
        (18.1, ["equal", *["faster"] * 4]),
        (21.9, ["equal", *["faster"] * 4]),
        (40.0, ["slower", "slower", "equal", "faster", "faster"]),
        (200.0, ["slower"] * 5),
    ],
)
def test_low_rank_is_faster_equal_or_slower_than_bits(took: float, said: list[str]) -> None:
    known = table((160, 8, 32768, took))
    found = [ranks.against_bits(known, 160, bits, 8, 32768) for bits in (2, 3, 4, 8, 16)]
    assert found == said
    (row,) = ranks.rule(known)
    assert [*row.bits.values(), row.dense] == said
    assert f"{said[-1]} than 16 bits" in row.said


def test_between_ranks_and_lengths_times_are_interpolated() -> None:
    known = table((64, 8, 4096, 20), (256, 8, 4096, 80), (64, 8, 32768, 160), (256, 8, 32768, 640))
    assert ranks.of_rank(known, 128, 8, 4096) == pytest.approx(40)
    assert ranks.of_rank(known, 128, 8, 11585) == pytest.approx(113.1, rel=1e-3)


def test_a_table_from_before_says_what_to_measure() -> None:
    with pytest.raises(MissingInputError, match="no low ranks"):
        ranks.against_bits(table(), 160, 4, 8, 32768)


def test_tables_keep_their_ranks_and_old_ones_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    made = table((64, 8, 4096, 20.0), (256, 8, 4096, 80.0))
    saved = made.save()
    assert latency.load("H100", 32, 8, 128) == made
    held = json.loads(saved.read_text())
    del held["ranks"]
    saved.write_text(json.dumps(held))
    assert latency.load("H100", 32, 8, 128) == replace(made, ranks=())


def test_the_bench_of_latents_is_told_in_a_table_and_json(
    kv: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvtune.bench.kernels.check_device", lambda: CPU)
    monkeypatch.setattr("kvtune.bench.kernels.Lab", lambda device: lab())
    words = ("bench", "latents", "--context", "64", "--tokens", "16", "--batch", "1")
    words = (*words, "--rank", "16", "--ranks", "16", "--dense", "1x160")
    found = kv.json(*words, "-o", tmp_path / "found.json")["data"]
    assert len(found["rows"]) == 8 and len(found["rivals"]) == 3
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == found["rows"]
    assert "absorbed" in kv(*words).out
    assert kv(*words[:-1], "8").code == UsageError.exit_code
    assert kv(*words, "--tokens", "20").code == UsageError.exit_code


def test_the_bench_of_bases_is_told_beside_the_prefill(kv: Any, tmp_path: Path) -> None:
    model = TINY.tiny(tmp_path / "model")
    words = ("bench", "basis", "--model", model, "--device", "cpu", "--context", "96")
    words = (*words, "--group", "2", "--key-rank", "8", "--value-rank", "12")
    found = kv.json(*words)["data"]
    assert found["seconds"] == pytest.approx(found["gram"] + found["top"] + found["project"])
    assert found["share"] == pytest.approx(found["seconds"] / found["prefill"])
    assert found["kept"] == pytest.approx(1, abs=1e-4)
    assert "of the prefill" in kv(*words).out
    assert kv(*words, "--key-rank", "999").code == UsageError.exit_code


def test_groups_of_layers_are_counted_whole() -> None:
    assert basis.Shape(layers=30, group=4).groups == 8
