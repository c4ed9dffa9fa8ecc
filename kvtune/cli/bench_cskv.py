"""kvtune bench cskv: what training is worth to CSKV's maps, beside every closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.bench import File, write
from kvtune.cli.bench_codecs import Context, Data, Sequences
from kvtune.cli.fit import Training
from kvtune.cli.options import Continuation, Model, Seed, Text, Where
from kvtune.cli.output import Output

Shrink = Annotated[float, typer.Option(help="The share of channels that is left out.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps of each layer.")]


def cskv(
    out: Output,
    where: Where,
    model: Model = "demo",
    data: Data = "builtin",
    sequences: Sequences = 4,
    context: Context = 2048,
    continuation: Continuation = 128,
    shrink: Shrink = 0.8,
    steps: Steps = Training.steps,
    seed: Seed = 0,
    output: File = None,
) -> None:
    """Measure CSKV's maps on MODEL's held-out text: the paper's starts, closed forms, and trained.

    Each in 16 bits and with the paper's 4-bit codes behind, put there afterwards and trained
    through.
    """
    from kvtune.bank import Sizes
    from kvtune.bench.cskv import rows
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.parts import parse
    from kvtune.prove import environment
    from kvtune.training import Course

    _check(shrink, parse)
    loaded, tokenizer = open_model(out, model, where)
    known = facts(loaded.config)
    check_length(known, context, continuation)
    texts = read_texts(Text(data, sequences, context), where)
    sizes = Sizes(sequences, context, continuation)
    # as kvtune fit does, and never longer than what is measured
    own = Training()
    taught = Sizes(own.sequences, min(own.context, context), min(own.continuation, context))
    course = Course(steps=steps, seed=seed)
    found = rows(loaded, tokenizer, texts, sizes, taught, shrink, course, out.say)
    ran_on = environment(loaded.device)
    out.data |= {"model": model, **sizes._asdict(), "shrink": shrink, "steps": steps, **ran_on}
    out.data["rows"] = [asdict(row) for row in found]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("maps")
    for column in ("16 bits: KL", "flips", "4 bits: KL", "flips", "training"):
        table.add_column(column, justify="right")
    for row in found:
        spent = f"{row.seconds:.0f} s" if row.seconds else ""
        numbers = (f"{row.kl:.4f}", f"{row.flips:.1%}", f"{row.coded_kl:.4f}")
        table.add_row(row.maps, *numbers, f"{row.coded_flips:.1%}", spent)
    out.print(
        table,
        f"KL in nats; {shrink:.1%} of the channels left out, to a multiple of 8; four sinks "
        "and a window of 32 exact, which codes of 64 tokens at once lengthen by up to 63.",
        f"{sequences} sequences of {context:,} + {continuation:,} held-out tokens; "
        f"{steps} steps a layer; {', '.join(ran_on.values())}",
    )
    write(output, out)


def _check(shrink: float, parse: Callable[..., object]) -> None:
    from kvtune.errors import UsageError

    try:
        parse({"use": "cskv", "shrink": shrink})
    except ValueError as error:
        raise UsageError(f"{error}.", "Give --shrink 0.8 or 0.5.") from None


VERBS: dict[str, Callable[..., None]] = {"cskv": cskv}
