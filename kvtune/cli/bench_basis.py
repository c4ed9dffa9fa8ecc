"""kvtune bench basis: what the low-rank bases of a prompt cost beside its prefill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts
from kvtune.cli.bench import LLAMA_8B, Decoded, File, opened, write
from kvtune.cli.options import Where
from kvtune.cli.output import Output
from kvtune.errors import UsageError

Tokens = Annotated[
    int, typer.Option("--context", parser=amounts.tokens, metavar="TOKENS", help="The prompt.")
]
Group = Annotated[int, typer.Option(min=1, help="Layers that share a basis.")]
KeyRank = Annotated[int, typer.Option(min=1, help="Directions kept of a group's keys.")]
ValueRank = Annotated[int, typer.Option(min=1, help="Directions kept of a group's values.")]


def basis(
    out: Output,
    where: Where,
    model: Decoded = LLAMA_8B,
    context: Tokens = 32768,
    group: Group = 4,
    key_rank: KeyRank = 384,
    value_rank: ValueRank = 576,
    output: File = None,
) -> None:
    """Time the bases that low-rank codecs find for a prompt, and the prefill of that prompt."""
    from kvtune.bench.basis import Shape, measure
    from kvtune.bench.clock import machine
    from kvtune.cli.job import check_length
    from kvtune.models import facts

    loaded = opened(out, model, where)
    known = facts(loaded.config)
    check_length(known, context, 1)
    layers = [known.layers[i] for i in known.compressible()]
    width = layers[0].kv_heads * layers[0].head_dim
    shape = Shape(len(layers), group, width, key_rank, value_rank, context)
    if max(key_rank, value_rank) > group * width:
        what = f"A basis of {max(key_rank, value_rank)} directions has {group * width} channels."
        raise UsageError(what, "Lower --key-rank and --value-rank, or group more layers.")
    cost, ran_on = measure(loaded, shape, out.say), machine(loaded.device)
    out.data |= {"model": model, "shape": asdict(shape), **cost.table(), **ran_on}
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "ms", "of the prefill"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("gram", "top", "project", "seconds", "prefill"):
        spent = getattr(cost, name)
        label = {"gram": "Gram matrices", "top": "directions", "seconds": "bases, all"}
        table.add_row(label.get(name, name), f"{1e3 * spent:,.1f}", f"{spent / cost.prefill:.1%}")
    met = "met" if cost.table()["met"] else "not met"
    out.print(
        table,
        f"{shape.groups} groups of {group} layers, {group * width} channels, ranks {key_rank} and "
        f"{value_rank}, {context:,} tokens; at most 5 %: {met}; the bases keep {cost.kept:.4f} of "
        f"what eigenvectors keep and leave {cost.left:.3f} times what they leave; "
        f"{', '.join(ran_on.values())}",
    )
    write(output, out)


VERBS: dict[str, Callable[..., None]] = {"basis": basis}
