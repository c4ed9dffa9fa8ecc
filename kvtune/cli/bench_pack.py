"""kvtune bench pack: packed prefix caches beside DEFLATE, 8 bits and KVTC's own coding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.bench import File, write
from kvtune.cli.options import Continuation, Model, Where
from kvtune.cli.output import Output
from kvtune.cli.pack import CodecOptions
from kvtune.errors import UsageError

Caches = Annotated[int, typer.Option(min=1, help="Held-out contexts, each packed on its own.")]
Steps = Annotated[str, typer.Option(metavar="STEP,...", help="Of kvtune's coding.")]
Bits = Annotated[str, typer.Option("--kvtc-bits", metavar="N,...", help="Of KVTC's coding.")]


def pack(
    out: Output,
    model: Model,
    where: Where,
    codecs: CodecOptions,
    caches: Caches = 8,
    continuation: Continuation = 64,
    steps: Steps = "5e-4,4e-4,3e-4,2e-4,1e-4,5e-5",
    kvtc_bits: Bits = "1.3,1.6,2",
    output: File = None,
) -> None:
    """Pack held-out caches at several settings: bytes, KL behind them, seconds.

    The caches have as many tokens as the codec's own sequences (--context), of the same text.
    """
    from kvtune.bank import Sizes
    from kvtune.bench.packing import rows
    from kvtune.cli.job import check_length, open_model
    from kvtune.models import facts
    from kvtune.prove import environment
    from kvtune.texts import read, split

    sizes = Sizes(caches, codecs.context, continuation)
    asked = _numbers("--steps", steps), _numbers("--kvtc-bits", kvtc_bits)
    opened = open_model(out, model, where)
    check_length(facts(opened[0].config), sizes.context, continuation)
    codec = codecs.open(out, opened, where.offline)
    documents = split(read(codecs.data, where.offline))["proof"]
    measured = rows(*opened, documents, codec, sizes, *asked, out.say)
    ran_on = environment(opened[0].device)
    out.data |= {"model": model, "context": sizes.context, "codec_bytes": codec.nbytes}
    out.data |= {"rows": [asdict(row) for row in measured], **ran_on}
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "ratio", "true bits", "KL (95 % interval)", "flips", "encode", "decode"):
        table.add_column(column, justify="right" if column else "left")
    for row in measured:
        kl = f"{row.kl:.4f} ({row.kl_low:.4f} to {row.kl_high:.4f})"
        cells = (f"{row.ratio:.1f}x", f"{row.bits:.3f}", kl, f"{row.flips:.1%}")
        table.add_row(row.name, *cells, f"{row.encode:.2f} s", f"{row.decode:.2f} s")
    what = f"{caches} caches of {sizes.context:,} tokens, {continuation} behind each; "
    out.print(table, what + ", ".join(ran_on.values()))
    write(output, out)


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [-1.0]
    if any(not 0 < number < 1e9 for number in found):
        raise UsageError(f"{option} {text} is no list of positive numbers.")
    return found


VERBS: dict[str, Callable[..., None]] = {"pack": pack}
