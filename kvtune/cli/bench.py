"""kvtune bench: what a search trial costs on this machine."""

from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.options import Continuation, Model, Text, Where
from kvtune.cli.output import Output

Contexts = Annotated[
    str, typer.Option(metavar="TOKENS,...", help="Context lengths, such as 512,2k.")
]
Recipe = Annotated[str, typer.Option("--recipe", help="What the trials apply.")]


def bench(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    continuation: Continuation = 128,
    contexts: Contexts = "512,2k",
    recipe: Recipe = "k4v2",
) -> None:
    """Time search trials of MODEL behind contexts of several lengths."""
    from kvtune.bank import Sizes
    from kvtune.bench import REPEATS, trial_costs
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.prove import environment
    from kvtune.recipe import load
    from kvtune.shipped import find

    lengths = [amounts.tokens(word) for word in contexts.split(",")]
    applied = load(find(recipe))
    loaded, tokenizer = open_model(out, model, where)
    check_length(facts(loaded.config), max(lengths), continuation)
    documents = read_texts(replace(text, context=max(lengths)), where)["search"]
    sizes = Sizes(text.sequences, max(lengths), continuation)
    rows = trial_costs(loaded, tokenizer, documents, applied, sizes, lengths, out.say)
    ran_on = environment(loaded.device)
    out.data |= {"trials": [asdict(row) for row in rows], "repeats": REPEATS, **ran_on}
    table = Table(box=SIMPLE_HEAD)
    for column in ("context", "dense pass", "first trial", "trial", "dense trial"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = (row.dense_pass, row.first_trial, row.trial, row.dense_trial)
        table.add_row(f"{row.context:,}", *(f"{spent:.2f} s" for spent in seconds))
    out.print(
        table,
        f"{text.sequences} sequences, {continuation} continuation tokens each; medians of "
        f"{REPEATS}; {recipe}; {', '.join(ran_on.values())}",
    )
