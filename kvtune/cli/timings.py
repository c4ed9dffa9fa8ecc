"""Timings as people read them: what was measured, what it should be, and the tables of both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts

if TYPE_CHECKING:
    from kvtune.bench.cases import Goal
    from kvtune.bench.decode import Run
    from kvtune.bench.kernels import Timing, Verdict
    from kvtune.bench.ranks import Compared

SHOWN = {
    "microseconds": "{:.1f} us",
    "ratio": "{:.2f}x bf16",
    "floor_share": "{:.0%} of floor",
    "speedup": "{:.2f}x the 4-bit speed",
    "floor_multiple": "{:.2f}x floor",
    "allocated": "{:.0f} bytes allocated",
    "captured": "CUDA graph {:.0f}",
    "error_ratio": "{:.2f}x bf16's error",
    "batch_ratio": "{:.2f}x the dense batch",
    "speed_ratio_largest": "{:.2f}x the dense tokens/s at the largest batch",
    "speed_ratio_one": "{:.2f}x the dense tokens/s at batch 1",
}


def spelled(what: str, value: float) -> str:
    """A measured number with its unit."""
    return SHOWN[what].format(value)


def goals(wanted: Iterable[Goal]) -> str:
    """What has to be reached."""
    words = []
    for goal in wanted:
        words.append(f"at {'most' if goal.at_most else 'least'} {spelled(goal.what, goal.limit)}")
    return ", ".join(words)


def verdict(found: Verdict) -> str:
    """A row of the acceptance table in one line."""
    return (
        f"row {found.number}, {found.name}: {measured(found)}; {goals(found.goals)}; {met(found)}"
    )


def measured(found: Verdict) -> str:
    """What a row came to, or why it did not."""
    if found.failed:
        return found.failed
    return ", ".join(spelled(what, value) for what, value in found.measured.items())


def met(found: Verdict) -> str:
    """Whether all goals are reached."""
    return "met" if found.met else "not met"


def verdicts(found: Iterable[Verdict]) -> Table:
    """The acceptance table."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("row", "case", "target", "measured", ""):
        table.add_column(column)
    for one in found:
        table.add_row(str(one.number), one.name, goals(one.goals), measured(one), met(one))
    return table


def cases(found: Iterable[Timing]) -> Table:
    """Every case that was timed."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("case", "us", "of floor", "bf16 us", "", "ratio", "error", "bf16 error"):
        table.add_column(column, justify="left" if column in ("case", "") else "right")
    for one in found:
        table.add_row(
            one.case.name,
            f"{one.microseconds:.1f}",
            f"{one.floor_share:.0%}",
            f"{one.dense_microseconds:.1f}",
            one.dense_by,
            f"{one.ratio:.2f}x",
            f"{one.error:.5f}",
            f"{one.dense_error:.5f}",
        )
    return table


def ranks(found: Iterable[Compared]) -> Table:
    """Low-rank keys beside bits."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("rank", "batch", "tokens", "us", "keys and values in bits"):
        table.add_column(column, justify="left" if column.startswith("keys") else "right")
    for one in found:
        place = (str(one.rank), str(one.batch), f"{one.context:,}")
        table.add_row(*place, f"{one.microseconds:.1f}", one.said)
    return table


def runs(found: Iterable[Run]) -> Table:
    """Every decoding that was timed."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("cache", "batch", "tokens/s", "cache size", "peak memory"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for run in found:
        batch = f"{run.batch} (largest)" if run.largest else str(run.batch)
        peak = "" if run.peak_bytes is None else amounts.size(run.peak_bytes)
        rate = f"{run.tokens_per_second:,.1f}"
        table.add_row(run.cache, batch, rate, amounts.size(run.cache_bytes), peak)
    return table
