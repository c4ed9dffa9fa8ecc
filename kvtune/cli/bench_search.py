"""kvtune bench search, scaling and tune: what the search finds, and what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvtune.cli.amounts import clock, size
from kvtune.cli.bench import LLAMA_8B, File, counts, lengths, opened, write
from kvtune.cli.options import Continuation, Count, Model, Seed, Template, Text, Where
from kvtune.cli.output import Output
from kvtune.errors import UsageError

Trials = Annotated[int, typer.Option(min=1, help="Trials of our search.")]
Rivals = Annotated[int, typer.Option("--rivals", min=1, help="Trials of NSGA-II.")]
Depths = Annotated[str, typer.Option(metavar="N,...", help="How many of the first layers.")]
Contexts = Annotated[
    str, typer.Option(metavar="TOKENS,...", help="Context lengths, such as 512,2k.")
]
Whole = Annotated[
    str, typer.Argument(metavar="MODEL", help="llama-8b (random weights), demo, or a model.")
]


def search(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    count: Count,
    continuation: Continuation = 128,
    template: Template = "search-affine",
    trials: Trials = 200,
    rivals: Rivals = 1000,
    seed: Seed = 0,
    output: File = None,
) -> None:
    """Search MODEL, then search it with NSGA-II without a surrogate; compare their hypervolumes.

    Both choose from the same settings of every layer and measure on the same text.
    """
    from kvtune.bench.duel import contest

    with tempfile.TemporaryDirectory() as place:
        loaded = _opened(out, model, where)
        sized = text, continuation
        tuner = _tuner(out, loaded, sized, template, count, Path(place), trials, seed)
        held = contest(tuner, rivals, out.say)
    ran_on = _ran_on(tuner.model)
    plain, logs = held.volumes(False), held.volumes(True)
    out.data |= {"model": model, "linear": plain, "logarithmic": logs}
    out.data |= {"seconds": list(held.seconds), "points": list(map(list, held.ours))}
    out.data |= {"rival_points": list(map(list, held.rival)), **ran_on}
    table = Table(box=SIMPLE_HEAD)
    for column in ("trials", "NSGA-II trials", "volume", "NSGA-II", "log volume", "NSGA-II, log"):
        table.add_column(column, justify="right")
    for a, b in zip(plain, logs, strict=True):
        volumes = (a["volume"], a["rival_volume"], b["volume"], b["rival_volume"])
        numbers = (f"{volume:.3f}" for volume in volumes)
        table.add_row(f"{a['trials']:.0f}", f"{a['rival_trials']:.0f}", *numbers)
    ours, theirs = map(clock, held.seconds)
    out.print(
        table,
        f"Hypervolume over true bits and KL, with the worst of both as reference; {ours} against "
        f"{theirs}; {text.sequences} sequences of {text.context} + {continuation} tokens; "
        f"{', '.join(ran_on.values())}",
    )
    write(output, out)


def scaling(
    out: Output,
    model: Model,
    where: Where,
    text: Text,
    count: Count,
    continuation: Continuation = 64,
    template: Template = "search-affine",
    layers: Depths = "6,12,30",
    contexts: Contexts = "512,1k,2k",
    trials: Trials = 24,
    seed: Seed = 0,
    output: File = None,
) -> None:
    """Time calibration and search of MODEL's first layers behind contexts of several lengths."""
    from kvtune.bench.scaling import costs, exponents
    from kvtune.cli.job import check_length, open_model, read_texts, template_of
    from kvtune.models import facts

    found_contexts, depths = lengths(contexts), counts("--layers", layers)
    loaded, tokenizer = open_model(out, model, where)
    known = facts(loaded.config)
    check_length(known, max(found_contexts), continuation)
    if max(depths) > len(known.layers):
        raise UsageError(f"{model} has {len(known.layers)} layers.", "Give fewer with --layers.")
    settings = _settings(out, known, (text, continuation), count, seed)
    texts, opens = read_texts(text, where), template_of(template)
    rows = costs(loaded, tokenizer, texts, opens, settings, depths, found_contexts, trials, out.say)
    powers = {stage: exponents(rows, stage) for stage in ("calibrate", "search")}
    ran_on = _ran_on(loaded)
    named = {
        stage: {"layers": by_layers, "context": by_context}
        for stage, (by_layers, by_context) in powers.items()
    }
    out.data |= {"costs": [asdict(row) for row in rows], "exponents": named, **ran_on}
    table = Table(box=SIMPLE_HEAD)
    for column in ("layers", "context", "calibrate", "search", "trials"):
        table.add_column(column, justify="right")
    for row in rows:
        spent = (f"{row.calibrate:.1f} s", f"{row.search:.1f} s")
        table.add_row(str(row.layers), f"{row.context:,}", *spent, str(row.trials))
    told = "; ".join(f"{s} grows as layers^{a:.2f} context^{b:.2f}" for s, (a, b) in powers.items())
    kind = "CPU seconds" if loaded.device.type == "cpu" else "wall seconds"
    sizes = f"{kind}; {text.sequences} sequences, {continuation} continuation tokens"
    out.print(table, f"{told}.", f"{sizes}; {', '.join(ran_on.values())}")
    write(output, out)


def tune(
    out: Output,
    where: Where,
    text: Text,
    count: Count,
    model: Whole = LLAMA_8B,
    continuation: Continuation = 128,
    template: Template = "search-affine",
    trials: Trials = 28,
    points: Annotated[int, typer.Option(min=1, help="Points of the front to prove.")] = 8,
    seed: Seed = 0,
    output: File = None,
) -> None:
    """Time the whole job on MODEL, stage by stage, and the memory it takes at its peak."""
    from kvtune.bench.whole import whole

    with tempfile.TemporaryDirectory() as place:
        loaded = _opened(out, model, where)
        tuner = _tuner(
            out, loaded, (text, continuation), template, count, Path(place), trials, seed
        )
        tuner.settings = replace(tuner.settings, points=points)
        run = whole(tuner)
    ran_on = _ran_on(tuner.model)
    out.data |= {"model": model, **asdict(run), **ran_on}
    told = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in run.stages.items())
    out.print(
        f"{model}: {told}; {run.seconds:.1f} s in all; {run.trials} trials, {run.points} points "
        f"proved; peak {size(run.peak_bytes)}; {', '.join(ran_on.values())}"
    )
    write(output, out)


def _opened(out: Output, model: str, where: Where) -> tuple[Any, Any]:
    """Model and tokenizer; random weights read bytes."""
    from kvtune.bench.whole import ByteTokenizer
    from kvtune.cli.job import open_model

    if model != LLAMA_8B:
        return open_model(out, model, where)
    return opened(out, model, where), ByteTokenizer()


def _settings(out: Output, known: Any, sized: tuple[Text, int], count: Count, seed: int) -> Any:
    from kvtune.bank import Sizes
    from kvtune.cli.job import bytes_context
    from kvtune.goal import USUAL, Goal
    from kvtune.publish import Settings

    text, continuation = sized
    at = bytes_context(out, known, count.bytes_at)
    return Settings(
        sizes=Sizes(text.sequences, text.context, continuation),
        goal=Goal(USUAL, at, count.batch),
        seed=seed,
        proof_steps=min(Settings.proof_steps, continuation),
    )


def _tuner(
    out: Output,
    loaded: tuple[Any, Any],
    sized: tuple[Text, int],
    template: str,
    count: Count,
    folder: Path,
    trials: int,
    seed: int,
) -> Any:
    from kvtune import runs
    from kvtune.cli.job import check_length, read_texts, template_of
    from kvtune.models import facts
    from kvtune.search import Limits
    from kvtune.tune import Tuner

    (model, tokenizer), (text, continuation) = loaded, sized
    known = facts(model.config)
    check_length(known, text.context, continuation)
    settings = _settings(out, known, sized, count, seed)
    texts = read_texts(text, Where())
    limits = Limits(str(folder / runs.STUDY), trials)
    opens = template_of(template)
    tuner = Tuner(model, tokenizer, texts, opens, folder, settings=settings, limits=limits)
    tuner.say = out.say
    return tuner


def _ran_on(model: Any) -> dict[str, str]:
    from kvtune.prove import environment

    return environment(model.device)


VERBS: dict[str, Callable[..., None]] = {"search": search, "scaling": scaling, "tune": tune}
