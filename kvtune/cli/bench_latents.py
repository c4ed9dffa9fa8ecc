"""kvtune bench latents: attention to low-rank keys, against its floor and against bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import File, counts, write
from kvtune.cli.output import Output
from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.bench.latents import Rival, Timing

Context = Annotated[
    int,
    typer.Option(
        "--context", parser=amounts.tokens, metavar="TOKENS", help="What tokens are selected from."
    ),
]
Selected = Annotated[
    int,
    typer.Option("--tokens", parser=amounts.tokens, metavar="TOKENS", help="Read by each head."),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows that read selected tokens.")]
Rank = Annotated[int, typer.Option(min=16, help="Of the keys whose tokens are selected.")]
Ranks = Annotated[str, typer.Option(metavar="N,...", help="Ranks of which all tokens are read.")]
Places = Annotated[
    str, typer.Option("--dense", metavar="BxN", help="Rows and tokens, of which all are read.")
]


def latents(
    out: Output,
    context: Context = 122880,
    tokens: Selected = 2048,
    batch: Batch = 24,
    rank: Rank = 160,
    ranks: Ranks = "32,64,128,160,256",
    place: Places = "8x32k",
    output: File = None,
) -> None:
    """Time attention that makes keys from latents on the way, of selected tokens and of all."""
    from kvtune.bench import latents as work
    from kvtune.bench.cases import Shape
    from kvtune.bench.clock import machine
    from kvtune.bench.kernels import Lab, check_device

    rows, _, length = place.partition("x")
    if not rows.isdigit() or not length:
        raise UsageError(f"{place!r} is no shape for --dense.", "Write --dense 8x32k.")
    if tokens % work.CHUNK or tokens > context:
        what = f"{tokens} tokens are not whole chunks of {work.CHUNK} within {context}."
        raise UsageError(what, "Write --tokens 2048 --context 120k.")
    shape = Shape(int(rows), amounts.tokens(length))
    wanted = work.selected(context, rank, tokens, batch)
    wanted += work.dense(shape, tuple(counts("--ranks", ranks)))
    device = check_device()
    lab, ran_on, found = Lab(device), machine(device), []
    for done, case in enumerate(wanted):
        out.say("latents", done, len(wanted))
        found.append(work.time(lab, case))
    others = work.rivals(lab, shape)
    out.data |= {"rows": [one.table() for one in found], "copy_rate": lab.copy_rate}
    out.data |= {"rivals": [asdict(one) for one in others], **ran_on}
    out.print(
        _table(found, others),
        f"device copy {lab.copy_rate / 1e12:.2f} TB/s; one layer, merge included, cold L2; a floor "
        "counts latents once for each head that selects its own tokens, and the values it reads; "
        f"rank {rank} at most {work.GOAL:.0f} us: {'met' if found[0].met else 'not met'}; "
        f"{', '.join(ran_on.values())}",
    )
    write(output, out)


def _table(found: list[Timing], others: list[Rival]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("case", "us", "floor us", "of floor", "error"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for one in found:
        table.add_row(
            one.case.name,
            f"{one.microseconds:.1f}",
            f"{one.floor_microseconds:.1f}",
            f"{one.floor_share:.0%}",
            f"{one.error:.5f}",
        )
    for rival in others:
        table.add_row(rival.name, f"{rival.microseconds:.1f}", "", "", "")
    return table


VERBS: dict[str, Callable[..., None]] = {"latents": latents}
