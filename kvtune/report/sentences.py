"""What a run found, in sentences that a reader can repeat."""

from __future__ import annotations

from kvtune.cli.amounts import size
from kvtune.report.folder import Run
from kvtune.report.numbers import interval, percent, significant
from kvtune.report.records import Point


def headline(run: Run) -> str:
    """One sentence: how many times smaller, at which KL."""
    point = run.chosen
    if point is None:
        return f"{run.model or 'The model'} is measured; no recipe has been searched for yet."
    return (
        f"With the chosen recipe the KV cache of {run.model or 'the model'} is {point.ratio:.2f} "
        f"times smaller than at 16 bits, at a KL of {significant(point.kl)} nats "
        f"(95 % interval {interval(point.kl_low, point.kl_high)}) on text the search never saw."
    )


def plainly(point: Point) -> str:
    """The same in bytes and tokens."""
    return (
        f"{point.bytes_context:,} tokens take {size(point.bytes)} instead of "
        f"{size(point.bytes * point.ratio)}, and {percent(point.flips)} of next-token "
        "choices differ."
    )


def uniform_rival(point: Point) -> str:
    """How the point stands against the best uniform recipe of no more bytes; empty if unknown."""
    rival = point.best_uniform_kl
    if rival is None or point.held_out_kl <= 0 or rival <= point.held_out_kl:
        return ""
    return (
        "The best recipe that treats all layers alike, at no more bytes, has a KL "
        f"{rival / point.held_out_kl:.1f} times as large."
    )
