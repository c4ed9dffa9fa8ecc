"""kvtune bench prefill: the most memory that a prompt takes which is read in chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import File, write
from kvtune.cli.options import Model, Where
from kvtune.cli.output import Output

Length = Annotated[
    int, typer.Option("--context", parser=amounts.tokens, metavar="TOKENS", help="Of the prompt.")
]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens that are read at once.")]
Applied = Annotated[str, typer.Option("--recipes", metavar="RECIPE,...", help="What is compared.")]


def prefill(
    out: Output,
    model: Model,
    where: Where,
    context: Length = 8192,
    chunk: Chunk = 512,
    recipes: Applied = "snapkv",
    output: File = None,
) -> None:
    """Read a prompt in chunks under recipes, and tell the most memory that it took."""
    from kvtune.bench.prefill import rows
    from kvtune.cli.job import check_length, open_model
    from kvtune.models import facts
    from kvtune.prove import environment
    from kvtune.recipe import load
    from kvtune.shipped import find
    from kvtune.texts import read, sequences

    named = [(name.strip(), load(find(name.strip()))) for name in recipes.split(",")]
    loaded, tokenizer = open_model(out, model, where)
    check_length(facts(loaded.config), context, 0)
    tokens = sequences(read("builtin"), tokenizer, 1, context, "search")
    found = rows(loaded, tokens, chunk, named)
    ran_on = environment(loaded.device)
    out.data |= {"model": model, "context": context, "chunk": chunk, **ran_on}
    out.data["rows"] = [asdict(row) for row in found]
    table = Table(box=SIMPLE_HEAD)
    for column in ("cache", "peak", "of dense", "held", "seconds"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in found:
        part = f"{row.peak / max(1, found[0].peak):.0%}"
        sizes = [f"{size / 1e6:,.1f} MB" for size in (row.peak, row.held)]
        table.add_row(row.name, sizes[0], part, sizes[1], f"{row.seconds:.1f}")
    told = f"{context:,} tokens in chunks of {chunk:,}; peak beyond the model's own memory; "
    out.print(table, told + ", ".join(ran_on.values()))
    write(output, out)


VERBS: dict[str, Callable[..., None]] = {"prefill": prefill}
