"""kvtune bench: kernels and decoding against 16 bits, and what a search trial costs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli import amounts, timings
from kvtune.cli.options import Continuation, Model, Text, Where
from kvtune.cli.output import Output
from kvtune.errors import UnsupportedError, UsageError
from kvtune.files import write_atomic

if TYPE_CHECKING:
    from kvtune.bench.cases import Case, Row, Shape
    from kvtune.bench.kernels import Lab

LLAMA_8B = "llama-8b"
USUAL_FORMATS = "k8v8,k4v4,k4g32v4g32,k4v2,k3v3,k2g32v2g32"
USUAL_HEADS = "32/8/128"
USUAL_CONTEXT = 32768

Contexts = Annotated[
    str, typer.Option(metavar="TOKENS,...", help="Context lengths, such as 512,2k.")
]
Applied = Annotated[str, typer.Option("--recipe", help="What the trials apply.")]
Batches = Annotated[
    str, typer.Option("--batch", metavar="N,...", help="Batches of a grid, instead of the table.")
]
Lengths = Annotated[
    str, typer.Option("--context", metavar="TOKENS,...", help="Context lengths of a grid.")
]
Formats = Annotated[
    str, typer.Option(metavar="KV,...", help=f"Formats of a grid, such as {USUAL_FORMATS}.")
]
Heads = Annotated[
    str, typer.Option(metavar="Q/KV/DIM", help="Query heads, kv heads and head_dim of a grid.")
]
Rows = Annotated[
    str, typer.Option(metavar="N,...", help="Only these rows of the acceptance table.")
]
Formatted = Annotated[
    str, typer.Option("--recipe", help="The formats of this recipe's layers, mean of all; 8x32k.")
]
Latency = Annotated[
    bool, typer.Option("--table", help="Measure and save the latency table of this device.")
]
File = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write the numbers to this JSON file as well."
    ),
]
Decoded = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="llama-8b (the shape of Llama-3.1-8B, random weights), demo, or a model.",
    ),
]
DecodeRecipe = Annotated[
    str,
    typer.Option("--recipe", help="The compressed cache: a recipe; 4 bits g128 when left out."),
]
DecodeBatches = Annotated[
    str,
    typer.Option(
        "--batch",
        metavar="N,...",
        help="Batches; max is the largest that fits. On a GPU 1,max when left out, else 1.",
    ),
]
DecodeContext = Annotated[
    int | None,
    typer.Option(
        "--context",
        parser=amounts.tokens,
        metavar="TOKENS",
        help="Tokens in the cache before decoding; 32k, or what the model has.",
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Tokens decoded in each run.")]


def kernels(
    out: Output,
    batch: Batches = "",
    context: Lengths = "",
    formats: Formats = "",
    heads: Heads = USUAL_HEADS,
    rows: Rows = "",
    recipe: Formatted = "",
    table: Latency = False,
    output: File = None,
) -> None:
    """Time the attention kernels on this GPU against its byte floor and torch's bf16 attention.

    Without options: the acceptance table of the GPU runtime.
    """
    from kvtune.bench import latency
    from kvtune.bench.cases import ACCEPTANCE, grid, parse_heads
    from kvtune.bench.clock import machine
    from kvtune.bench.kernels import Lab, check_device

    shape, chosen = parse_heads(heads), _chosen(ACCEPTANCE, rows)
    batches, contexts = counts("--batch", batch), lengths(context)
    of_grid = bool(batches or contexts or formats or heads != USUAL_HEADS)
    if rows and (of_grid or table):
        raise UsageError("--rows choose from the acceptance table: leave out the grid's options.")
    if table and formats:
        raise UsageError("The latency table has formats of its own: leave out --formats.")
    places = batches or list(latency.BATCHES), contexts or list(latency.CONTEXTS)
    wanted = grid((formats or USUAL_FORMATS).split(","), *places, shape)
    applied = _applied(recipe, shape, batches or [8], contexts or [32768]) if recipe else []
    device = check_device()
    lab, ran_on = Lab(device), machine(device)
    out.note(f"{ran_on['device']}: device copy {lab.copy_rate / 1e12:.2f} TB/s, read and written.")
    out.data |= {"rows": [], "table": None, "copy_rate": lab.copy_rate, **ran_on}
    if applied:
        _judge(out, lab, applied)
    elif table:
        _save_table(out, lab, latency.cases(shape, *places), ran_on)
    elif of_grid:
        _time_grid(out, lab, wanted)
    else:
        _judge(out, lab, chosen)
    out.data["cases"] = [timing.table() for timing in lab.timings.values()]
    out.print(timings.cases(lab.timings.values()), ", ".join(ran_on.values()))
    write(output, out)


def _applied(name: str, shape: Shape, batches: list[int], contexts: list[int]) -> list[Row]:
    """A recipe's layers at every batch and context."""
    from kvtune.bench.applied import row_of
    from kvtune.recipe import load
    from kvtune.shipped import find

    read = load(find(name))
    places = [replace(shape, batch=b, context=n) for b in batches for n in contexts]
    return [row_of(read, place) for place in places]


def _chosen(every: tuple[Row, ...], rows: str) -> list[Row]:
    wanted = counts("--rows", rows)
    if odd := set(wanted) - {row.number for row in every}:
        known = ", ".join(map(str, sorted({row.number for row in every})))
        raise UsageError(f"There is no row {min(odd)}.", f"The rows are {known}.")
    return [row for row in every if not wanted or row.number in wanted]


def _judge(out: Output, lab: Lab, rows: list[Row]) -> None:
    from kvtune.bench.kernels import judge

    found = []
    for verdict in judge(lab, rows):
        found.append(verdict)
        out.note(timings.verdict(verdict))
        out.say("acceptance table", len(found), len(rows))
    out.data["rows"] = [verdict.table() for verdict in found]
    out.print(timings.verdicts(found))


def _time_grid(out: Output, lab: Lab, cases: list[Case]) -> None:
    for done, case in enumerate(cases, 1):
        lab.attention(case)
        out.say("grid", done, len(cases))


def _save_table(out: Output, lab: Lab, cases: list[Case], ran_on: dict[str, str]) -> None:
    from kvtune.bench.latency import measure
    from kvtune.bench.ranks import rule
    from kvtune.reading import readings

    measured = measure(lab, cases, ran_on, out.say)
    saved = replace(measured, methods={**readings(measured.head_dim)}).save()
    compared = rule(measured)
    out.data |= {"table": str(saved), "ranks": [one._asdict() for one in compared]}
    out.print(timings.ranks(compared), f"The latency table is saved: {saved}")


def decode(
    out: Output,
    where: Where,
    model: Decoded = LLAMA_8B,
    recipe: DecodeRecipe = "",
    batch: DecodeBatches = "",
    context: DecodeContext = None,
    steps: Steps = 32,
    output: File = None,
) -> None:
    """Time `generate` on a compressed cache and on transformers' own, and the memory of both."""
    # growing caches leave holes; both sides may use them
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from kvtune.bench import decode as work
    from kvtune.bench.clock import machine
    from kvtune.cli.job import check_length
    from kvtune.models import facts
    from kvtune.recipe import load
    from kvtune.shipped import find

    applied = load(find(recipe)) if recipe else work.usual_recipe()
    batches = _decode_batches(batch, where)
    loaded = opened(out, model, where)
    known = facts(loaded.config)
    more = work.WARM + work.REPEATS * steps + 1
    context = context or max(1, min(USUAL_CONTEXT, known.max_positions - more))
    check_length(known, context, more)
    decoding = work.Decoding(loaded, applied, context, steps)
    runs = work.compare(decoding, batches, out.say)
    found, ran_on = work.verdict(runs), machine(loaded.device)
    out.data |= {"model": model, "recipe": recipe or applied.name, "context": context}
    out.data |= {"runs": [asdict(run) for run in runs], **found, **ran_on}
    out.print(timings.runs(runs), *_compared(found["goals"]), ", ".join(ran_on.values()))
    write(output, out)


def _decode_batches(words: str, where: Where) -> list[int]:
    from kvtune.bench.decode import LARGEST
    from kvtune.models import pick_device

    on_gpu = pick_device(where.device).type == "cuda"
    parts = [part.strip() for part in (words or ("1,max" if on_gpu else "1")).split(",")]
    if "max" in parts and not on_gpu:
        raise UsageError("The largest batch is looked for on a GPU only.", "Give --batch 1,2.")
    return [LARGEST if part == "max" else counts("--batch", part)[0] for part in parts]


def opened(out: Output, model: str, where: Where) -> Any:
    """The model that a bench names: the shape of Llama-3.1-8B with random weights, or another."""
    from kvtune.bench.decode import llama_8b, random_model
    from kvtune.cli.job import open_model
    from kvtune.models import pick_device, pick_dtype

    device = pick_device(where.device)
    if model != LLAMA_8B:
        return open_model(out, model, where)[0]
    if device.type != "cuda":
        what = f"{LLAMA_8B} is made of 8 billion random weights on a GPU; torch uses {device} here."
        raise UnsupportedError(what, "Try: kvtune bench decode --model demo --context 2k")
    if not out.manners.verbose:
        from transformers.utils import logging

        logging.set_verbosity_error()
    return random_model(llama_8b(), device, pick_dtype(where.dtype, device))


def _compared(goals: list[dict[str, Any]]) -> list[str]:
    lines = []
    for goal in goals:
        found, wanted = (timings.spelled(goal["what"], goal[key]) for key in ("value", "limit"))
        lines.append(f"{found} (at least {wanted}): {'met' if goal['met'] else 'not met'}")
    return lines


def trials(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    continuation: Continuation = 128,
    contexts: Contexts = "512,2k",
    recipe: Applied = "k4v2",
) -> None:
    """Time search trials of MODEL behind contexts of several lengths."""
    from kvtune.bank import Sizes
    from kvtune.bench.trials import REPEATS, trial_costs
    from kvtune.cli.job import check_length, open_model, read_texts
    from kvtune.models import facts
    from kvtune.prove import environment
    from kvtune.recipe import load
    from kvtune.shipped import find

    found = lengths(contexts)
    applied = load(find(recipe))
    loaded, tokenizer = open_model(out, model, where)
    check_length(facts(loaded.config), max(found), continuation)
    documents = read_texts(replace(text, context=max(found)), where)["search"]
    sizes = Sizes(text.sequences, max(found), continuation)
    rows = trial_costs(loaded, tokenizer, documents, applied, sizes, found, out.say)
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


VERBS: dict[str, Callable[..., None]] = {"kernels": kernels, "decode": decode, "trials": trials}


def lengths(words: str) -> list[int]:
    """Reads 512,2k."""
    return [amounts.tokens(word) for word in words.split(",")] if words else []


def counts(option: str, words: str) -> list[int]:
    """Reads 1,8; UsageError for anything but whole numbers above 0."""
    parts = [word.strip() for word in words.split(",")] if words else []
    if odd := [part for part in parts if not part.isdigit() or not int(part)]:
        raise UsageError(f"{odd[0]!r} is no number for {option}.", f"Write {option} 1,8.")
    return [int(part) for part in parts]


def write(file: Path | None, out: Output) -> None:
    """Writes what a bench found, where a file was named."""
    if file is not None:
        write_atomic(file, json.dumps(out.data, indent=1, allow_nan=False).encode())
        out.note(f"The numbers are in {file}.")
