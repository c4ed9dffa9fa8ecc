"""kvtune bench lowrank: what a rank costs by basis, metric, heads, centring and RoPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import File, write
from kvtune.cli.bench_codecs import Context, Data, Sequences
from kvtune.cli.options import Continuation, Model, Seed, Text, Where
from kvtune.cli.output import Output

if TYPE_CHECKING:
    from kvtune.bench.lowrank import Case, Cost

Ranks = Annotated[
    str, typer.Option(metavar="SHARE,...", help="Ranks as parts of the width, in 64ths.")
]
TITLES = {
    "heads": "Heads that share a basis (each prompt's own, metric kq)",
    "centre": "With the mean of the tokens taken away, and without",
    "rope": "Keys before and after RoPE",
}
Measured = Sequence[tuple["Case", "Cost"]]


def lowrank(
    out: Output,
    where: Where,
    model: Model = "demo",
    data: Data = "builtin",
    sequences: Sequences = 2,
    context: Context = 2048,
    continuation: Continuation = 64,
    ranks: Ranks = "0.25,0.375,0.5,0.75",
    seed: Seed = 0,
    output: File = None,
) -> None:
    """Measure projections of MODEL's keys and values on held-out text, in 16 bits.

    A calibrated basis beside each prompt's own at equal rank, in four metrics; heads apart and
    together at equal rank and at equal bytes; centred or not; keys before and after RoPE.
    """
    from kvtune.bank import Sizes
    from kvtune.bench.codecs import subject
    from kvtune.bench.lowrank import LONG, cases, measure
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.prove import environment

    loaded, tokenizer = open_model(out, model, where)
    known = facts(loaded.config)
    check_length(known, context, continuation)
    found = cases(known, context, [amounts.share(word) for word in ranks.split(",")])
    texts = read_texts(Text(data, sequences, context), where)
    held = subject(loaded, tokenizer, texts, Sizes(sequences, context, continuation), seed, out.say)
    costs = measure(held, found, context, out.say)
    ran_on = environment(loaded.device)
    sizes = {"sequences": sequences, "context": context, "continuation": continuation}
    pairs = list(zip(found, costs, strict=True))
    out.data |= {"model": model, **sizes, "long_context": LONG, **ran_on}
    out.data["rows"] = [{**_told(case), **asdict(cost)} for case, cost in pairs]
    out.print(_bases(pairs))
    for part, title in TITLES.items():
        if own := [pair for pair in pairs if pair[0].part == part]:
            out.print(_others(own, title))
    out.print(
        f"KL in nats. Bits are those of a value of what is projected, bases and windows counted, "
        f"behind {context:,} and {LONG:,} tokens.",
        f"{sequences} sequences of {context:,} + {continuation:,} held-out tokens; "
        f"{', '.join(ran_on.values())}",
    )
    write(output, out)


def _told(case: Case) -> dict[str, Any]:
    settings = case.svd.model_dump()
    return {"part": case.part, "side": case.side, **settings, "pre_rope": not case.turned,
            "at": case.note}  # fmt: skip


def _bases(pairs: Measured) -> Table:
    """One row for a rank, basis and metric; keys, values and both beside each other."""
    table = Table(
        title="Rank, basis and metric (all heads together; keys centred, values not)",
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    for column in ("rank", "basis", "metric"):
        table.add_column(column)
    for side in ("keys", "values", "both"):
        for column in (f"{side}: KL", "flips", "bits"):
            table.add_column(column, justify="right", no_wrap=True)
    rows: dict[tuple[str, str, str], dict[str, Cost]] = {}
    for case, cost in pairs:
        if case.part == "bases":
            place = (f"{case.svd.rank:g}", str(case.svd.basis), str(case.svd.metric))
            rows.setdefault(place, {})[case.side] = cost
    before = ""
    for place, sides in rows.items():
        if before and place[0] != before:  # a rank's rows are one section
            table.add_section()
        before = place[0]
        cells = [cell for side in ("keys", "values", "both") for cell in _cells(sides.get(side))]
        table.add_row(*place, *cells)
    return table


def _cells(cost: Cost | None) -> tuple[str, str, str]:
    if cost is None:
        return "", "", ""
    return f"{cost.kl:.4f}", f"{100 * cost.flips:.1f}%", f"{cost.bits:.2f}"


def _others(pairs: Measured, title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in ("side", "rank", "heads", "centre", "RoPE", "at"):
        table.add_column(column)
    for column in ("KL", "flips", "bytes", "bits", "bits, long"):
        table.add_column(column, justify="right", no_wrap=True)
    for case, cost in pairs:
        svd = case.svd
        told = (case.side, f"{svd.rank:g}", str(svd.heads), svd.centre)
        rope = "" if case.side == "values" else "after" if case.turned else "before"
        kl, flips, bits = _cells(cost)
        sizes = (amounts.size(cost.bytes), bits, f"{cost.long_bits:.2f}")
        table.add_row(*told, rope, case.note, kl, flips, *sizes)
    return table


VERBS: dict[str, Callable[..., None]] = {"lowrank": lowrank}
