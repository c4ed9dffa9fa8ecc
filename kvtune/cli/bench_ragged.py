"""kvtune bench ragged: attention to heads that keep unequal shares, against all their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import USUAL_HEADS, File, Heads, counts, write
from kvtune.cli.output import Output
from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.bench.ragged import Timing

Batch = Annotated[int, typer.Option(min=1, help="Rows, one query each.")]
Context = Annotated[
    int,
    typer.Option(
        "--context", parser=amounts.tokens, metavar="TOKENS", help="Tokens of a row, all of them."
    ),
]
Bits = Annotated[str, typer.Option(metavar="N,...", help="Of kept tokens: 16, 8, 4 or 2.")]
Shares = Annotated[
    str, typer.Option("--keep", metavar="%,...", help="Kept of the tokens, mean over heads.")
]
Spread = Annotated[
    str,
    typer.Option(metavar="LOW,HIGH", help="The shortest and the longest head, in mean lengths."),
]
Seed = Annotated[int, typer.Option(help="Of the lengths that are drawn.")]


def ragged(
    out: Output,
    batch: Batch = 8,
    context: Context = 32768,
    heads: Heads = USUAL_HEADS,
    bits: Bits = "16,8,4,2",
    keep: Shares = "50,25,10",
    spread: Spread = "0.25,2.5",
    seed: Seed = 0,
    output: File = None,
) -> None:
    """Time attention to kept tokens whose number differs from head to head, against all tokens."""
    from dataclasses import replace

    from kvtune.bench import ragged as work
    from kvtune.bench.cases import parse_heads
    from kvtune.bench.clock import machine
    from kvtune.bench.kernels import Lab, check_device

    wanted = counts("--bits", bits)
    if odd := set(wanted) - {16, 8, 4, 2}:
        raise UsageError(f"{min(odd)} bits are none of 16, 8, 4, 2.", "Write --bits 16,4.")
    shares = [_share(word) for word in keep.split(",")]
    shape = replace(parse_heads(heads), batch=batch, context=context)
    ends = _spread(spread)
    device = check_device()
    lab, ran_on, found = Lab(device), machine(device), []
    for number in wanted:
        cases = [work.Case(shape, number, share, ends, seed) for share in shares]
        for one in work.time(lab, shape, number, cases):
            found.append(one)
            out.say("ragged", len(found), len(wanted) * (1 + len(shares)))
    out.data |= {"rows": [one.table() for one in found], "copy_rate": lab.copy_rate, **ran_on}
    goals = [one.met for one in found if one.met is not None]
    said = f"{work.QUARTER:.0%} of the tokens at least {work.GOAL:g}x faster than all"
    out.print(
        _table(found),
        f"B={batch}, {context} tokens, heads {heads}; one layer, merge included, cold L2; device "
        f"copy {lab.copy_rate / 1e12:.2f} TB/s; {said}: {_told(goals)}; "
        f"{', '.join(ran_on.values())}",
    )
    write(output, out)


def _told(goals: list[bool]) -> str:
    if not goals:
        return "not measured"
    return f"met in {sum(goals)} of {len(goals)}"


def _share(word: str) -> float:
    """Reads 25 or 25%."""
    try:
        share = float(word.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(f"{word!r} is no share for --keep.", "Write --keep 50,25,10.")
    return share


def _spread(words: str) -> tuple[float, float]:
    """Reads 0.25,2.5."""
    try:
        low, high = map(float, words.split(","))
    except ValueError:
        low, high = 0.0, 0.0
    if not 0 < low <= high:
        raise UsageError(f"{words!r} is no --spread.", "Write --spread 0.25,2.5.")
    return low, high


def _table(found: list[Timing]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    names = ("kept", "us", "of floor", "to all", "to bf16", "MB", "over heads' sum", "error")
    for column in names:
        table.add_column(column, justify="left" if column == "kept" else "right")
    for one in found:
        equal = one.rectangle_microseconds
        if one.case.share >= 1 and equal is not None:
            name, bf16 = f"{one.case.bits} bits, all, equal lengths", one.dense_microseconds / equal
            table.add_row(name, f"{equal:.1f}", "", "", f"{bf16:.2f}x", "", "", "")
        table.add_row(
            one.case.name,
            f"{one.microseconds:.1f}",
            f"{one.floor_share:.0%}",
            f"{one.ratio:.2f}x",
            f"{one.dense_ratio:.2f}x",
            f"{one.stored / 1e6:.1f}",
            f"{one.stored / one.head_bytes - 1:.3%}",
            f"{one.error:.5f}",
        )
    if found:
        table.add_row("bf16, all", f"{found[0].dense_microseconds:.1f}", *[""] * 6)
    return table


VERBS: dict[str, Callable[..., None]] = {"ragged": ragged}
