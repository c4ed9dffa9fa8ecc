"""kvtune bench codecs and frontier: what each part is worth, and recipes beside KIVI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import File, write
from kvtune.cli.options import Continuation, Force, Model, Seed, Text, Where, shipped_names
from kvtune.cli.output import Output

if TYPE_CHECKING:
    from kvtune.bank import Sizes
    from kvtune.bench.codecs import Cost
    from kvtune.bench.compositions import Row
    from kvtune.bench.frontier import Measured, Point
    from kvtune.models import Facts

Data = Annotated[
    str, typer.Option(metavar="TEXT", help="builtin, text or JSONL files, or hf:NAME[:SPLIT].")
]
Context = Annotated[
    int,
    typer.Option(parser=amounts.tokens, metavar="TOKENS", help="Tokens of each that are cached."),
]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences cut out of held-out text.")]
Positions = Annotated[
    int,
    typer.Option(parser=amounts.tokens, metavar="N", help="Held-out positions, at the least."),
]
BytesAt = Annotated[
    int | None,
    typer.Option(
        "--bytes-context",
        parser=amounts.tokens,
        metavar="TOKENS",
        help="Context length at which bytes are counted; 32k when left out.",
    ),
]
Biased = Annotated[
    bool, typer.Option("--biased", help="Measure a copy with large key biases as well.")
]
Recipes = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE...",
        help="Recipes' files or folders, or shipped names.",
        autocompletion=shipped_names,
    ),
]
Applied = Annotated[
    str, typer.Option("--model", metavar="MODEL", help="A hub id, a local folder, or demo.")
]


def codecs(
    out: Output,
    where: Where,
    model: Model = "demo",
    data: Data = "builtin",
    sequences: Sequences = 2,
    context: Context = 2048,
    continuation: Continuation = 128,
    bytes_context: BytesAt = None,
    biased: Biased = False,
    seed: Seed = 0,
    output: File = None,
) -> None:
    """Measure compositions of codecs at equal true bytes on MODEL, each also with a part removed.

    Keys alone, values alone (the other side in 16 bits), and both, on held-out text.
    """
    from kvtune.bank import Sizes
    from kvtune.bench.codecs import measure, subject, with_biases
    from kvtune.bench.compositions import rows
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts

    loaded, tokenizer = open_model(out, model, where)
    known = facts(loaded.config)
    check_length(known, context, continuation)
    at, sizes = _counted(out, known, bytes_context), Sizes(sequences, context, continuation)
    texts = read_texts(Text(data, sequences, context), where)
    compositions = rows(known, at)
    perplexity: dict[str, float] = {}
    costs: dict[str, list[Cost]] = {}
    for name in ("model", "biased") if biased else ("model",):
        one = with_biases(loaded, tokenizer, texts, sizes) if name == "biased" else loaded
        held = subject(one, tokenizer, texts, sizes, seed, out.say)
        perplexity[name], costs[name] = held.perplexity, measure(held, compositions, out.say, name)
    ran_on = _ran_on(loaded)
    out.data |= {"model": model, **_sizes(sizes, at), "perplexity": perplexity}
    out.data |= {"rows": _tables(compositions, costs), **ran_on}
    told = ", ".join(f"{name} {value:.3f}" for name, value in perplexity.items())
    out.print(
        _codec_table(compositions, costs),
        f"Dense perplexity on this text: {told}. KL in nats; x is the KL in parts of the whole "
        "composition's, the first row of each part.",
        f"{_told(sizes, at)}; {', '.join(ran_on.values())}",
    )
    write(output, out)


def _tables(rows: list[Row], costs: dict[str, list[Cost]]) -> list[dict[str, Any]]:
    found = []
    for i, row in enumerate(rows):
        keys, values = row.sides
        place = {"family": row.family, "without": row.without, "keys": keys, "values": values}
        window = {"sinks": row.policy.sinks, "recent": row.policy.recent}
        measured = {name: asdict(column[i]) for name, column in costs.items()}
        found.append({**place, **window, "bits": row.bits, "measured": measured})
    return found


def _codec_table(rows: list[Row], costs: dict[str, list[Cost]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for column in ("without", "composition"):
        table.add_column(column)
    table.add_column("bits", justify="right")
    for name in costs:
        for column in (f"{name}: KL", "x", "flips"):
            table.add_column(column, justify="right")
    for i, row in enumerate(rows):
        if not row.without and i:
            table.add_section()
        numbers = [
            word
            for column in costs.values()
            for word in (
                f"{column[i].kl:.4f}",
                f"{column[i].ratio:.2f}",
                f"{100 * column[i].flips:.1f}%",
            )
        ]
        shown = " | ".join(filter(None, row.sides))
        table.add_row(row.without or f"({row.family})", shown, f"{row.bits:.2f}", *numbers)
    return table


def frontier(
    out: Output,
    where: Where,
    recipes: Recipes,
    model: Applied = "demo",
    data: Data = "builtin",
    context: Context = 2048,
    continuation: Continuation = 512,
    positions: Positions = 4096,
    bytes_context: BytesAt = None,
    force: Force = False,
    output: File = None,
) -> None:
    """Measure recipes on held-out text, each beside the best uniform KIVI recipe at no fewer bytes.

    The rivals have the recipe's own sinks and window.
    """
    from kvtune.bank import Sizes, build, text_tokens
    from kvtune.bench.frontier import Frontier
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.shipped import find

    paths = {name: find(name) for name in recipes}
    loaded, tokenizer = open_model(out, model, where)
    known = facts(loaded.config)
    check_length(known, context, continuation)
    at = _counted(out, known, bytes_context)
    sizes = Sizes(-(-positions // continuation), context, continuation)
    documents = read_texts(Text(data, sizes.sequences, context), where)["proof"]
    bank = build(loaded, text_tokens(documents, tokenizer, sizes, "proof"), context)
    held = Frontier(loaded, bank, at, out.say)
    points = [held.point(name, path, force) for name, path in paths.items()]
    for point in points:
        _check_window(out, point)
    ran_on = _ran_on(loaded)
    out.data |= {"model": model, **_sizes(sizes, at), "points": [_row(one) for one in points]}
    out.data |= ran_on
    out.print(
        _frontier_table(points),
        "KL in nats; x is KIVI's KL in parts of the recipe's. KIVI: the least KL of the uniform "
        "recipes with the same sinks and window at no fewer bytes.",
        f"{_told(sizes, at)}; {', '.join(ran_on.values())}",
    )
    write(output, out)


def _check_window(out: Output, point: Point) -> None:
    from kvtune.bench.frontier import WINDOW

    if not point.is_short:
        out.warn(
            f"{point.name} keeps {point.recent:,} recent tokens exact, more than {WINDOW}: what "
            "the window is worth is not told apart from its codes."
        )


def _row(point: Point) -> dict[str, Any]:
    rival = {"settings": point.rival, **point.kivi.table(), "measured": point.rivals}
    window = {"sinks": point.sinks, "recent": point.recent, "short_window": point.is_short}
    return {"recipe": point.name, **point.ours.table(), **window, "kivi": rival, "x": point.ratio}


def _frontier_table(points: list[Point]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("recipe")
    for column in ("sinks", "window", "bits", "KL", "flips"):
        table.add_column(column, justify="right")
    table.add_column("KIVI")
    for column in ("bits", "KL", "flips", "x"):
        table.add_column(column, justify="right")
    for one in points:
        window = (str(one.sinks), str(one.recent))
        ours, kivi = _numbers(one.ours), _numbers(one.kivi)
        table.add_row(one.name, *window, *ours, one.rival, *kivi, f"{one.ratio:.2f}")
    return table


def _numbers(measured: Measured) -> tuple[str, str, str]:
    return f"{measured.bits:.3f}", f"{measured.kl:.5f}", f"{100 * measured.flips:.2f}%"


def _counted(out: Output, known: Facts, wanted: int | None) -> int:
    """Where bytes are counted: equal bytes are those of a long cache, in which windows and bases
    hardly count, so a model's own length does not bound what is usual."""
    from kvtune.cli.job import USUAL_BYTES_AT, bytes_context

    return bytes_context(out, known, wanted) if wanted else USUAL_BYTES_AT


def _sizes(sizes: Sizes, at: int) -> dict[str, int]:
    return {**sizes._asdict(), "bytes_context": at}


def _told(sizes: Sizes, at: int) -> str:
    return (
        f"{sizes.sequences} sequences of {sizes.context:,} + {sizes.continuation:,} held-out "
        f"tokens; bytes counted at {at:,} tokens"
    )


def _ran_on(model: Any) -> dict[str, str]:
    from kvtune.prove import environment

    return environment(model.device)


VERBS: dict[str, Callable[..., None]] = {"codecs": codecs, "frontier": frontier}
