"""kvtune bench tiers: what a cheap tier for the tokens that lose is worth against dropping them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import File, write
from kvtune.cli.options import Continuation, Model, Text, Where
from kvtune.cli.output import Output

Shares = Annotated[
    str, typer.Option(metavar="SHARE,...", help="Of the tokens that leave the window, kept.")
]
Applied = Annotated[str, typer.Option("--recipe", help="What selects, and stores the rest.")]
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", metavar="FILE", help="What fitted codecs are fitted to."),
]


def tiers(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    continuation: Continuation = 64,
    recipe: Applied = "mikv",
    shares: Shares = "10%,20%,35%,50%",
    profile: ProfileFile = None,
    output: File = None,
) -> None:
    """Compare a recipe's rest tier with dropping tokens at equal bytes, under the same selector."""
    from kvtune.bank import Sizes
    from kvtune.bench.tiers import rows
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.prove import environment
    from kvtune.recipe import load
    from kvtune.shipped import find

    fitted_to = profile_of(profile) if profile else None
    found = [amounts.share(word) for word in shares.split(",")]
    applied = load(find(recipe))
    loaded, tokenizer = open_model(out, model, where)
    check_length(facts(loaded.config), text.context, continuation)
    documents = read_texts(text, where)["search"]
    sizes = Sizes(text.sequences, text.context, continuation)
    measured = rows(loaded, tokenizer, documents, applied, sizes, found, fitted_to, out.say)
    ran_on = environment(loaded.device)
    out.data |= {"model": model, "recipe": recipe, "context": text.context}
    out.data |= {"rows": [asdict(row) for row in measured], **ran_on}
    table = Table(box=SIMPLE_HEAD)
    for column in ("kept", "the rest", "true bits", "KL (95 % interval)", "flips"):
        table.add_column(column, justify="left" if column == "the rest" else "right")
    for row in measured:
        kl = f"{row.kl:.4f} ({row.kl_low:.4f} to {row.kl_high:.4f})"
        table.add_row(f"{row.share:.0%}", row.rest, f"{row.bits:.2f}", kl, f"{row.flips:.1%}")
    out.print(
        table,
        f"{text.sequences} sequences of {text.context:,} + {continuation} tokens; {recipe}; "
        f"{', '.join(ran_on.values())}",
    )
    write(output, out)


def profile_of(path: Path) -> Any:
    """A profile, or that of a run folder."""
    from kvtune import runs
    from kvtune.profile import Profile

    return Profile.load(path / runs.PROFILE if path.is_dir() else path)


VERBS: dict[str, Callable[..., None]] = {"tiers": tiers}
