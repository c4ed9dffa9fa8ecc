"""kvtune bench tokens: which tokens to keep, and how many in each layer, at equal sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import File, write
from kvtune.cli.bench_tiers import ProfileFile, profile_of
from kvtune.cli.options import Continuation, Model, Text, Where
from kvtune.cli.output import Output

Scorers = Annotated[
    str, typer.Option(metavar="NAME,...", help="Selectors to compare; all, or none for no table.")
]
Allocators = Annotated[
    str, typer.Option(metavar="NAME,...", help="Allocators to compare; all, or none for no table.")
]
Under = Annotated[str, typer.Option(metavar="NAME", help="The selector that allocators share out.")]
Shares = Annotated[str, typer.Option("--kept", metavar="SHARE,...", help="Of the context, kept.")]
Sinks = Annotated[int, typer.Option(min=0, help="First tokens that always stay.")]
Recent = Annotated[int, typer.Option(min=0, help="Last tokens that always stay.")]
Suite = Annotated[
    str, typer.Option(metavar="NAME,...", help="Tasks of the proof suite to ask as well.")
]
Items = Annotated[int, typer.Option(min=1, help="Items of each task.")]


def tokens(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    continuation: Continuation = 64,
    scorers: Scorers = "all",
    allocators: Allocators = "all",
    under: Under = "snapkv",
    shares: Shares = "10%,25%,50%",
    sinks: Sinks = 4,
    recent: Recent = 32,
    profile: ProfileFile = None,
    suite: Suite = "",
    items: Items = 12,
    output: File = None,
) -> None:
    """Compare selectors, and allocators of budgets, by divergence and by tasks."""
    from kvtune.bank import Sizes
    from kvtune.bench.tokens import Asked, Tokens
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.prove import environment
    from kvtune.retention import Allocator, Selector
    from kvtune.suite import chosen

    measured_on = profile_of(profile) if profile else None
    found = [amounts.share(word) for word in shares.split(",")]
    fitted = measured_on is not None
    wanted = {kind: _named(words, kind, fitted) for words, kind in (
        (scorers, Selector), (allocators, Allocator),
    )}  # fmt: skip
    loaded, tokenizer = open_model(out, model, where)
    check_length(facts(loaded.config), text.context, continuation)
    asked = Asked(chosen(suite) if suite else (), items, text.context)
    bench = Tokens(
        loaded,
        tokenizer,
        read_texts(text, where)["search"],
        Sizes(text.sequences, text.context, continuation),
        (sinks, recent),
        measured_on,
        asked,
        out.say,
    )
    ran_on = environment(loaded.device)
    out.data |= {"model": model, "context": text.context, "sinks": sinks, "recent": recent}
    out.data |= {"under": under, **ran_on}
    if wanted[Selector]:
        rows = bench.scorers(wanted[Selector], found)
        _tell(out, "Selectors, the same budget everywhere", "scorers", rows)
    if wanted[Allocator]:
        rows = bench.budgets(under, wanted[Allocator], found)
        _tell(out, f"Allocators of budgets, {under}", "allocators", rows)
    out.print(
        f"{text.sequences} sequences of {text.context:,} + {continuation} tokens; sinks {sinks}, "
        f"recent {recent}; {', '.join(ran_on.values())}"
    )
    write(output, out)


def _named(words: str, kind: type[Any], fitted: bool) -> list[str]:
    """The parts of a kind that are asked for; of all of them those that need no profile, without
    one. A selector that has its keys turned by their place in a cache is read by `bench endless`.
    """
    from kvtune import parts

    if words == "none":
        return []
    if words != "all":
        return [word.strip() for word in words.split(",")]
    found = []
    for name in parts.names():
        part: Any = parts.find(name)
        if issubclass(part, kind) and not getattr(part(), "in_cache", False):
            needs = getattr(part, "fits", False) or getattr(part, "reads", None)
            found += [name] if fitted or not needs else []
    return found


def _tell(out: Output, title: str, key: str, rows: Sequence[Any]) -> None:
    out.data[key] = [asdict(row) for row in rows]
    tasks = list(rows[0].tasks) if rows else []
    told = [name for name in tasks if not name.startswith("dense ")]
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in ("", "kept", "tokens", "true bits", "KL (95 % interval)", "flips", *told):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        kl = f"{row.kl:.4f} ({row.kl_low:.4f} to {row.kl_high:.4f})"
        scores = [f"{row.tasks[name]:.2f} of {row.tasks[f'dense {name}']:.2f}" for name in told]
        head = (row.name, f"{row.kept:.0%}", f"{row.tokens:,}", f"{row.bits:.2f}")
        table.add_row(*head, kl, f"{row.flips:.1%}", *scores)
    out.print(table)


VERBS: dict[str, Callable[..., None]] = {"tokens": tokens}
