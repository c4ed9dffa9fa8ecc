"""kvtune bench sharing: what layers that store together cost, and who may read another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.options import Continuation, Model, Text, Where
from kvtune.cli.output import Output
from kvtune.errors import UsageError

TABLES = ("groups", "merged", "owners")
Parts = Annotated[
    str, typer.Option("--tables", metavar="NAME,...", help="Any of groups, merged, owners.")
]
Groups = Annotated[
    str, typer.Option(metavar="N,...", help="Layers of xKV's groups, at equal bytes.")
]
Shares = Annotated[int, typer.Option(min=1, help="Layers that KVSharer lets read another's.")]
Threshold = Annotated[
    float, typer.Option(min=-1.0, max=1.0, help="Cosine of hidden states that a map must exceed.")
]
Singles = Annotated[int, typer.Option(min=0, help="Best measured single pairs to tell; 0: none.")]
Written = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Write KVSharer's map as a recipe."),
]


def sharing(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    continuation: Continuation = 64,
    tables: Parts = "groups,merged,owners",
    groups: Groups = "1,2,4,8",
    shares: Shares = 4,
    threshold: Threshold = 0.5,
    singles: Singles = 4,
    output: Written = None,
) -> None:
    """Compare ways in which layers share a cache: xKV, MiniCache, and maps of owners."""
    from kvtune.bank import Sizes
    from kvtune.bench.sharing import Sharing
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.prove import environment

    wanted = _listed(tables)
    widths = _counts(groups)
    loaded, tokenizer = open_model(out, model, where)
    check_length(facts(loaded.config), text.context, continuation)
    documents = read_texts(text, where)
    sizes = Sizes(text.sequences, text.context, continuation)
    bench = Sharing(loaded, tokenizer, documents, sizes, out.say)
    ran_on = environment(loaded.device)
    out.data |= {"model": model, "context": text.context, **ran_on}
    if "groups" in wanted:
        _tell(out, "xKV at equal bytes", "groups", bench.groups(widths))
    if "merged" in wanted:
        _tell(out, "MiniCache on the upper half of the layers", "merged", bench.merged())
    if "owners" in wanted:
        steps, rows = bench.searched(shares, threshold)
        out.data["steps"] = [asdict(step) for step in steps]
        best = bench.singles(singles) if singles else []
        _tell(out, "Layers that read another's cache", "owners", [*rows, *best])
        if output is not None:
            _write(out, output, steps[-1].owners, len(bench.known.layers))
    out.print(
        f"{text.sequences} sequences of {text.context:,} + {continuation} tokens; "
        f"{', '.join(ran_on.values())}"
    )


def _tell(out: Output, title: str, key: str, rows: Sequence[Any]) -> None:
    out.data[key] = [asdict(row) for row in rows]
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for column in ("", "bytes", "true bits", "KL (95 % interval)", "flips"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        kl = f"{row.kl:.4f} ({row.kl_low:.4f} to {row.kl_high:.4f})"
        table.add_row(row.name, f"{row.bytes:,}", f"{row.bits:.2f}", kl, f"{row.flips:.1%}")
    out.print(table)


def _write(out: Output, file: Path, owners: dict[int, int], layers: int) -> None:
    """The map as a recipe, and the command that proves it."""
    from kvtune.kvsharer import policies_of
    from kvtune.space import to_recipe

    found = dict(enumerate(policies_of(owners, layers)))
    told = f"KVSharer: {len(owners)} of {layers} layers read an earlier layer's cache."
    to_recipe(found, layers, name=file.stem, description=told).save(file)
    out.data["recipe"] = str(file)
    out.print(f"Written to {file}. Prove it: kvtune apply {file} --model MODEL --max-kl 0.05")


def _listed(words: str) -> list[str]:
    from kvtune.errors import suggest

    found = [word.strip() for word in words.split(",")]
    for word in found:
        if word not in TABLES:
            raise UsageError(f"There is no table {word!r}.", suggest(word, TABLES))
    return found


def _counts(words: str) -> list[int]:
    found = [word.strip() for word in words.split(",")]
    if odd := [word for word in found if word not in ("1", "2", "4", "8")]:
        raise UsageError(f"A group has 1, 2, 4 or 8 layers, not {odd[0]!r}.")
    return [int(word) for word in found]


VERBS: dict[str, Callable[..., None]] = {"sharing": sharing}
