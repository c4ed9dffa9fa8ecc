"""kvtune bench endless: reading, and talking on, far beyond what a model's positions are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import File, write
from kvtune.cli.options import Model, Where
from kvtune.cli.output import Output
from kvtune.errors import UsageError

if TYPE_CHECKING:
    from kvtune.bench.endless import Stretch

DENSE = "16 bits"
PROMPT = 64  # tokens of the text that `generate` goes on from

Count = Annotated[
    int, typer.Option(parser=amounts.tokens, metavar="TOKENS", help="Read of the text.")
]
Said = Annotated[
    int | None,
    typer.Option(
        "--generate", parser=amounts.tokens, metavar="TOKENS", help="Generated after it, freely."
    ),
]
Budget = Annotated[
    int, typer.Option(parser=amounts.tokens, metavar="TOKENS", help="Held by each layer.")
]
Recipes = Annotated[str, typer.Option(metavar="RECIPE,...", help="What is compared.")]
Size = Annotated[int, typer.Option("--stretch", min=1, help="Tokens of a row of the table.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens that are read at once.")]
Dense = Annotated[bool, typer.Option("--dense", help="The model's own cache as well, which grows.")]
Data = Annotated[str, typer.Option(metavar="TEXT", help="As for kvtune tune.")]


def endless(
    out: Output,
    model: Model,
    where: Where,
    tokens: Count = 20000,
    generate: Said = None,
    budget: Budget = 512,
    recipes: Recipes = "lacache,streaming-llm",
    stretch: Size = 1000,
    chunk: Chunk = 64,
    dense: Dense = False,
    data: Data = "builtin",
    output: File = None,
) -> None:
    """Read a long text, and generate, at the same budget of tokens under several recipes.

    The loss of each stretch, bytes held, and seconds per token; not bound by the model's positions.
    """
    from kvtune.bench.endless import budgeted
    from kvtune.cli.job import open_model
    from kvtune.models import facts
    from kvtune.placement import input_device
    from kvtune.prove import environment
    from kvtune.recipe import load
    from kvtune.shipped import find
    from kvtune.texts import read, sequences, split

    applied = {
        name: budgeted(load(find(name)), budget) for name in map(str.strip, recipes.split(","))
    }
    if DENSE in applied:
        raise UsageError(f"{DENSE} is what --dense adds.")
    loaded, tokenizer = open_model(out, model, where)
    known = facts(loaded.config)
    for recipe in applied.values():  # before any text is read
        recipe.policies(known)
    documents = split(read(data, where.offline))["search"]
    text = sequences(documents, tokenizer, 1, tokens + 1, "search").to(input_device(loaded))
    found: list[Stretch] = []
    for name, cache in _caches(applied, loaded, dense):
        found += _measured(loaded, cache, name, text, (stretch, chunk), generate, out)
    ran_on = environment(loaded.device)
    told = {"model": model, "budget": budget, "positions": known.max_positions, "chunk": chunk}
    out.data |= {**told, "rows": [asdict(row) for row in found], **ran_on}
    out.print(
        _table(found),
        f"{budget:,} tokens in each layer; {model} has {known.max_positions:,} positions; "
        f"{', '.join(ran_on.values())}",
    )
    write(output, out)


Make = Callable[[], Any]


def _caches(applied: dict[str, Any], model: Any, dense: bool) -> Iterator[tuple[str, Make]]:
    """What makes an empty cache, by name."""
    from functools import partial

    from transformers import DynamicCache

    from kvtune.cache import load

    for name, recipe in applied.items():
        yield name, load(recipe, model).fresh
    if dense:
        yield DENSE, partial(DynamicCache, config=model.config)


def _measured(
    model: Any,
    cache: Make,
    name: str,
    text: Any,
    sizes: tuple[int, int],
    generate: int | None,
    out: Output,
) -> list[Stretch]:
    from kvtune.bench.endless import read_on, say_on

    stretch, chunk = sizes
    found = read_on(model, cache(), name, text, stretch, chunk, out.say)
    if generate:
        prompt = text[:, :PROMPT]
        found += say_on(model, cache(), name, prompt, generate, stretch, out.say)
    return found


def _table(rows: list[Stretch]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("cache", "", "up to", "nll", "finite", "held", "GPU", "per token"):
        table.add_column(column, justify="left" if column in ("cache", "") else "right")
    for row in rows:
        nll = "" if row.nll is None else f"{row.nll:.3f}"
        on_gpu = "" if row.allocated is None else amounts.size(row.allocated)
        held = (amounts.size(row.bytes), on_gpu, f"{1e3 * row.seconds:.1f} ms")
        finite = "yes" if row.finite else "NO"
        table.add_row(row.cache, row.does, f"{row.tokens:,}", nll, finite, *held)
    return table


VERBS: dict[str, Callable[..., None]] = {"endless": endless}
