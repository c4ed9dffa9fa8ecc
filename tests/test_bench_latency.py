"""Laws of the latency table: saved and read back, interpolated, put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kvtune_kernels import Format

from kvtune.bench import latency
from kvtune.bench.cases import (
    Shape,
    pair,
    parse_formats,
    parse_heads,
)
from kvtune.bench.clock import machine
from kvtune.bench.kernels import Lab
from kvtune.errors import IntegrityError, MissingInputError

CPU = torch.device("cpu")


H100 = "NVIDIA H100 80GB HBM3"
USUAL = Format(4, 64, False), Format(4, 128, True)


def cell(
    batch: int, context: int, took: float, formats: tuple[Format, Format] = USUAL
) -> latency.Cell:
    return latency.Cell(*formats, batch, context, took, 3 * took)


def table(*cells: latency.Cell) -> latency.Table:
    return latency.Table(H100, 32, 8, 128, {"torch": "2.11"}, cells)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    return tmp_path


def test_a_latency_table_is_read_as_it_was_saved(home: Path) -> None:
    made = table(cell(1, 4096, 10.0), cell(8, 32768, 120.0))
    saved = made.save()
    assert saved == home / "latency" / "nvidia-h100-80gb-hbm3-32-8-128.json"
    assert latency.load(H100, 32, 8, 128) == made
    first = json.loads(saved.read_text())["cells"][0]
    assert first["keys"] == {"bits": 4, "group": 64, "axis": "channel"}
    assert first["values"] == {"bits": 4, "group": 128, "axis": "token"}


def test_a_table_that_is_not_there_is_named_with_the_command_that_makes_it(home: Path) -> None:
    with pytest.raises(MissingInputError) as raised:
        latency.load(H100, 9, 3, 64)
    assert "kvtune bench kernels --table --heads 9/3/64" in raised.value.hint


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"kvtune_latency": 2}', '{"kvtune_latency": 1, "cells": [{}]}']
)
def test_a_damaged_table_is_refused(home: Path, text: str) -> None:
    file = table().save()
    file.write_text(text)
    with pytest.raises(IntegrityError, match="damaged"):
        latency.load(H100, 32, 8, 128)


def test_between_contexts_and_batches_times_follow_a_power_law() -> None:
    made = table(
        cell(1, 4096, 10.0), cell(1, 16384, 40.0), cell(4, 4096, 40.0), cell(4, 16384, 160.0)
    )

    def at(batch: int, context: int) -> float:
        return latency.estimate(made, *USUAL, batch, context)

    assert at(1, 4096) == 10 and at(4, 16384) == 160
    assert at(1, 8192) == pytest.approx(20) and at(2, 8192) == pytest.approx(40)
    assert at(1, 1024) == 10  # launching costs as much
    assert at(1, 65536) == pytest.approx(160) and at(8, 16384) == pytest.approx(320)
    assert latency.dense(made, 1, 8192) == pytest.approx(60)


def test_formats_that_were_not_timed_are_put_together() -> None:
    two = Format(2, 64, False), Format(2, 128, True)
    made = table(
        cell(1, 4096, 10.0),
        cell(1, 4096, 6.0, two),
        cell(1, 4096, 11.0, (Format(4, 32, False), USUAL[1])),
        cell(1, 4096, 12.0, (USUAL[0], Format(4, 32, True))),
    )
    wanted = Format(2, 32, False), Format(2, 32, True)
    assert latency.estimate(made, *wanted, 1, 4096) == pytest.approx(6 * 1.1 * 1.2)
    with pytest.raises(MissingInputError, match="no times"):
        latency.estimate(made, Format(8, 64, False), USUAL[1], 1, 4096)
    with pytest.raises(MissingInputError, match="empty"):
        latency.dense(table(), 1, 4096)


@pytest.mark.parametrize("heads", ["32/8/128", "9/3/64", "4/1/256"])
def test_the_cells_of_a_table_tell_every_common_format(heads: str) -> None:
    shape = parse_heads(heads)
    cases = latency.cases(shape, [8], [4096, 32768])
    assert len(set(cases)) == len(cases) <= 52
    sized = (shape.heads, shape.kv_heads, shape.head_dim)
    cells = tuple(latency.Cell(c.keys, c.values, 8, c.shape.context, 9.0, 9.0) for c in cases)
    made = latency.Table(H100, *sized, {}, cells)
    for size in (2.0, 2.25, 3.0, 4.0, 5.0):
        planes = Format(2, 64, False, int(size * shape.head_dim / 2))
        for bits in (2, 3, 4):
            formats = planes, Format(bits, 32, True, 0, True)
            assert latency.estimate(made, *formats, 8, 9999) == pytest.approx(9, rel=4)
    groups = {group for group in (32, 64, 128) if group < shape.head_dim} | {shape.head_dim}
    for bits in latency.BITS:
        for keys in (32, 64, 128):
            for values in groups:
                formats = Format(bits, keys, False), Format(2, values, True)
                assert latency.estimate(made, *formats, 8, 9999) == pytest.approx(9, rel=4)


def test_planes_cost_what_more_of_them_do_and_values_their_share() -> None:
    two, three = (Format(bits, 128, True, 0, True) for bits in (2, 3))
    made = table(
        cell(1, 4096, 10.0, (Format(2, 128, False, 128), two)),
        cell(1, 4096, 12.0, (Format(2, 128, False, 128), three)),
        cell(1, 4096, 15.0, (Format(2, 128, False, 192), two)),
        cell(1, 4096, 11.0, (USUAL[0], Format(3, 128, True))),
    )

    def at(keys: Format, values: Format) -> float:
        return latency.estimate(made, keys, values, 1, 4096)

    assert at(Format(2, 64, False, 144), three) == pytest.approx(15 * 1.2)
    assert at(Format(2, 128, False, 384), two) == pytest.approx(30)
    assert at(USUAL[0], three) == 11  # as affine values of as many bits
    with pytest.raises(MissingInputError, match="no times"):
        latency.estimate(table(), Format(2, 128, False, 128), two, 1, 4096)


def test_a_table_is_measured_from_timings(home: Path) -> None:
    said: list[tuple[Any, ...]] = []
    lab = Lab(CPU, seconds=1e-4, copied=1 << 16)
    shape = Shape(1, 300, 4, 1)
    cases = [pair(bits, 64, shape, value_group=128) for bits in (4, 2)]
    cases.append(parse_formats("k2.25pv3s", shape))
    made = latency.measure(lab, cases, machine(CPU), lambda *words: said.append(words))
    assert [c.keys.channels for c in made.cells] == [0, 0, 144] and (made.heads, made.kv_heads) == (
        4,
        1,
    )
    assert said[-1] == ("latency table", 4, 4) and "device" not in made.versions
    assert [cell.rank for cell in made.ranks] == [64]
    made.save()
    assert latency.load(made.device, 4, 1, 128) == made
