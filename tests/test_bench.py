"""Laws of the bench of kernels: byte floors, the acceptance table, errors and verdicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvtune_kernels import Format, Packed, Workspace

from kvtune.bench.cases import (
    ACCEPTANCE,
    LONG,
    Case,
    Goal,
    Row,
    Shape,
    grid,
    pair,
    parse_formats,
    parse_heads,
    side_bytes,
)
from kvtune.bench.clock import Clock, copy_rate
from kvtune.bench.kernels import Lab, Timing, finite, judge
from kvtune.bench.store import Store, errors
from kvtune.cli import timings
from kvtune.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab() -> Lab:
    """A lab on the CPU that hurries."""
    torch.set_num_threads(1)
    return Lab(CPU, seconds=1e-4, copied=1 << 16)


def test_the_table_has_the_rows_and_limits_of_the_issue() -> None:
    goals = [(row.number, goal.what, goal.limit) for row in ACCEPTANCE for goal in row.goals]
    assert goals == [
        (1, "ratio", 3),
        (1, "floor_share", 0.8),
        (2, "ratio", 2.5),
        (3, "ratio", 1.75),
        (4, "ratio", 3.6),
        (4, "speedup", 1),
        (5, "speedup", 1),
        (6, "ratio", 2.8),
        (7, "ratio", 2.8),
        (7, "ratio", 2.4),
        (7, "ratio", 2.7),
        (8, "ratio", 1),
        (9, "ratio", 1),
        (9, "error_ratio", 2),
        (10, "floor_multiple", 1.4),
        (11, "microseconds", 4),
        (11, "allocated", 0),
        (11, "captured", 1),
        (13, "error_ratio", 2),
    ]


def rows(number: int) -> list[Case]:
    return [case for row in ACCEPTANCE if row.number == number for case in row.cases]


def test_the_first_rows_are_of_eight_long_contexts() -> None:
    for number, bits, group in ((1, 4, 128), (2, 4, 32), (3, 8, 128), (4, 2, 32), (5, 3, 64)):
        (case,) = rows(number)
        assert case == Case(Format(bits, group, False), Format(bits, group, True), LONG)
    shapes = [(case.shape.batch, case.shape.context) for case in rows(7)]
    assert shapes == [(1, 128 << 10), (32, 4 << 10), (64, 8 << 10)]


def test_the_mixed_row_has_a_mean_of_three_and_a_quarter_bits() -> None:
    (row,) = (row for row in ACCEPTANCE if row.number == 6)
    assert sum(row.layers) == 32
    bits = [(case.keys.bits + case.values.bits) / 2 for case in row.cases]
    assert sum(map(math.prod, zip(bits, row.layers, strict=True))) / 32 == 3.25


def test_the_short_row_has_every_width_at_every_length() -> None:
    found = {(case.keys.bits, case.shape.batch, case.shape.context) for case in rows(8)}
    assert found == {(bits, 1, n << 10) for bits in (2, 3, 4, 8) for n in (2, 4, 8)}


def test_the_odd_row_has_every_shape_of_the_issue() -> None:
    shapes = [case.shape for case in rows(9)]
    assert {(s.head_dim, s.heads, s.kv_heads) for s in shapes} >= {(64, 9, 3), (256, 4, 1)}
    assert {s.heads // s.kv_heads for s in shapes if s.head_dim == 128} >= {1, 4, 7, 8}
    assert any(s.context % 2 for s in shapes) and any(s.ragged for s in shapes)
    assert all(s.context >= 16384 for s in shapes)


@pytest.mark.parametrize("row", ACCEPTANCE, ids=lambda row: f"{row.number}-{row.name}")
def test_every_row_runs_on_a_cpu_and_measures_what_it_is_judged_by(
    row: Row, lab: Lab, tiny_row: Any
) -> None:
    (found,) = judge(lab, [tiny_row(row)])
    assert not found.failed
    assert {goal.what for goal in row.goals} <= found.measured.keys()
    assert all(math.isfinite(value) for value in found.measured.values())
    assert json.dumps(found.table(), allow_nan=False)
    assert timings.verdict(found) and timings.goals(row.goals)


@pytest.mark.parametrize("large", dict.fromkeys(rows(8) + rows(9)), ids=lambda large: large.name)
def test_attention_to_a_random_store_is_as_exact_as_flash(
    large: Case, lab: Lab, tiny_case: Any
) -> None:
    timing = lab.attention(tiny_case(large))
    assert 0 < timing.error < 0.01 and 0 < timing.dense_error < 0.01
    assert timing.error_ratio < 2
    assert timing.table()["ratio"] == timing.dense_microseconds / timing.microseconds


def test_a_random_store_has_values_of_about_one_in_every_format(tiny_case: Any) -> None:
    for case in dict.fromkeys(rows(8)):
        keys, values = Store.random(tiny_case(case), CPU).dense(0)
        for side in (keys, values):
            assert side.shape[2] == tiny_case(case).shape.context
            assert 0.8 < side.std() < 1.2 and abs(side.mean()) < 0.1


def test_a_wrong_answer_has_a_large_error(tiny_case: Any) -> None:
    store = Store.random(tiny_case(pair(4, 128, LONG)), CPU)
    out = store.attend(Workspace())
    assert errors(store, out)[0] < 0.01 < 0.5 < errors(store, out.roll(1, 1))[0]


def test_a_ragged_batch_grows_to_the_context() -> None:
    assert Shape(4, 1000, ragged=True).lengths() == [250, 500, 750, 1000]
    assert Shape(2, 1000).lengths() == [1000, 1000]


@pytest.mark.parametrize("large", dict.fromkeys(rows(8) + rows(9)), ids=lambda large: large.name)
def test_the_byte_floor_is_what_the_store_holds(large: Case, tiny_case: Any) -> None:
    small = tiny_case(large)
    store, held = Store.random(small, CPU), 0
    for row, (length, paged) in enumerate(zip(small.shape.lengths(), small.paged(), strict=True)):
        for side in (store.keys, store.values):
            page = side.codes[row, :, : paged // 64]
            line = paged // (64 if side.format.per_token else side.format.group)
            held += page.nbytes + side.meta[row, :, :line].nbytes
        held += sum(x[row, :, : length - paged].nbytes for x in store.exact[:2])
    assert held == small.floor_bytes()


@pytest.mark.parametrize(
    "format",
    [
        *(Format(3, 64, False), Format(4, 32, True), Format(8, 128, True)),
        *(Format(2, 64, False, 144), Format(3, 32, True, 0, True)),
    ],
)
def test_a_side_weighs_what_is_allocated_for_it(format: Format) -> None:
    empty = Packed.empty(format, 1, 1, 256, 128, CPU)
    assert side_bytes(format, 256, 128) == empty.codes.nbytes + empty.meta.nbytes


def test_ratios_and_shares_are_of_the_times() -> None:
    timing = Timing(pair(4, 128, LONG), 100.0, 300.0, "flash", 80.0, 0.003, 0.002, True)
    assert (timing.ratio, timing.floor_share) == (3.0, 0.8)
    assert timing.error_ratio == pytest.approx(1.5)
    assert timing.table()["name"] == "k4g128v4g128 B=8 N=32768"


class Told(Lab):
    """A lab whose times are told to it."""

    def __init__(self, **times: float) -> None:
        self.times, self.timings = times, {}

    def attention(self, case: Case) -> Timing:
        """Times by the bits of the keys and values."""
        took = self.times[f"k{case.keys.bits}v{case.values.bits}"]
        return Timing(case, took, 360.0, "flash", 90.0, 0.001, 0.001, True)


def test_a_mixed_row_weighs_its_cases_by_their_layers() -> None:
    (row,) = (row for row in ACCEPTANCE if row.number == 6)
    (found,) = judge(Told(k4v4=120.0, k4v2=100.0, k3v3=110.0), [row])
    assert found.measured["microseconds"] == pytest.approx((8 * 120 + 16 * 100 + 8 * 110) / 32)
    assert found.measured["ratio"] == pytest.approx(360 / 107.5)
    assert found.met


def test_a_row_is_judged_by_its_worst_case_and_its_rival() -> None:
    cases = (pair(2, 32, LONG), pair(3, 64, LONG))
    row = Row(4, "", (Goal("ratio", 3), Goal("speedup", 1)), cases, rival=pair(4, 32, LONG))
    (found,) = judge(Told(k2v2=90.0, k3v3=125.0, k4v4=120.0), [row])
    assert found.measured["ratio"] == 360 / 125 and found.measured["speedup"] == 120 / 125
    assert not found.met


def test_a_row_that_fails_does_not_take_the_others_with_it() -> None:
    row = Row(1, "", (Goal("ratio", 3),), (pair(4, 128, LONG),))
    bad, good = judge(Told(k4v4=100.0), [replace(row, cases=(pair(8, 128, LONG),)), row])
    assert bad.failed.startswith("KeyError") and not bad.met and good.met


def test_numbers_that_json_does_not_know_are_none() -> None:
    assert finite({"a": math.nan, "b": math.inf, "c": 1.5, "d": 2}) == {
        "a": None,
        "b": None,
        "c": 1.5,
        "d": 2,
    }
    assert not Goal("error_ratio", 2, at_most=True).met(math.nan)


def test_a_clock_runs_the_preparation_before_every_repetition() -> None:
    calls: list[str] = []
    took = Clock(CPU, 1e-4).measure(lambda: calls.append("work"), lambda: calls.append("before"))
    assert took.microseconds >= 0 and not took.captured
    pairs = calls[1:]  # the first call warms up
    assert pairs == ["before", "work"] * (took.repeats + 3)
    assert copy_rate(Clock(CPU, 1e-4), 1 << 16) > 0


@pytest.mark.parametrize(
    ("word", "keys", "values"),
    [
        ("k4v2", Format(4, 128, False), Format(2, 128, True)),
        ("K3g64v8g32", Format(3, 64, False), Format(8, 32, True)),
        ("k2.25pv2s", Format(2, 128, False, 144), Format(2, 128, True, 0, True)),
        ("k4pg64v3sg64", Format(2, 64, False, 256), Format(3, 64, True, 0, True)),
    ],
)
def test_formats_are_read_as_people_write_them(word: str, keys: Format, values: Format) -> None:
    case = parse_formats(word, LONG)
    assert case == Case(keys, values, LONG)
    assert parse_formats(case.name.split()[0], LONG) == case


@pytest.mark.parametrize(
    "word",
    ["k5v4", "k4", "k4g48v4", "k4v4g48", "", "k4v4 g32", "k2.1pv2", "k9pv2", "k0pv2", "k4v8s"],
)
def test_wrong_formats_are_refused(word: str) -> None:
    with pytest.raises(UsageError):
        parse_formats(word, LONG)


def test_head_shapes_are_read_and_refused() -> None:
    assert parse_heads("9/3/64") == Shape(1, 1, 9, 3, 64)
    for wrong in ("9/3", "9/2/64", "a/b/c", "0/1/64"):
        with pytest.raises(UsageError):
            parse_heads(wrong)


def test_a_grid_has_every_format_at_every_shape() -> None:
    found = grid(["k4v4", "k2v2"], [1, 8], [4096, 8192], parse_heads("9/3/64"))
    assert len(set(found)) == 8
    assert {case.values.group for case in found} == {64}
